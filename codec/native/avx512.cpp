#include "avx512.hpp"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>

namespace kvstore::avx512 {
namespace {

// This file alone is compiled for AVX-512; nothing of it runs before `supported` said yes.
#define KVSTORE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,popcnt")))

constexpr int kHalf = 16;
constexpr std::size_t kStepBytesMax = 4 * kLanes;  // a refill and a raw word for each lane

struct Pair {
    __m512i half[2];
};

template <class T>
KVSTORE_AVX512 inline Pair load_pair(const std::array<T, kLanes>& from) {
    static_assert(sizeof(T) == 4);
    return {{_mm512_loadu_si512(from.data()), _mm512_loadu_si512(from.data() + kHalf)}};
}

// Lanes below 2^16 take the next words, in lane order.
KVSTORE_AVX512 inline __m512i refill(__m512i state, const u8*& at) {
    const __mmask16 low = _mm512_cmplt_epu32_mask(state, _mm512_set1_epi32(static_cast<int>(kStateMin)));
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    at += 2 * __builtin_popcount(low);
    return _mm512_mask_or_epi32(state, low, _mm512_slli_epi32(state, 16), _mm512_maskz_expand_epi32(low, words));
}

// Lane 31 first, as the encoder goes: its words come out in reverse.
template <class T>
KVSTORE_AVX512 inline Pair load_reversed(const std::array<T, kLanes>& from) {
    std::array<i32, kLanes> reversed;
    for (std::size_t lane = 0; lane < kLanes; ++lane) reversed[lane] = static_cast<i32>(from[kLanes - 1 - lane]);
    return load_pair(reversed);
}

KVSTORE_AVX512 inline void push(StreamEncoder& stream, __mmask16 lanes, __m512i words) {
    const __m256i packed = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(lanes, words));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(stream.room()), packed);
    stream.added(static_cast<std::size_t>(__builtin_popcount(lanes)));
}

// x / f for 8 lanes. A quotient that is no integer is at least 2^-12 from one, and a double's error is 2^-33 of it.
KVSTORE_AVX512 inline __m256i divide(__m256i x, __m256i f) {
    return _mm512_cvttpd_epu32(_mm512_div_pd(_mm512_cvtepu32_pd(x), _mm512_cvtepu32_pd(f)));
}

// StreamEncoder::put of 16 lanes; `code`: frequency, and start << 16.
KVSTORE_AVX512 inline __m512i put(StreamEncoder& stream, __m512i state, __m512i code) {
    const __m512i frequency = _mm512_and_si512(code, _mm512_set1_epi32(0xFFFF)), start = _mm512_srli_epi32(code, 16);
    const __mmask16 full = _mm512_cmpge_epu32_mask(_mm512_srli_epi32(state, 20), frequency);
    push(stream, full, state);
    const __m512i x = _mm512_mask_srli_epi32(state, full, state, 16);
    const __m512i quotient = _mm512_inserti32x8(
        _mm512_castsi256_si512(divide(_mm512_castsi512_si256(x), _mm512_castsi512_si256(frequency))),
        divide(_mm512_extracti32x8_epi32(x, 1), _mm512_extracti32x8_epi32(frequency, 1)), 1);
    const __m512i rest = _mm512_sub_epi32(x, _mm512_mullo_epi32(quotient, frequency));
    return _mm512_add_epi32(_mm512_slli_epi32(quotient, kSlotBits), _mm512_add_epi32(rest, start));
}

KVSTORE_AVX512 inline void store_reversed(StreamEncoder& stream, const Pair& state) {
    std::array<u32, kLanes> reversed;
    for (int h = 0; h < 2; ++h) _mm512_storeu_si512(reversed.data() + kHalf * h, state.half[h]);
    for (std::size_t lane = 0; lane < kLanes; ++lane) stream.states()[lane] = reversed[kLanes - 1 - lane];
}

KVSTORE_AVX512 inline void scatter(i32* values, __m512i at, __m512i what) {
    _mm512_i32scatter_epi32(values, at, what, 4);
}

}  // namespace

bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

