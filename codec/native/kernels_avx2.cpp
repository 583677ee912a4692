// AVX2. READ ME FIRST: kernels.hpp.
//
//  * 32 lanes of 16 bits are two vectors, in order. Of 32 bits they are four, in the order in which unpacking 16-bit words
//    leaves them and packing takes them: of each 16 lanes, one has 0–3 and 8–11, the other 4–7 and 12–15.
//  * Lanes that a block does not have are computed with the others, but take and give no words, and the state of the
//    stream keeps theirs. What they hold is in range for a table and meaningless.
//  * Reads past a step: at most 128 bytes of the stream, or of the copy of its tail (rans.hpp); 32 words of room
//    in an encoder, which reserve_step makes.
#include "kernels.hpp"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>

namespace kvstore {
namespace avx2 {
namespace {

#define KVSTORE_TARGET __attribute__((target("avx2,popcnt,bmi,bmi2")))
#include "row_loops.inl"

constexpr int kHalf = 16;

struct Words {
    __m256i half[2];
};
struct Quad {
    __m256i part[4];
};

KVSTORE_TARGET inline __m256i words_of(i16 value) { return _mm256_set1_epi16(value); }

KVSTORE_TARGET inline __m256i load_vector(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

KVSTORE_TARGET inline void store_vector(void* to, __m256i vector) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), vector);
}

KVSTORE_TARGET inline __m128i load_short(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

KVSTORE_TARGET inline Words load_words(const void* from) {
    const auto* at = static_cast<const i16*>(from);
    return {{load_vector(at), load_vector(at + kHalf)}};
}

KVSTORE_TARGET inline Quad load_quad(const void* from) {
    const auto* at = static_cast<const i32*>(from);
    Quad lanes;
    for (int h = 0; h < 2; ++h) {
        const __m256i low = load_vector(at + kHalf * h), high = load_vector(at + kHalf * h + 8);
        lanes.part[2 * h] = _mm256_permute2x128_si256(low, high, 0x20);
        lanes.part[2 * h + 1] = _mm256_permute2x128_si256(low, high, 0x31);
    }
    return lanes;
}

KVSTORE_TARGET inline void store_quad(std::array<u32, kLanes>& to, const Quad& lanes) {
    for (int h = 0; h < 2; ++h) {
        const __m256i a = lanes.part[2 * h], b = lanes.part[2 * h + 1];
        store_vector(to.data() + kHalf * h, _mm256_permute2x128_si256(a, b, 0x20));
        store_vector(to.data() + kHalf * h + 8, _mm256_permute2x128_si256(a, b, 0x31));
    }
}

// 32 lanes below 2^16, as words.
KVSTORE_TARGET inline Words narrow(const Quad& lanes) {
    return {{_mm256_packus_epi32(lanes.part[0], lanes.part[1]), _mm256_packus_epi32(lanes.part[2], lanes.part[3])}};
}

KVSTORE_TARGET inline Quad widen(const Words& words) {
    const __m256i zero = _mm256_setzero_si256();
    return {{_mm256_unpacklo_epi16(words.half[0], zero), _mm256_unpackhi_epi16(words.half[0], zero),
             _mm256_unpacklo_epi16(words.half[1], zero), _mm256_unpackhi_epi16(words.half[1], zero)}};
}

// Sets of lanes come as bytes of lanes 0–7, 16–23, 8–15, 24–31: the order in which packing to bytes leaves them.
KVSTORE_TARGET inline u32 set_of(__m256i bytes) { return static_cast<u32>(_mm256_movemask_epi8(bytes)); }

KVSTORE_TARGET inline u32 set_of(const Quad& masks) {
    return set_of(_mm256_packs_epi16(_mm256_packs_epi32(masks.part[0], masks.part[1]),
                                     _mm256_packs_epi32(masks.part[2], masks.part[3])));
}

// A set with its bytes in the lanes' order, and back.
inline u32 reordered(u32 set) { return (set & 0xFF0000FFu) | (set >> 8 & 0xFF00u) | (set & 0xFF00u) << 8; }

KVSTORE_TARGET inline u32 words_in(u32 set) { return static_cast<u32>(_mm_popcnt_u32(set)); }

inline u32 first_lanes(int count) { return count == kLanes ? ~0u : (1u << count) - 1; }

// Byte shuffles of eight words, by the set of lanes concerned; 0x80 makes a zero.
using Shuffles = std::array<std::array<u8, 16>, 256>;

// The first words go to the lanes of the set, in order.
constexpr Shuffles expanding() {
    Shuffles shuffles{};
    for (std::size_t set = 0; set < 256; ++set) {
        std::size_t from = 0;
        for (std::size_t lane = 0; lane < 8; ++lane) {
            const bool has = (set >> lane & 1) != 0;
            for (std::size_t byte = 0; byte < 2; ++byte)
                shuffles[set][2 * lane + byte] = static_cast<u8>(has ? 2 * from + byte : 0x80);
            from += has;
        }
    }
    return shuffles;
}

// The set's words come first, of its last lane first.
constexpr Shuffles collecting() {
    Shuffles shuffles{};
    for (std::size_t set = 0; set < 256; ++set) {
        for (u8& byte : shuffles[set]) byte = 0x80;
        std::size_t to = 0;
        for (std::size_t lane = 8; lane-- > 0;) {
            if ((set >> lane & 1) == 0) continue;
            for (std::size_t byte = 0; byte < 2; ++byte) shuffles[set][2 * to + byte] = static_cast<u8>(2 * lane + byte);
            ++to;
        }
    }
    return shuffles;
}

alignas(64) constexpr Shuffles kExpanding = expanding();
alignas(64) constexpr Shuffles kCollecting = collecting();

// What a decoding loop keeps of one stream in registers.
struct Flow {
    Quad state;
    Quad empty;  // the upper half of a state that needs a word: 0, or −1 (never) of a lane that the block does not have
    const u8* at;
    const u8* last;  // a step may start before here

    KVSTORE_TARGET Flow(StreamDecoder& stream, int lanes)
        : state(load_quad(stream.states().data())), at(stream.position()), last(stream.limit()) {
        std::array<i32, kLanes> never;
        for (int lane = 0; lane < kLanes; ++lane) never[static_cast<std::size_t>(lane)] = lane < lanes ? 0 : -1;
        empty = load_quad(never.data());
    }
    // False where the stream was too short.
    KVSTORE_TARGET bool store(StreamDecoder& stream, int lanes) const {
        std::array<u32, kLanes> states;
        store_quad(states, state);
        std::copy_n(states.begin(), lanes, stream.states().begin());
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
    // Lanes below 2^16 take the next words, in lane order.
    KVSTORE_TARGET inline void refill() {
        Quad low;
        for (int p = 0; p < 4; ++p) low.part[p] = _mm256_cmpeq_epi32(_mm256_srli_epi32(state.part[p], 16), empty.part[p]);
        const u32 set = set_of(low);
        const u8* const from[4]{at, after(set & 0xFFu), after(set & 0xFF00FFu), after(set & 0xFFFFFFu)};
        const u32 sets[4]{set & 0xFFu, set >> 16 & 0xFFu, set >> 8 & 0xFFu, set >> 24};
        Words words;
        for (int h = 0; h < 2; ++h) {
            const int i = 2 * h;
            words.half[h] = _mm256_shuffle_epi8(
                both(from[i], from[i + 1]), both(kExpanding[sets[i]].data(), kExpanding[sets[i + 1]].data()));
        }
        const Quad wide = widen(words);
        for (int p = 0; p < 4; ++p) {
            const __m256i shift = _mm256_and_si256(low.part[p], _mm256_set1_epi32(16));
            state.part[p] = _mm256_or_si256(_mm256_sllv_epi32(state.part[p], shift), wide.part[p]);
        }
        at = after(set);
    }

  private:
    KVSTORE_TARGET inline const u8* after(u32 set) const { return at + 2 * words_in(set); }
    KVSTORE_TARGET static inline __m256i both(const u8* low, const u8* high) {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(load_short(low)), load_short(high), 1);
    }
};

// Raw words replace the values of escaped lanes, in lane order: rare. Returns where they end; taking a reference to where
// they begin would keep the caller's Flow out of registers.
__attribute__((noinline)) const u8* take_raw(u32 escaped, i16* row, const u8* at) {
    for (; escaped != 0; escaped &= escaped - 1, at += 2) row[std::countr_zero(escaped)] = load<i16>(at);
    return at;
}

KVSTORE_TARGET inline __m128i gather4(const u32* from, __m128i index) {
    const auto first = static_cast<u64>(_mm_cvtsi128_si64(index)), second = static_cast<u64>(_mm_extract_epi64(index, 1));
    const auto at = [from](u64 place) { return static_cast<int>(from[place]); };
    __m128i entries = _mm_cvtsi32_si128(at(first & 0xFFFFFFFFu));
    entries = _mm_insert_epi32(entries, at(first >> 32), 1);
    entries = _mm_insert_epi32(entries, at(second & 0xFFFFFFFFu), 2);
    return _mm_insert_epi32(entries, at(second >> 32), 3);
}

// Eight loads: on Zen 4 a sixth quicker than the instruction, which is microcode there, and slowed by microcode on the
// Intel CPUs that leak through it (CVE-2022-40982).
KVSTORE_TARGET inline __m256i gather(const u32* from, __m256i index) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(gather4(from, _mm256_castsi256_si128(index))),
                                   gather4(from, _mm256_extracti128_si256(index, 1)), 1);
}

