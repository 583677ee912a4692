// AVX-512 (F, BW, DQ, VL, VBMI2: Ice Lake and Zen 4 on). READ ME FIRST: kernels.hpp.
//
//  * Only integers are reordered; a quotient that floats estimate is made exact before it is used.
//  * Reads past a step: at most 128 bytes of the stream, or of the copy of its tail (rans.hpp); 32 words of room
//    in an encoder, which reserve_step makes.
#include "kernels.hpp"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>

namespace kvstore {
namespace avx512 {
namespace {

#if defined(__clang__)  // which ignores the whole attribute if it names a vector width
#define KVSTORE_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx2,popcnt")))
#else
#define KVSTORE_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx2,popcnt,prefer-vector-width=512")))
#endif
#include "row_loops.inl"

constexpr int kHalf = 16;

struct Pair {
    __m512i half[2];
};

KVSTORE_TARGET inline Pair load_pair(const void* from) {
    const auto* at = static_cast<const i32*>(from);
    return {{_mm512_loadu_si512(at), _mm512_loadu_si512(at + kHalf)}};
}

KVSTORE_TARGET inline __m512i words_of(i16 value) { return _mm512_set1_epi16(value); }

// 16-bit elements 2i + `odd` of two vectors, as one: the low (or high) halves of 32 lanes.
KVSTORE_TARGET inline __m512i halves(const Pair& lanes, bool odd) {
    const __m512i index = _mm512_add_epi16(
        _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22, 20, 18, 16, 14,
                         12, 10, 8, 6, 4, 2, 0),
        words_of(odd ? 1 : 0));
    return _mm512_permutex2var_epi16(lanes.half[0], index, lanes.half[1]);
}

KVSTORE_TARGET inline Pair widen(__m512i words) {
    return {{_mm512_cvtepu16_epi32(_mm512_castsi512_si256(words)), _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(words, 1))}};
}

KVSTORE_TARGET inline u32 first_lanes(int count) { return count == kLanes ? ~0u : (1u << count) - 1; }

// What a decoding loop keeps of one stream in registers: the states' upper and lower 16 bits.
struct Flow {
    __m512i high, low;
    __m512i low12;  // a mask: kept, since GCC would make it anew for each step
    const u8* at;
    const u8* last;  // a step may start before here
    __mmask32 active;