KVSTORE_AVX512 std::size_t decode_values(StreamDecoder& stream, const WholeBlock<i32>& block, const u32* slots,
                                         const std::array<i32, kLanes>& offsets, int bias, int escape) {
    const __m512i low12 = _mm512_set1_epi32(static_cast<int>(kSlots - 1)), one = _mm512_set1_epi32(1);
    const Pair base = load_pair(block.bases), offset = load_pair(offsets);
    Pair state = load_pair(stream.states());
    const u8* at = stream.position();
    const u8* const last = stream.end() - std::min(stream.bytes_left(), kStepBytesMax);
    std::size_t done = 0;
    for (; done < block.tokens.size() && at < last; ++done) {
        const u32 token = block.tokens[done];
        __m512i symbol[2];
        for (int h = 0; h < 2; ++h) {
            const __m512i x = state.half[h];
            const __m512i index = _mm512_add_epi32(offset.half[h], _mm512_and_si512(x, low12));
            const __m512i entry = _mm512_i32gather_epi32(index, slots, 4);
            const __m512i frequency =
                _mm512_add_epi32(_mm512_and_si512(_mm512_srli_epi32(entry, kSlotBits), low12), one);
            symbol[h] = _mm512_srli_epi32(entry, 24);
            state.half[h] = _mm512_add_epi32(_mm512_mullo_epi32(frequency, _mm512_srli_epi32(x, kSlotBits)),
                                             _mm512_and_si512(entry, low12));
        }
        for (int h = 0; h < 2; ++h) state.half[h] = refill(state.half[h], at);
        for (int h = 0; h < 2; ++h) {
            __m512i value = _mm512_sub_epi32(symbol[h], _mm512_set1_epi32(bias));
            const __mmask16 escaped = _mm512_cmpeq_epi32_mask(symbol[h], _mm512_set1_epi32(escape));
            if (escaped) {
                const __m512i words = _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
                value = _mm512_mask_expand_epi32(value, escaped, words);
                at += 2 * __builtin_popcount(escaped);
            }
            scatter(block.values + token, base.half[h], value);
        }
    }
    for (int h = 0; h < 2; ++h) _mm512_storeu_si512(stream.states().data() + kHalf * h, state.half[h]);
    stream.move_to(at);
    return done;
}

KVSTORE_AVX512 std::size_t decode_digits(StreamDecoder& stream, const WholeBlock<i32>& block, const u16* frequencies,
                                         const std::array<u16, kLanes>& rows) {
    // A lane has three alphabets, by the magnitude of the coarse value: where their second and third symbol start.
    std::array<std::array<i32, kLanes>, 3> firsts, seconds;
    for (std::size_t magnitude = 0; magnitude < 3; ++magnitude)
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            const u16* f = frequencies + 3 * (rows[lane] + magnitude);
            firsts[magnitude][lane] = f[0];
            seconds[magnitude][lane] = f[0] + f[1];
        }
    const Pair base = load_pair(block.bases);
    const Pair first_of[3] = {load_pair(firsts[0]), load_pair(firsts[1]), load_pair(firsts[2])};
    const Pair second_of[3] = {load_pair(seconds[0]), load_pair(seconds[1]), load_pair(seconds[2])};
    const __m512i low12 = _mm512_set1_epi32(static_cast<int>(kSlots - 1)), zero = _mm512_setzero_si512();
    const __m512i one = _mm512_set1_epi32(1);
    Pair state = load_pair(stream.states());
    const u8* at = stream.position();
    const u8* const last = stream.end() - std::min(stream.bytes_left(), kStepBytesMax);
    std::size_t done = 0;
    for (; done < block.tokens.size() && at < last; ++done) {
        i32* const values = block.values + block.tokens[done];
        for (int h = 0; h < 2; ++h) {
            const __m512i coarse = _mm512_i32gather_epi32(base.half[h], values, 4);
            const __m512i magnitude = _mm512_abs_epi32(coarse);
            const __mmask16 not_zero = _mm512_cmpgt_epi32_mask(magnitude, zero);
            const __mmask16 large = _mm512_cmpgt_epi32_mask(magnitude, one);
            __m512i first = _mm512_mask_mov_epi32(first_of[0].half[h], not_zero, first_of[1].half[h]);
            __m512i second = _mm512_mask_mov_epi32(second_of[0].half[h], not_zero, second_of[1].half[h]);
            first = _mm512_mask_mov_epi32(first, large, first_of[2].half[h]);
            second = _mm512_mask_mov_epi32(second, large, second_of[2].half[h]);

            const __m512i x = state.half[h];
            const __m512i slot = _mm512_and_si512(x, low12);
            const __mmask16 beyond_first = _mm512_cmpge_epi32_mask(slot, first);
            const __mmask16 beyond_second = _mm512_cmpge_epi32_mask(slot, second);
            __m512i start = _mm512_maskz_mov_epi32(beyond_first, first);
            start = _mm512_mask_mov_epi32(start, beyond_second, second);
            __m512i end = _mm512_mask_mov_epi32(first, beyond_first, second);
            end = _mm512_mask_mov_epi32(end, beyond_second, _mm512_set1_epi32(static_cast<int>(kSlots)));
            state.half[h] = _mm512_add_epi32(
                _mm512_mullo_epi32(_mm512_sub_epi32(end, start), _mm512_srli_epi32(x, kSlotBits)),
                _mm512_sub_epi32(slot, start));

            __m512i digit = _mm512_mask_mov_epi32(_mm512_set1_epi32(-1), beyond_first, zero);
            digit = _mm512_mask_mov_epi32(digit, beyond_second, one);
            digit = _mm512_mask_sub_epi32(digit, _mm512_movepi32_mask(coarse), zero, digit);
            const __m512i tripled = _mm512_add_epi32(coarse, _mm512_slli_epi32(coarse, 1));
            scatter(values, base.half[h], _mm512_add_epi32(tripled, digit));
        }
        for (int h = 0; h < 2; ++h) state.half[h] = refill(state.half[h], at);
    }
    for (int h = 0; h < 2; ++h) _mm512_storeu_si512(stream.states().data() + kHalf * h, state.half[h]);
    stream.move_to(at);
    return done;
}