// Runs `loop` on the streams of a job or two, held in registers.
template <class Job, class Loop>
KVSTORE_TARGET inline Status decode_with(std::span<const Job> jobs, int steps, const Loop& loop) {
    const auto flow_of = [](const Job& job) KVSTORE_TARGET { return Flow(*job.stream, job.lanes->count); };
    const auto stored = [steps](const Flow& flow, const Job& job, int done) KVSTORE_TARGET {
        return flow.store(*job.stream, job.lanes->count) && done == steps;
    };
    bool whole;
    if (jobs.size() == 2) {
        Flow flow[2]{flow_of(jobs[0]), flow_of(jobs[1])};
        const int done = loop(std::integral_constant<int, 2>(), flow);
        whole = stored(flow[0], jobs[0], done);
        whole = stored(flow[1], jobs[1], done) && whole;
    } else {
        Flow flow = flow_of(jobs[0]);
        whole = stored(flow, jobs[0], loop(std::integral_constant<int, 1>(), &flow));
    }
    return whole ? Status::ok : Status::stream_ends_early;
}

template <int N, bool Falling>
KVSTORE_TARGET inline int value_steps(const u32* slots, int escape, Flow* flow, const ValueJob* jobs, int steps) {
    const __m256i low12 = _mm256_set1_epi32(static_cast<int>(kSlots - 1));
    const __m256i escapes = _mm256_set1_epi8(static_cast<char>(escape));
    Quad offset[N];
    Words add[N];
    u32 lanes[N];
    for (int n = 0; n < N; ++n) {
        offset[n] = load_quad(jobs[n].lanes->slots.data());
        add[n] = load_words(jobs[n].lanes->add.data());
        lanes[n] = reordered(first_lanes(jobs[n].lanes->count));
    }
    int step = 0;
    for (; step < steps; ++step) {
        bool room = flow[0].has_room(*jobs[0].stream);
        if constexpr (N == 2) room = room && flow[1].has_room(*jobs[1].stream);
        if (!room) break;
        for (int n = 0; n < N; ++n) {
            Quad entry, symbol;
            for (int p = 0; p < 4; ++p) {
                const __m256i slot = _mm256_and_si256(flow[n].state.part[p], low12);
                entry.part[p] = gather(slots, _mm256_add_epi32(offset[n].part[p], slot));
            }
            for (int p = 0; p < 4; ++p) {
                const __m256i less = _mm256_and_si256(_mm256_srli_epi32(entry.part[p], kSlotBits), low12);  // frequency − 1
                const __m256i kept = _mm256_srli_epi32(flow[n].state.part[p], kSlotBits);
                const __m256i bias = _mm256_and_si256(entry.part[p], low12);
                flow[n].state.part[p] = _mm256_add_epi32(_mm256_mullo_epi32(less, kept), _mm256_add_epi32(kept, bias));
                symbol.part[p] = _mm256_srli_epi32(entry.part[p], 24);
            }
            flow[n].refill();
            const Words symbols = narrow(symbol);
            i16* const row = jobs[n].tile + step * kLanes;
            for (int h = 0; h < 2; ++h)
                store_vector(row + kHalf * h, Falling ? _mm256_sub_epi16(add[n].half[h], symbols.half[h])
                                                      : _mm256_add_epi16(add[n].half[h], symbols.half[h]));
            const __m256i bytes = _mm256_packus_epi16(symbols.half[0], symbols.half[1]);
            const u32 escaped = set_of(_mm256_cmpeq_epi8(bytes, escapes)) & lanes[n];
            if (__builtin_expect(escaped != 0, 0)) flow[n].at = take_raw(reordered(escaped), row, flow[n].at);
        }
    }
    return step;
}