    KVSTORE_TARGET Flow(StreamDecoder& stream, int lanes)
        : low12(words_of(static_cast<i16>(kSlots - 1))), at(stream.position()), last(stream.limit()), active(first_lanes(lanes)) {
        const Pair states = load_pair(stream.states().data());
        high = halves(states, true);
        low = halves(states, false);
        __asm__("" : "+v"(low12));
    }
    // False where the stream was too short.
    KVSTORE_TARGET bool store(StreamDecoder& stream) const {
        const Pair upper = widen(high), lower = widen(low);
        for (int h = 0; h < 2; ++h)
            _mm512_storeu_si512(stream.states().data() + kHalf * h,
                                _mm512_or_si512(_mm512_slli_epi32(upper.half[h], 16), lower.half[h]));
        return stream.move_to(at);
    }
    KVSTORE_TARGET bool has_room(StreamDecoder& stream) {
        if (__builtin_expect(at < last, 1)) return true;
        const u8* const copy = stream.enter_tail(at);
        if (copy == nullptr) return false;
        at = copy;
        last = stream.limit();
        return true;
    }
    KVSTORE_TARGET __m512i slot() const { return _mm512_and_si512(low, low12); }
    // A symbol's span of slots takes the states on, x to frequency · ⌊x / 2^12⌋ + bias; those then below 2^16 take the
    // next words, in lane order.
    KVSTORE_TARGET __attribute__((always_inline)) inline void advance(__m512i frequency, __m512i bias) {
        const __m512i kept = _mm512_shldi_epi16(high, low, 16 - kSlotBits), kept_high = _mm512_srli_epi16(high, kSlotBits);
        const __m512i above = _mm512_add_epi16(_mm512_mulhi_epu16(frequency, kept), _mm512_mullo_epi16(frequency, kept_high));
        low = _mm512_mask_add_epi16(low, active, _mm512_mullo_epi16(frequency, kept), bias);
        const __mmask32 carry = _mm512_mask_cmplt_epu16_mask(active, low, bias);
        high = _mm512_mask_mov_epi16(high, active, above);
        high = _mm512_mask_sub_epi16(high, carry, high, _mm512_set1_epi16(-1));
        const __mmask32 taking = _mm512_mask_testn_epi16_mask(active, high, high);
        __m512i words = _mm512_loadu_si512(at);
        __asm__("" : "+v"(words));  // expanding from memory is microcode on Zen 4
        high = _mm512_mask_mov_epi16(high, taking, low);
        low = _mm512_mask_expand_epi16(low, taking, words);
        at += 2 * _mm_popcnt_u32(taking);
    }
};

// Raw words replace the values of escaped lanes, in lane order: rare. Returns where they end; taking a reference to where
// they begin would keep the caller's Flow out of registers.
__attribute__((noinline)) const u8* take_raw(u32 escaped, i16* row, const u8* at) {
    for (; escaped != 0; escaped &= escaped - 1, at += 2) row[std::countr_zero(escaped)] = load<i16>(at);
    return at;
}

// What a step decodes in each lane: its value, and the span of slots that says it, as frequency and as place in it.
struct Decoded {
    __m512i value, frequency, bias;
};

template <bool Falling>
KVSTORE_TARGET inline Decoded looked_up(const u32* slots, const ValueLanes& lanes, const Flow& flow) {
    const Pair offset = load_pair(lanes.slots.data()), slot = widen(flow.slot());
    Pair entry;
    for (int h = 0; h < 2; ++h)
        entry.half[h] = _mm512_i32gather_epi32(_mm512_add_epi32(offset.half[h], slot.half[h]), slots, 4);
    const __m512i upper = halves(entry, true), lower = halves(entry, false);
    const __m512i symbol = _mm512_srli_epi16(upper, 8), add = _mm512_loadu_si512(lanes.add.data());
    const __m512i less = _mm512_and_si512(_mm512_shldi_epi16(upper, lower, 16 - kSlotBits), flow.low12);  // frequency − 1
    return {Falling ? _mm512_sub_epi16(add, symbol) : _mm512_add_epi16(add, symbol), _mm512_add_epi16(less, words_of(1)),
            _mm512_and_si512(lower, flow.low12)};
}

// The same by near_symbols.hpp; `beyond`: lanes of which it does not hold.
template <bool Falling>
KVSTORE_TARGET inline Decoded compared(const ValueJob& job, __m512i centre, const Flow& flow, __mmask32& beyond) {
    const auto row = [near = job.near](std::size_t index) KVSTORE_TARGET { return _mm512_load_si512(near + index * kLanes); };
    constexpr std::size_t kStart = NearRow::kEdges, kCodes = kStart + 1, kWidth = kCodes + NearRow::kEdges;
    const __m512i t = _mm512_sub_epi16(flow.slot(), row(kStart));
    const __mmask32 before = _mm512_movepi16_mask(t);
    const __m512i distance = _mm512_mask_sub_epi16(_mm512_sub_epi16(t, row(kWidth)), before, _mm512_set1_epi16(-1), t);
    __m512i bias = t, code = row(kCodes), edge = row(0);
    const auto look = [&](std::size_t k) KVSTORE_TARGET __attribute__((always_inline)) {
        const __mmask32 further = _mm512_cmpge_epi16_mask(distance, edge);
        bias = _mm512_mask_sub_epi16(bias, further, distance, edge);
        code = _mm512_mask_mov_epi16(code, further, row(kCodes + k));
        edge = row(k);
    };
    for (std::size_t k = 1; k <= static_cast<std::size_t>(job.reach); k += 2) {
        look(k);
        look(k + 1);
    }
    beyond = _mm512_mask_cmpge_epi16_mask(flow.active, distance, edge);
    const __m512i less = _mm512_and_si512(code, flow.low12);  // frequency − 1
    const __m512i magnitude = _mm512_srli_epi16(code, kSlotBits);
    const __m512i aside = _mm512_mask_sub_epi16(magnitude, before, _mm512_setzero_si512(), magnitude);
    return {Falling ? _mm512_sub_epi16(centre, aside) : _mm512_add_epi16(centre, aside),
            _mm512_sub_epi16(less, _mm512_set1_epi16(-1)), _mm512_mask_sub_epi16(bias, before, less, bias)};
}

// What decoding a block's values keeps in registers beside its Flow.
template <bool Falling, bool Near>
struct ValueLoop {
    const ValueJob& job;
    const u32* slots;
    __m512i centre, escaped;  // values
    Flow flow;