KVSTORE_AVX512 void encode_values(StreamEncoder& stream, const WholeBlock<const i32>& block, const u32* codes,
                                  const std::array<i32, kLanes>& offsets, int value_max, int raw_max, int escape) {
    const Pair base = load_reversed(block.bases), offset = load_reversed(offsets);
    const __m512i escapes = _mm512_set1_epi32(escape), symbol_zero = _mm512_set1_epi32(value_max);
    Pair state = load_reversed(stream.states());
    for (std::size_t left = block.tokens.size(); left-- > 0;) {
        stream.reserve_step();
        const i32* const values = block.values + block.tokens[left];
        __m512i code[2];
        for (int h = 0; h < 2; ++h) {
            const __m512i value = _mm512_i32gather_epi32(base.half[h], values, 4);
            const __m512i kept = _mm512_max_epi32(_mm512_min_epi32(value, _mm512_set1_epi32(raw_max)),
                                                  _mm512_set1_epi32(-raw_max));
            const __mmask16 small = _mm512_cmple_epi32_mask(_mm512_abs_epi32(kept), symbol_zero);
            const __m512i symbol = _mm512_mask_add_epi32(escapes, small, kept, symbol_zero);
            code[h] = _mm512_i32gather_epi32(_mm512_add_epi32(offset.half[h], symbol), codes, 4);
            const __mmask16 impossible = _mm512_testn_epi32_mask(code[h], _mm512_set1_epi32(0xFFFF));
            code[h] = _mm512_mask_i32gather_epi32(code[h], impossible, _mm512_add_epi32(offset.half[h], escapes), codes, 4);
            const __mmask16 escaped = _kor_mask16(_knot_mask16(small), impossible);
            if (escaped) push(stream, escaped, kept);
        }
        for (int h = 0; h < 2; ++h) state.half[h] = put(stream, state.half[h], code[h]);
    }
    store_reversed(stream, state);
}

KVSTORE_AVX512 void encode_digits(StreamEncoder& stream, const WholeBlock<const i32>& block, const u32* codes,
                                  const std::array<u16, kLanes>& rows) {
    const Pair base = load_reversed(block.bases), row = load_reversed(rows);
    const __m512i zero = _mm512_setzero_si512(), one = _mm512_set1_epi32(1), two = _mm512_set1_epi32(2);
    Pair state = load_reversed(stream.states());
    for (std::size_t left = block.tokens.size(); left-- > 0;) {
        stream.reserve_step();
        const i32* const values = block.values + block.tokens[left];
        for (int h = 0; h < 2; ++h) {
            const __m512i value = _mm512_i32gather_epi32(base.half[h], values, 4);
            // third(): (|value| + 1) / 3 with value's sign; a float has room for both |value| < 2^20 and the thirds.
            const __m512 above = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_abs_epi32(value), one));
            const __m512i magnitude = _mm512_cvttps_epi32(_mm512_mul_ps(above, _mm512_set1_ps(1.0f / 3.0f)));
            const __mmask16 negative = _mm512_movepi32_mask(value);
            const __m512i coarse = _mm512_mask_sub_epi32(magnitude, negative, zero, magnitude);
            const __m512i tripled = _mm512_add_epi32(coarse, _mm512_slli_epi32(coarse, 1));
            __m512i digit = _mm512_sub_epi32(value, tripled);
            digit = _mm512_mask_sub_epi32(digit, _mm512_movepi32_mask(coarse), zero, digit);
            const __m512i alphabet = _mm512_add_epi32(row.half[h], _mm512_min_epi32(magnitude, two));
            const __m512i index = _mm512_add_epi32(_mm512_add_epi32(alphabet, _mm512_slli_epi32(alphabet, 1)),
                                                   _mm512_add_epi32(digit, one));
            state.half[h] = put(stream, state.half[h], _mm512_i32gather_epi32(index, codes, 4));
        }
    }
    store_reversed(stream, state);
}

}  // namespace kvstore::avx512

#else

namespace kvstore::avx512 {

bool supported() { return false; }

// Never called: `supported` says no.
std::size_t decode_values(StreamDecoder&, const WholeBlock<i32>&, const u32*, const std::array<i32, kLanes>&, int, int) {
    return 0;
}
std::size_t decode_digits(StreamDecoder&, const WholeBlock<i32>&, const u16*, const std::array<u16, kLanes>&) { return 0; }
void encode_values(StreamEncoder&, const WholeBlock<const i32>&, const u32*, const std::array<i32, kLanes>&, int, int, int) {}
void encode_digits(StreamEncoder&, const WholeBlock<const i32>&, const u32*, const std::array<u16, kLanes>&) {}

}  // namespace kvstore::avx512

#endif