template <bool Falling>
KVSTORE_TARGET Status decode_values_as(const Alphabet& alphabet, std::span<const ValueJob> jobs, int steps) {
    return decode_with(jobs, steps, [&](auto count, Flow* flow) KVSTORE_TARGET {
        return value_steps<count(), Falling>(alphabet.table->slots.data(), alphabet.escape, flow, jobs.data(), steps);
    });
}

KVSTORE_TARGET Status decode_values(const Alphabet& alphabet, std::span<const ValueJob> jobs, int steps) {
    return alphabet.falling ? decode_values_as<true>(alphabet, jobs, steps) : decode_values_as<false>(alphabet, jobs, steps);
}

// second[0], third[0] where the coarse value is 0, [1] where it is ±1, [2] beyond.
struct DigitStarts {
    Words second[3], third[3];
    KVSTORE_TARGET explicit DigitStarts(const DigitLanes& lanes) {
        for (std::size_t m = 0; m < 3; ++m) {
            second[m] = load_words(lanes.second[m].data());
            third[m] = load_words(lanes.third[m].data());
        }
    }
    // Of half `h` of the lanes.
    KVSTORE_TARGET void of(int h, __m256i coarse, __m256i& second_start, __m256i& third_start) const {
        const __m256i magnitude = _mm256_abs_epi16(coarse);
        const __m256i some = _mm256_cmpgt_epi16(magnitude, _mm256_setzero_si256());
        const __m256i large = _mm256_cmpgt_epi16(magnitude, words_of(1));
        second_start = choose(choose(second[0].half[h], some, second[1].half[h]), large, second[2].half[h]);
        third_start = choose(choose(third[0].half[h], some, third[1].half[h]), large, third[2].half[h]);
    }
    KVSTORE_TARGET static inline __m256i choose(__m256i otherwise, __m256i mask, __m256i value) {
        return _mm256_blendv_epi8(otherwise, value, mask);
    }
};