    KVSTORE_TARGET ValueLoop(const Alphabet& alphabet, const ValueJob& of)
        : job(of), slots(alphabet.table->slots.data()), flow(*of.stream, of.lanes->count) {
        const __m512i add = _mm512_loadu_si512(job.lanes->add.data());
        const __m512i middle = words_of(static_cast<i16>(alphabet.centre)), last = words_of(static_cast<i16>(alphabet.escape));
        centre = Falling ? _mm512_sub_epi16(add, middle) : _mm512_add_epi16(add, middle);
        escaped = Falling ? _mm512_sub_epi16(add, last) : _mm512_add_epi16(add, last);
    }
    KVSTORE_TARGET bool has_room() { return flow.has_room(*job.stream); }
    KVSTORE_TARGET bool finish() const { return flow.store(*job.stream); }
    KVSTORE_TARGET __attribute__((always_inline)) inline void step(int at) {
        i16* const row = job.tile + at * kLanes;
        if constexpr (Near) {
            __mmask32 beyond = 0;
            const Decoded decoded = compared<Falling>(job, centre, flow, beyond);
            if (__builtin_expect(beyond == 0, 1)) {
                flow.advance(decoded.frequency, decoded.bias);
                _mm512_storeu_si512(row, decoded.value);
                return;
            }
        }
        const Decoded decoded = looked_up<Falling>(slots, *job.lanes, flow);
        flow.advance(decoded.frequency, decoded.bias);
        _mm512_storeu_si512(row, decoded.value);
        const u32 raw = _mm512_mask_cmpeq_epi16_mask(flow.active, decoded.value, escaped);
        if (__builtin_expect(raw != 0, 0)) flow.at = take_raw(raw, row, flow.at);
    }
};

constexpr Status status_of(bool whole) { return whole ? Status::ok : Status::stream_ends_early; }

template <bool Falling, bool Near>
KVSTORE_TARGET Status value_steps(const Alphabet& alphabet, const ValueJob& job, int steps) {
    ValueLoop<Falling, Near> loop(alphabet, job);
    int step = 0;
    for (; step < steps && loop.has_room(); ++step) loop.step(step);
    return status_of(loop.finish() && step == steps);
}

template <bool Falling, bool Near0, bool Near1>
KVSTORE_TARGET Status value_steps(const Alphabet& alphabet, const ValueJob& job0, const ValueJob& job1, int steps) {
    ValueLoop<Falling, Near0> loop0(alphabet, job0);
    ValueLoop<Falling, Near1> loop1(alphabet, job1);
    int step = 0;
    for (; step < steps && loop0.has_room() && loop1.has_room(); ++step) {
        loop0.step(step);
        loop1.step(step);
    }
    const bool whole[2]{loop0.finish(), loop1.finish()};
    return status_of(whole[0] && whole[1] && step == steps);
}

template <bool Falling>
KVSTORE_TARGET Status decode_values_as(const Alphabet& alphabet, std::span<const ValueJob> jobs, int steps) {
    const auto near = [&jobs](std::size_t n) { return jobs[n].reach > 0; };
    if (jobs.size() == 1) {
        const auto one = near(0) ? value_steps<Falling, true> : value_steps<Falling, false>;
        return one(alphabet, jobs[0], steps);
    }
    const auto both = near(0) ? near(1) ? value_steps<Falling, true, true> : value_steps<Falling, true, false>
                              : near(1) ? value_steps<Falling, false, true> : value_steps<Falling, false, false>;
    return both(alphabet, jobs[0], jobs[1], steps);
}

KVSTORE_TARGET Status decode_values(const Alphabet& alphabet, std::span<const ValueJob> jobs, int steps) {
    return alphabet.falling ? decode_values_as<true>(alphabet, jobs, steps) : decode_values_as<false>(alphabet, jobs, steps);
}

// second[0], third[0] where the coarse value is 0, [1] where it is ±1, [2] beyond: as 16-bit lanes.
struct DigitStarts {
    __m512i second[3], third[3];
    KVSTORE_TARGET explicit DigitStarts(const DigitLanes& lanes) {
        for (std::size_t m = 0; m < 3; ++m) {
            second[m] = _mm512_loadu_si512(lanes.second[m].data());
            third[m] = _mm512_loadu_si512(lanes.third[m].data());
        }
    }
    KVSTORE_TARGET void of(__m512i coarse, __m512i& second_start, __m512i& third_start) const {
        const __m512i magnitude = _mm512_abs_epi16(coarse);
        const __mmask32 some = _mm512_cmpgt_epi16_mask(magnitude, _mm512_setzero_si512());
        const __mmask32 large = _mm512_cmpgt_epi16_mask(magnitude, words_of(1));
        second_start = _mm512_mask_mov_epi16(_mm512_mask_mov_epi16(second[0], some, second[1]), large, second[2]);
        third_start = _mm512_mask_mov_epi16(_mm512_mask_mov_epi16(third[0], some, third[1]), large, third[2]);
    }
};

KVSTORE_TARGET __attribute__((always_inline)) inline void digit_step(const DigitStarts& starts, Flow& flow, i16* row) {
    const __m512i all = words_of(static_cast<i16>(kSlots));
    const __m512i zero = _mm512_setzero_si512(), one = words_of(1), minus = words_of(-1);
    const __m512i coarse = _mm512_loadu_si512(row);
    __m512i second, third;
    starts.of(coarse, second, third);
    const __m512i slot = flow.slot();
    const __mmask32 beyond_second = _mm512_cmpge_epu16_mask(slot, second);
    const __mmask32 beyond_third = _mm512_cmpge_epu16_mask(slot, third);
    const __m512i start = _mm512_mask_mov_epi16(_mm512_maskz_mov_epi16(beyond_second, second), beyond_third, third);
    const __m512i end = _mm512_mask_mov_epi16(_mm512_mask_mov_epi16(second, beyond_second, third), beyond_third, all);
    flow.advance(_mm512_sub_epi16(end, start), _mm512_sub_epi16(slot, start));
    __m512i digit = _mm512_mask_mov_epi16(_mm512_mask_mov_epi16(minus, beyond_second, zero), beyond_third, one);
    digit = _mm512_mask_sub_epi16(digit, _mm512_movepi16_mask(coarse), zero, digit);
    const __m512i tripled = _mm512_add_epi16(coarse, _mm512_add_epi16(coarse, coarse));
    _mm512_storeu_si512(row, _mm512_add_epi16(tripled, digit));
}

KVSTORE_TARGET inline Status digit_steps(const DigitJob& job, int steps) {
    const DigitStarts starts(*job.lanes);
    Flow flow(*job.stream, job.lanes->count);
    int step = 0;
    for (; step < steps && flow.has_room(*job.stream); ++step) digit_step(starts, flow, job.tile + step * kLanes);
    return status_of(flow.store(*job.stream) && step == steps);
}

KVSTORE_TARGET inline Status digit_steps(const DigitJob& job0, const DigitJob& job1, int steps) {
    const DigitStarts starts0(*job0.lanes), starts1(*job1.lanes);
    Flow flow0(*job0.stream, job0.lanes->count), flow1(*job1.stream, job1.lanes->count);
    int step = 0;
    for (; step < steps && flow0.has_room(*job0.stream) && flow1.has_room(*job1.stream); ++step) {
        digit_step(starts0, flow0, job0.tile + step * kLanes);
        digit_step(starts1, flow1, job1.tile + step * kLanes);
    }
    const bool whole[2]{flow0.store(*job0.stream), flow1.store(*job1.stream)};
    return status_of(whole[0] && whole[1] && step == steps);
}

KVSTORE_TARGET Status decode_digits(std::span<const DigitJob> jobs, int steps) {
    return jobs.size() == 2 ? digit_steps(jobs[0], jobs[1], steps) : digit_steps(jobs[0], steps);
}

// Encoders go through lanes from the last to the first, so they hold them reversed: element 0 is lane 31.
KVSTORE_TARGET inline __m512i reversed_words(__m512i words) {
    const __m512i index = _mm512_set_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23,
                                           24, 25, 26, 27, 28, 29, 30, 31);
    return _mm512_permutexvar_epi16(index, words);
}

