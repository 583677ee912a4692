#include "decode_avx512.hpp"

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

KVSTORE_AVX512 inline void scatter(i32* values, __m512i at, __m512i what) {
    _mm512_i32scatter_epi32(values, at, what, 4);
}

}  // namespace

bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

KVSTORE_AVX512 std::size_t decode_values(StreamDecoder& stream, const WholeBlock& block, const u32* slots,
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

KVSTORE_AVX512 std::size_t decode_digits(StreamDecoder& stream, const WholeBlock& block, const u16* frequencies,
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

}  // namespace kvstore::avx512

#else

namespace kvstore::avx512 {

bool supported() { return false; }

std::size_t decode_values(StreamDecoder&, const WholeBlock&, const u32*, const std::array<i32, kLanes>&, int, int) {
    return 0;
}

std::size_t decode_digits(StreamDecoder&, const WholeBlock&, const u16*, const std::array<u16, kLanes>&) { return 0; }

}  // namespace kvstore::avx512

#endif