// `digit`, negated where `coarse` is negative.
KVSTORE_TARGET inline __m256i mirrored(__m256i digit, __m256i coarse) {
    return _mm256_sign_epi16(digit, _mm256_or_si256(coarse, words_of(1)));
}

KVSTORE_TARGET inline __m256i tripled(__m256i coarse) {
    return _mm256_add_epi16(coarse, _mm256_add_epi16(coarse, coarse));
}

// Where digit 0…2 starts and how often it is: `middle` and `high` tell the second and the third.
KVSTORE_TARGET inline void digit_span(__m256i second, __m256i third, __m256i middle, __m256i high, __m256i& start,
                                      __m256i& frequency) {
    const __m256i all = words_of(static_cast<i16>(kSlots));
    start = DigitStarts::choose(_mm256_and_si256(middle, second), high, third);
    const __m256i end = DigitStarts::choose(DigitStarts::choose(second, middle, third), high, all);
    frequency = _mm256_sub_epi16(end, start);
}

template <int N>
KVSTORE_TARGET inline int digit_steps(Flow* flow, const DigitJob* jobs, int steps) {
    const __m256i low12 = _mm256_set1_epi32(static_cast<int>(kSlots - 1));
    const DigitStarts starts[2]{DigitStarts(*jobs[0].lanes), DigitStarts(*jobs[N - 1].lanes)};
    int step = 0;
    for (; step < steps; ++step) {
        bool room = flow[0].has_room(*jobs[0].stream);
        if constexpr (N == 2) room = room && flow[1].has_room(*jobs[1].stream);
        if (!room) break;
        for (int n = 0; n < N; ++n) {
            i16* const row = jobs[n].tile + step * kLanes;
            Quad slot;
            for (int p = 0; p < 4; ++p) slot.part[p] = _mm256_and_si256(flow[n].state.part[p], low12);
            const Words slots = narrow(slot);
            Words frequencies, biases;
            for (int h = 0; h < 2; ++h) {
                const __m256i coarse = load_vector(row + kHalf * h);
                __m256i second, third, start;
                starts[n].of(h, coarse, second, third);
                const __m256i beyond = _mm256_add_epi16(slots.half[h], words_of(1));
                const __m256i middle = _mm256_cmpgt_epi16(beyond, second), high = _mm256_cmpgt_epi16(beyond, third);
                digit_span(second, third, middle, high, start, frequencies.half[h]);
                biases.half[h] = _mm256_sub_epi16(slots.half[h], start);
                const __m256i digit = _mm256_sub_epi16(_mm256_sub_epi16(words_of(-1), middle), high);
                store_vector(row + kHalf * h, _mm256_add_epi16(tripled(coarse), mirrored(digit, coarse)));
            }
            const Quad frequency = widen(frequencies), bias = widen(biases);
            for (int p = 0; p < 4; ++p) {
                const __m256i kept = _mm256_srli_epi32(flow[n].state.part[p], kSlotBits);
                flow[n].state.part[p] = _mm256_add_epi32(_mm256_mullo_epi32(frequency.part[p], kept), bias.part[p]);
            }
            flow[n].refill();
        }
    }
    return step;
}