template <class T>
KVSTORE_TARGET inline Pair load_reversed(const std::array<T, kLanes>& from) {
    std::array<i32, kLanes> reversed;
    for (std::size_t lane = 0; lane < kLanes; ++lane) reversed[lane] = static_cast<i32>(from[kLanes - 1 - lane]);
    return load_pair(reversed.data());
}

KVSTORE_TARGET inline void store_reversed(StreamEncoder& stream, const Pair& state) {
    std::array<u32, kLanes> reversed;
    for (int h = 0; h < 2; ++h) _mm512_storeu_si512(reversed.data() + kHalf * h, state.half[h]);
    for (std::size_t lane = 0; lane < kLanes; ++lane) stream.states()[lane] = reversed[kLanes - 1 - lane];
}

// Of reversed lanes: those that a block has.
KVSTORE_TARGET inline u32 last_lanes(int count) { return count == kLanes ? ~0u : ~(~0u >> count); }

KVSTORE_TARGET inline void push(StreamEncoder& stream, __mmask16 lanes, __m512i words) {
    const __m256i packed = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(lanes, words));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(stream.room()), packed);
    stream.added(static_cast<std::size_t>(_mm_popcnt_u32(lanes)));
}

// 1 / f to about 2^-22: a Newton step on a 14-bit estimate.
KVSTORE_TARGET inline __m512 reciprocal(__m512i frequency) {
    const __m512 f = _mm512_cvtepi32_ps(frequency), r = _mm512_rcp14_ps(f);
    return _mm512_mul_ps(r, _mm512_fnmadd_ps(f, r, _mm512_set1_ps(2.0f)));
}