KVSTORE_TARGET Status decode_digits(std::span<const DigitJob> jobs, int steps) {
    return decode_with(jobs, steps,
                       [&](auto count, Flow* flow) KVSTORE_TARGET { return digit_steps<count()>(flow, jobs.data(), steps); });
}

// What an encoding loop keeps of its stream in registers.
struct Source {
    StreamEncoder& stream;
    Quad state;
    u32 active;  // the set of lanes that the block has
    int lanes;

    KVSTORE_TARGET Source(StreamEncoder& to, int count)
        : stream(to), state(load_quad(to.states().data())), active(reordered(first_lanes(count))), lanes(count) {}
    KVSTORE_TARGET void store() const {
        std::array<u32, kLanes> states;
        store_quad(states, state);
        std::copy_n(states.begin(), lanes, stream.states().begin());
    }
    // StreamEncoder::put of all lanes.
    KVSTORE_TARGET inline void put(const Quad& frequency, const Quad& start) {
        Quad fits, word;
        for (int p = 0; p < 4; ++p) {
            fits.part[p] = _mm256_cmpgt_epi32(frequency.part[p], _mm256_srli_epi32(state.part[p], 20));
            word.part[p] = _mm256_and_si256(state.part[p], _mm256_set1_epi32(0xFFFF));
        }
        push(~set_of(fits) & active, narrow(word));
        for (int p = 0; p < 4; ++p) {
            const __m256i shift = _mm256_andnot_si256(fits.part[p], _mm256_set1_epi32(16));
            state.part[p] = advance(_mm256_srlv_epi32(state.part[p], shift), frequency.part[p], start.part[p]);
        }
    }