// StreamEncoder::put of 16 lanes. The quotient q = ⌊x / f⌋ < 2^20 comes from single precision, whose error is under
// 2^20 · 2^-21, so it is right or one off; the remainder tells which. (q << 12) + (x − q·f) + start = x + q·(4096 − f) + start.
KVSTORE_TARGET inline __m512i put(StreamEncoder& stream, __m512i state, __mmask16 active, __m512i frequency, __m512i start) {
    const __m512 inverse = reciprocal(frequency);
    const __m512i gap = _mm512_sub_epi32(_mm512_set1_epi32(static_cast<int>(kSlots)), frequency);
    const __mmask16 full = _mm512_mask_cmpge_epu32_mask(active, _mm512_srli_epi32(state, 20), frequency);
    push(stream, full, state);
    const __m512i x = _mm512_mask_srli_epi32(state, full, state, 16);
    const __m512i quotient = _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_cvtepu32_ps(x), inverse));
    const __m512i rest = _mm512_sub_epi32(x, _mm512_mullo_epi32(quotient, frequency));
    __m512i next = _mm512_add_epi32(_mm512_add_epi32(x, start), _mm512_mullo_epi32(quotient, gap));
    next = _mm512_mask_sub_epi32(next, _mm512_movepi32_mask(rest), next, gap);
    next = _mm512_mask_add_epi32(next, _mm512_cmpge_epi32_mask(rest, frequency), next, gap);
    return _mm512_mask_mov_epi32(state, active, next);
}

// What an encoding loop keeps of one stream in registers.
struct Ebb {
    Pair state;
    __mmask16 active[2];

    KVSTORE_TARGET Ebb(StreamEncoder& stream, int lanes)
        : state(load_reversed(stream.states())),
          active{static_cast<__mmask16>(last_lanes(lanes)), static_cast<__mmask16>(last_lanes(lanes) >> kHalf)} {}
};

template <int N>
KVSTORE_TARGET inline void value_steps_back(const Alphabet& alphabet, const EncodeValueJob* jobs, int steps) {
    const u32* const codes = alphabet.table->codes.data();
    const __m512i escapes = words_of(static_cast<i16>(alphabet.escape));
    Ebb ebb[2]{{*jobs[0].stream, jobs[0].lanes->count}, {*jobs[N - 1].stream, jobs[N - 1].lanes->count}};
    Pair offset[N];
    __m512i add[N];
    for (int n = 0; n < N; ++n) {
        offset[n] = load_reversed(jobs[n].lanes->codes);
        add[n] = reversed_words(_mm512_loadu_si512(jobs[n].lanes->add.data()));
    }
    for (int step = steps; step-- > 0;) {
        for (int n = 0; n < N; ++n) {
            StreamEncoder& stream = *jobs[n].stream;
            stream.reserve_step();
            const __m512i value = reversed_words(_mm512_loadu_si512(jobs[n].tile + step * kLanes));
            const __m512i distance = alphabet.falling ? _mm512_sub_epi16(add[n], value) : _mm512_sub_epi16(value, add[n]);
            const Pair symbol = widen(_mm512_min_epu16(distance, escapes));
            Pair code;
            for (int h = 0; h < 2; ++h) {
                const __mmask16 active = ebb[n].active[h];
                code.half[h] = _mm512_mask_i32gather_epi32(_mm512_set1_epi32(1), active,
                                                           _mm512_add_epi32(offset[n].half[h], symbol.half[h]), codes, 4);
                const __mmask16 escaped =
                    _mm512_mask_cmpeq_epi32_mask(active, symbol.half[h], _mm512_set1_epi32(alphabet.escape)) |
                    _mm512_mask_testn_epi32_mask(active, code.half[h], _mm512_set1_epi32(0xFFFF));  // of frequency 0
                if (__builtin_expect(escaped != 0, 0)) {
                    code.half[h] = _mm512_mask_i32gather_epi32(
                        code.half[h], escaped, _mm512_add_epi32(offset[n].half[h], _mm512_set1_epi32(alphabet.escape)), codes, 4);
                    push(stream, escaped, widen(value).half[h]);
                }
            }
            for (int h = 0; h < 2; ++h)
                ebb[n].state.half[h] =
                    put(stream, ebb[n].state.half[h], ebb[n].active[h],
                        _mm512_and_si512(code.half[h], _mm512_set1_epi32(0xFFFF)), _mm512_srli_epi32(code.half[h], 16));
        }
    }
    for (int n = 0; n < N; ++n) store_reversed(*jobs[n].stream, ebb[n].state);
}

KVSTORE_TARGET void encode_values(const Alphabet& alphabet, std::span<const EncodeValueJob> jobs, int steps) {
    if (jobs.size() == 2) value_steps_back<2>(alphabet, jobs.data(), steps);
    else value_steps_back<1>(alphabet, jobs.data(), steps);
}

// value / 3 to the nearest integer: (|value| + 1) · 21846 / 2^16 is exact below 2^15.
KVSTORE_TARGET inline __m512i third_of(__m512i value) {
    const __m512i above = _mm512_add_epi16(_mm512_abs_epi16(value), words_of(1));
    const __m512i magnitude = _mm512_mulhi_epu16(above, words_of(21846));
    return _mm512_mask_sub_epi16(magnitude, _mm512_movepi16_mask(value), _mm512_setzero_si512(), magnitude);
}

template <int N>
KVSTORE_TARGET inline void digit_steps_back(const EncodeDigitJob* jobs, int steps) {
    const __m512i zero = _mm512_setzero_si512(), one = words_of(1), all = words_of(static_cast<i16>(kSlots));
    const DigitStarts starts[2]{DigitStarts(*jobs[0].lanes), DigitStarts(*jobs[N - 1].lanes)};
    Ebb ebb[2]{{*jobs[0].stream, jobs[0].lanes->count}, {*jobs[N - 1].stream, jobs[N - 1].lanes->count}};
    for (int step = steps; step-- > 0;) {
        for (int n = 0; n < N; ++n) {
            StreamEncoder& stream = *jobs[n].stream;
            stream.reserve_step();
            const __m512i value = _mm512_loadu_si512(jobs[n].tile + step * kLanes), coarse = third_of(value);
            __m512i second, third;
            starts[n].of(coarse, second, third);
            __m512i digit = _mm512_sub_epi16(value, _mm512_add_epi16(coarse, _mm512_add_epi16(coarse, coarse)));
            digit = _mm512_mask_sub_epi16(digit, _mm512_movepi16_mask(coarse), zero, digit);
            const __mmask32 middle = _mm512_cmpeq_epi16_mask(digit, zero), high = _mm512_cmpeq_epi16_mask(digit, one);
            const __m512i start = _mm512_mask_mov_epi16(_mm512_maskz_mov_epi16(middle, second), high, third);
            const __m512i end = _mm512_mask_mov_epi16(_mm512_mask_mov_epi16(second, middle, third), high, all);
            // A lane that the block does not have must not divide by zero: its frequency is made 1.
            const __m512i frequency = _mm512_max_epu16(_mm512_sub_epi16(end, start), one);
            const Pair f = widen(reversed_words(frequency)), s = widen(reversed_words(start));
            for (int h = 0; h < 2; ++h)
                ebb[n].state.half[h] = put(stream, ebb[n].state.half[h], ebb[n].active[h], f.half[h], s.half[h]);
        }
    }
    for (int n = 0; n < N; ++n) store_reversed(*jobs[n].stream, ebb[n].state);
}

KVSTORE_TARGET void encode_digits(std::span<const EncodeDigitJob> jobs, int steps) {
    if (jobs.size() == 2) digit_steps_back<2>(jobs.data(), steps);
    else digit_steps_back<1>(jobs.data(), steps);
}