  private:
    // The words of a set of lanes, of its last lane first.
    KVSTORE_TARGET inline void push(u32 set, const Words& words) {
        u16* const to = stream.room();
        const auto give = [to, set](u32 after, u32 lanes8, __m128i words8) KVSTORE_TARGET {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + words_in(set & after)),
                             _mm_shuffle_epi8(words8, load_short(kCollecting[lanes8].data())));
        };
        give(0, set >> 24, _mm256_extracti128_si256(words.half[1], 1));
        give(0xFF000000u, set >> 8 & 0xFFu, _mm256_castsi256_si128(words.half[1]));
        give(0xFF00FF00u, set >> 16 & 0xFFu, _mm256_extracti128_si256(words.half[0], 1));
        give(0xFFFFFF00u, set & 0xFFu, _mm256_castsi256_si128(words.half[0]));
        stream.added(words_in(set));
    }
    // (⌊x / f⌋ << 12) + x mod f + start for x < 2^20 · f. Float32 knows the quotient, or one less: with y = 2⌊x / 2⌋ + 1,
    // which is x or x + 1, four roundings of 2^-24 each and a factor 1 − 2^-22 keep y / f below itself, so below
    // ⌊x / f⌋ + 1, and above x / f − 2^20 · 2^-21.
    KVSTORE_TARGET static inline __m256i advance(__m256i x, __m256i f, __m256i start) {
        const __m256 inverse = _mm256_div_ps(_mm256_set1_ps(0x1.fffff8p0f), _mm256_cvtepi32_ps(f));
        const __m256 half = _mm256_add_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(x, 1)), _mm256_set1_ps(0.5f));
        const __m256i quotient = _mm256_cvttps_epi32(_mm256_mul_ps(half, inverse));
        const __m256i rest = _mm256_sub_epi32(x, _mm256_mullo_epi32(quotient, f));
        const __m256i gap = _mm256_sub_epi32(_mm256_set1_epi32(static_cast<int>(kSlots)), f);
        const __m256i one_more = _mm256_andnot_si256(_mm256_cmpgt_epi32(f, rest), gap);
        const __m256i next = _mm256_add_epi32(_mm256_slli_epi32(quotient, kSlotBits), _mm256_add_epi32(rest, start));
        return _mm256_add_epi32(next, one_more);
    }
};

// Raw words of escaped lanes, the last lane first, and the escape's code in the place of theirs: rare.
__attribute__((noinline)) void give_raw(u32 escaped, StreamEncoder& stream, const Alphabet& alphabet, const ValueLanes& lanes,
                                        const i16* row, std::array<u32, kLanes>& codes) {
    while (escaped != 0) {
        const auto lane = static_cast<std::size_t>(31 - std::countl_zero(escaped));
        escaped &= ~(1u << lane);
        stream.put_raw(static_cast<u16>(row[lane]));
        codes[lane] = alphabet.table->codes[static_cast<std::size_t>(lanes.codes[lane] + alphabet.escape)];
    }
}

KVSTORE_TARGET void encode_block_values(StreamEncoder& stream, const Alphabet& alphabet, const ValueLanes& lanes, const i16* tile,
                                  int steps) {
    const u32* const codes = alphabet.table->codes.data();
    const Quad offset = load_quad(lanes.codes.data());
    const Words add = load_words(lanes.add.data());
    const __m256i limit = words_of(static_cast<i16>(alphabet.escape));
    const __m256i escapes = _mm256_set1_epi8(static_cast<char>(alphabet.escape)), low16 = _mm256_set1_epi32(0xFFFF);
    Source source(stream, lanes.count);
    for (int step = steps; step-- > 0;) {
        stream.reserve_step();
        const i16* const row = tile + step * kLanes;
        Words symbols;
        for (int h = 0; h < 2; ++h) {
            const __m256i value = load_vector(row + kHalf * h);
            const __m256i distance =
                alphabet.falling ? _mm256_sub_epi16(add.half[h], value) : _mm256_sub_epi16(value, add.half[h]);
            symbols.half[h] = _mm256_min_epu16(distance, limit);
        }
        const Quad symbol = widen(symbols);
        Quad code, frequency, start;
        for (int p = 0; p < 4; ++p) {
            code.part[p] = gather(codes, _mm256_add_epi32(offset.part[p], symbol.part[p]));
            frequency.part[p] = _mm256_and_si256(code.part[p], low16);
        }
        const Words frequencies = narrow(frequency);
        const __m256i at_escape = _mm256_cmpeq_epi8(_mm256_packus_epi16(symbols.half[0], symbols.half[1]), escapes);
        const __m256i never = _mm256_cmpeq_epi8(_mm256_packus_epi16(frequencies.half[0], frequencies.half[1]),
                                                _mm256_setzero_si256());
        const u32 escaped = set_of(_mm256_or_si256(at_escape, never)) & source.active;
        if (__builtin_expect(escaped != 0, 0)) {
            std::array<u32, kLanes> replaced;
            store_quad(replaced, code);
            give_raw(reordered(escaped), stream, alphabet, lanes, row, replaced);
            code = load_quad(replaced.data());
            for (int p = 0; p < 4; ++p) frequency.part[p] = _mm256_and_si256(code.part[p], low16);
        }
        for (int p = 0; p < 4; ++p) start.part[p] = _mm256_srli_epi32(code.part[p], 16);
        source.put(frequency, start);
    }
    source.store();
}