KVSTORE_TARGET void coarsen(i16* tile) {
    for (int i = 0; i < kTile; i += kLanes) _mm512_storeu_si512(tile + i, third_of(_mm512_loadu_si512(tile + i)));
}

// Five rounds of pairwise interleaving: 16-, 32- and 64-bit within 128-bit quarters, then the quarters themselves.
KVSTORE_TARGET void transpose(const i16* const* in, i16* const* out) {
    __m512i a[32], b[32];
    for (int i = 0; i < 32; ++i) a[i] = _mm512_loadu_si512(in[i]);
    for (int i = 0; i < 32; i += 2) {
        b[i] = _mm512_unpacklo_epi16(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi16(a[i], a[i + 1]);
    }
    for (int i = 0; i < 32; i += 4)
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm512_unpacklo_epi32(b[i + j], b[i + 2 + j]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi32(b[i + j], b[i + 2 + j]);
        }
    for (int i = 0; i < 32; i += 8)
        for (int j = 0; j < 4; ++j) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 4 + j]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 4 + j]);
        }
    // b[8g + c]: quarter q holds rows 8g…8g+7 of column 8q + c.
    for (int c = 0; c < 8; ++c) {
        const __m512i low01 = _mm512_shuffle_i64x2(b[c], b[8 + c], 0x44), high01 = _mm512_shuffle_i64x2(b[c], b[8 + c], 0xEE);
        const __m512i low23 = _mm512_shuffle_i64x2(b[16 + c], b[24 + c], 0x44);
        const __m512i high23 = _mm512_shuffle_i64x2(b[16 + c], b[24 + c], 0xEE);
        _mm512_storeu_si512(out[c], _mm512_shuffle_i64x2(low01, low23, 0x88));
        _mm512_storeu_si512(out[8 + c], _mm512_shuffle_i64x2(low01, low23, 0xDD));
        _mm512_storeu_si512(out[16 + c], _mm512_shuffle_i64x2(high01, high23, 0x88));
        _mm512_storeu_si512(out[24 + c], _mm512_shuffle_i64x2(high01, high23, 0xDD));
    }
}

// What 32 components need to become floats, kept in registers for all rows of a window.
struct Grid32 {
    Pair step, mean, one, two, more;
    KVSTORE_TARGET Grid32(const GridView& grid, std::size_t low, std::size_t high)
        : step{pair(grid.step, low, high)}, mean{pair(grid.mean, low, high)}, one{pair(grid.shrink[0], low, high)},
          two{pair(grid.shrink[1], low, high)}, more{pair(grid.shrink[2], low, high)} {}
    KVSTORE_TARGET static Pair pair(const float* from, std::size_t low, std::size_t high) {
        return {{_mm512_loadu_si512(from + low), _mm512_loadu_si512(from + high)}};
    }
    // row_loops.inl's `dequantised`, operation by operation; `which` half.
    KVSTORE_TARGET __m512 half(int which, __m256i narrow, __mmask16 some, __mmask16 second, __mmask16 third) const {
        const __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(narrow));
        const __m512i less = _mm512_mask_mov_epi32(_mm512_mask_mov_epi32(one.half[which], second, two.half[which]), third,
                                                   more.half[which]);
        const __m512 sign = _mm512_and_ps(value, _mm512_set1_ps(-0.0f));
        const __m512 nearer = _mm512_mask_sub_ps(value, some, value, _mm512_xor_ps(_mm512_castsi512_ps(less), sign));
        return _mm512_add_ps(_mm512_mul_ps(nearer, _mm512_castsi512_ps(step.half[which])),
                             _mm512_castsi512_ps(mean.half[which]));
    }
    KVSTORE_TARGET void operator()(__m512i values, __m512& low, __m512& high) const {
        const __m512i magnitude = _mm512_abs_epi16(values);
        const __mmask32 some = _mm512_test_epi16_mask(values, values);
        const __mmask32 second = _mm512_cmpgt_epu16_mask(magnitude, words_of(1));
        const __mmask32 third = _mm512_cmpgt_epu16_mask(magnitude, words_of(2));
        low = half(0, _mm512_castsi512_si256(values), static_cast<__mmask16>(some), static_cast<__mmask16>(second),
                   static_cast<__mmask16>(third));
        high = half(1, _mm512_extracti64x4_epi64(values, 1), static_cast<__mmask16>(some >> kHalf),
                    static_cast<__mmask16>(second >> kHalf), static_cast<__mmask16>(third >> kHalf));
    }
};

// 32 bfloat16s: row_loops.inl's `bfloat16_of`, by the CPU's own conversion where it has one.
template <bool Native>
KVSTORE_TARGET inline __m512i to_bfloat16(__m512 low, __m512 high) {
    if constexpr (Native) {
        // vcvtne2ps2bf16 zmm, zmm, zmm: spelt out, since the functions here are not compiled for AVX512_BF16
        __m512i packed;
        __asm__("vcvtne2ps2bf16 %2, %1, %0" : "=v"(packed) : "v"(high), "v"(low));
        return packed;
    }
    Pair words;
    const __m512 halves_of[2] = {low, high};
    for (int h = 0; h < 2; ++h) {
        const __m512i word = _mm512_castps_si512(halves_of[h]);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
        const __mmask16 normal = _mm512_test_epi32_mask(word, _mm512_set1_epi32(0x7F800000));
        const __m512i zero = _mm512_and_si512(word, _mm512_set1_epi32(static_cast<int>(0x80000000u)));
        words.half[h] =
            _mm512_mask_add_epi32(zero, normal, _mm512_add_epi32(word, _mm512_set1_epi32(0x7FFF)), odd);
    }
    return halves(words, true);
}

template <bool Native>
KVSTORE_TARGET void restore_bfloat16_wide(const RowWindow& window, std::size_t count, const GridView& grid) {
    const auto steps = static_cast<std::size_t>(window.steps);
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Grid32 floats(grid, i, i + kHalf);
        for (std::size_t t = 0; t < steps; ++t) {
            __m512 low, high;
            floats(_mm512_loadu_si512(window.values + t * window.stride + i), low, high);
            _mm512_storeu_si512(window.rows[t] + 2 * i, to_bfloat16<Native>(low, high));
        }
    }
    for (std::size_t t = 0; t < steps && i < count; ++t)
        restore_row(window.values + t * window.stride + i, count - i, grid.from(i), window.rows[t] + 2 * i);
}

template <bool Native>
KVSTORE_TARGET void restore_rotated_bfloat16_wide(const RowWindow& window, std::size_t heads, std::size_t pairs,
                                                  const GridView& grid) {
    if (pairs % kHalf != 0) return restore_rotated_bfloat16(window, heads, pairs, grid);
    for (std::size_t head = 0; head < heads; ++head)
        for (std::size_t i = 0; i < pairs; i += kHalf) {
            const std::size_t first = 2 * pairs * head + i, second = first + pairs;
            const Grid32 floats(grid, first, second);
            for (std::size_t t = 0; t < static_cast<std::size_t>(window.steps); ++t) {
                const i16* values = window.values + t * window.stride;
                const __m512i both = _mm512_inserti64x4(
                    _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + first))),
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + second)), 1);
                __m512 a, b;
                floats(both, a, b);
                const __m512 c = _mm512_loadu_ps(window.cos[t] + i), s = _mm512_loadu_ps(window.sin[t] + i);
                const __m512i packed = to_bfloat16<Native>(_mm512_sub_ps(_mm512_mul_ps(a, c), _mm512_mul_ps(b, s)),
                                                           _mm512_add_ps(_mm512_mul_ps(b, c), _mm512_mul_ps(a, s)));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(window.rows[t] + 2 * first), _mm512_castsi512_si256(packed));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(window.rows[t] + 2 * second), _mm512_extracti64x4_epi64(packed, 1));
            }
        }
}

}  // namespace
}  // namespace avx512

const Kernels* avx512_kernels() {
    using namespace avx512;
    static constexpr Kernels plain{"avx512", true, decode_values, decode_digits, encode_values, encode_digits, coarsen, transpose,
                                   bfloat16_to_float, float_to_bfloat16, dequantise, quantise, rotate, accumulate, below,
                                   energy, join_bfloat16, split_bfloat16,
                                   restore_bfloat16_wide<false>, restore_rotated_bfloat16_wide<false>, avx2::hash_blocks};
    static constexpr Kernels native = [] {
        Kernels table = plain;
        table.restore_bfloat16 = restore_bfloat16_wide<true>;
        table.restore_rotated_bfloat16 = restore_rotated_bfloat16_wide<true>;
        return table;
    }();
    const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx2");
    return !supported ? nullptr : __builtin_cpu_supports("avx512bf16") ? &native : &plain;
}

}  // namespace kvstore

#else

namespace kvstore {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace kvstore

#endif