// value / 3 to the nearest integer: (|value| + 1) · 21846 / 2^16 is exact up to 2^15.
KVSTORE_TARGET inline __m256i third_of(__m256i value) {
    const __m256i above = _mm256_add_epi16(_mm256_abs_epi16(value), words_of(1));
    return _mm256_sign_epi16(_mm256_mulhi_epu16(above, words_of(21846)), value);
}

KVSTORE_TARGET void encode_block_digits(StreamEncoder& stream, const DigitLanes& lanes, const i16* tile, int steps) {
    const DigitStarts starts(lanes);
    Source source(stream, lanes.count);
    for (int step = steps; step-- > 0;) {
        stream.reserve_step();
        Words frequencies, begins;
        for (int h = 0; h < 2; ++h) {
            const __m256i value = load_vector(tile + step * kLanes + kHalf * h), coarse = third_of(value);
            __m256i second, third;
            starts.of(h, coarse, second, third);
            const __m256i digit = mirrored(_mm256_sub_epi16(value, tripled(coarse)), coarse);
            digit_span(second, third, _mm256_cmpeq_epi16(digit, _mm256_setzero_si256()), _mm256_cmpeq_epi16(digit, words_of(1)),
                       begins.half[h], frequencies.half[h]);
        }
        source.put(widen(frequencies), widen(begins));
    }
    source.store();
}

void encode_values(const Alphabet& alphabet, std::span<const EncodeValueJob> jobs, int steps) {
    for (const EncodeValueJob& job : jobs) encode_block_values(*job.stream, alphabet, *job.lanes, job.tile, steps);
}

void encode_digits(std::span<const EncodeDigitJob> jobs, int steps) {
    for (const EncodeDigitJob& job : jobs) encode_block_digits(*job.stream, *job.lanes, job.tile, steps);
}

KVSTORE_TARGET void coarsen(i16* tile) {
    for (int i = 0; i < kTile; i += kHalf) store_vector(tile + i, third_of(load_vector(tile + i)));
}

// 16 rows of 8 columns at a time, eight rows in each half of a vector: three rounds of pairwise interleaving.
KVSTORE_TARGET void transpose(const i16* const* in, i16* const* out) {
    for (int row = 0; row < kLanes; row += kHalf)
        for (int column = 0; column < kLanes; column += 8) {
            __m256i a[8], b[8];
            for (int i = 0; i < 8; ++i)
                a[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load_short(in[row + i] + column)),
                                               load_short(in[row + 8 + i] + column), 1);
            for (int i = 0; i < 4; ++i) {
                b[2 * i] = _mm256_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = _mm256_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
            }
            for (int i = 0; i < 8; i += 4)
                for (int j = 0; j < 2; ++j) {
                    a[i + 2 * j] = _mm256_unpacklo_epi32(b[i + j], b[i + 2 + j]);
                    a[i + 2 * j + 1] = _mm256_unpackhi_epi32(b[i + j], b[i + 2 + j]);
                }
            for (int j = 0; j < 4; ++j) {
                store_vector(out[column + 2 * j] + row, _mm256_unpacklo_epi64(a[j], a[4 + j]));
                store_vector(out[column + 2 * j + 1] + row, _mm256_unpackhi_epi64(a[j], a[4 + j]));
            }
        }
}

}  // namespace
}  // namespace avx2

const Kernels* avx2_kernels() {
    using namespace avx2;
    static constexpr Kernels table{"avx2", false, decode_values, decode_digits, encode_values, encode_digits, coarsen, transpose,
                                   bfloat16_to_float, float_to_bfloat16, dequantise, quantise, rotate, accumulate, below,
                                   energy, join_bfloat16, split_bfloat16,
                                   restore_bfloat16, restore_rotated_bfloat16, hash_blocks};
    const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt") &&
                           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    return supported ? &table : nullptr;
}

}  // namespace kvstore

#else

namespace kvstore {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace kvstore

#endif
