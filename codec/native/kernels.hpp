// The inner loops, one table of functions per instruction set; all of them compute the same bits.
//
// READ ME FIRST
//  * Scalar code defines each function. Vector code reads up to 128 bytes ahead, at a stream's end from a copy with zeros
//    after it; it checks bounds once a step, and whether it went beyond them at the end of a window.
//  * A tile is 32 tokens × 32 lanes of i16, 64-byte aligned. Lanes that a block does not have hold anything.
//  * Values are 16-bit two's complement and wrap: only hostile bytes make them.
//  * Float loops are the same source compiled for each instruction set (row_loops.inl). No fused multiply-add, no
//    reordering, so vector width does not matter.
//  * Vector code lives in functions marked for their instruction set, never in whole files compiled for it: inline
//    library functions emitted there could be linked into code that runs everywhere.
#pragma once

#include "float_bits.hpp"
#include "near_symbols.hpp"

// Before a loop whose outputs overlap none of its inputs, which pointers inside a GridView cannot say.
#if defined(__clang__)
#define KVSTORE_NO_ALIAS _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define KVSTORE_NO_ALIAS _Pragma("GCC ivdep")
#else
#define KVSTORE_NO_ALIAS
#endif

namespace kvstore {

// What a value's symbol means: value = add + symbol, or add − symbol where `falling`; `escape` stands for a raw word.
struct Alphabet {
    const SlotTable* table = nullptr;
    const NearSymbols* near = nullptr;
    int centre = 0;
    int escape = 0;
    bool falling = false;
};

// The lanes of a block where it enters: where each lane's table lies, and its `add`. Unused lanes are zero.
struct alignas(64) ValueLanes {
    std::array<i32, kLanes> slots{};  // in SlotTable::slots
    std::array<i32, kLanes> codes{};  // in SlotTable::codes
    std::array<i16, kLanes> add{};
    int count = 0;
};

// The lanes of a block where it is refined: where the second and third digit start, by the magnitude of the coarse value.
struct alignas(64) DigitLanes {
    std::array<std::array<u16, kLanes>, 3> second{}, third{};
    int count = 0;
};

// `near`: the lanes' NearRows, transposed, where `reach` (of the lane that needs most) is not 0.
struct ValueJob {
    StreamDecoder* stream;
    const ValueLanes* lanes;
    const i16* near;
    int reach;
    i16* tile;
};
struct DigitJob {
    StreamDecoder* stream;
    const DigitLanes* lanes;
    i16* tile;
};

// How a row of integers becomes floats: (value less its shrinkage) · step + mean, an array of each.
struct GridView {
    const float* step;
    const float* mean;
    const float* shrink[3];  // of magnitude 1, 2, 3 and more

    GridView from(std::size_t first) const {
        return {step + first, mean + first, {shrink[0] + first, shrink[1] + first, shrink[2] + first}};
    }
};

// `steps` rows of integers, `stride` apart, with where each goes and the angles of its token.
struct RowWindow {
    const i16* values;
    std::size_t stride;
    int steps;
    std::array<u8*, kWindow> rows;
    std::array<const float*, kWindow> cos, sin;
};

struct EncodeValueJob {
    StreamEncoder* stream;
    const ValueLanes* lanes;
    const i16* tile;
};
struct EncodeDigitJob {
    StreamEncoder* stream;
    const DigitLanes* lanes;
    const i16* tile;
};

inline constexpr int kTile = kLanes * static_cast<int>(kWindow);
inline constexpr float kValueLimit = 32760;  // on the finest grid: 16 bits, and its thirds refine to no more

// What a large copy does: stores around the caches spare reading memory that is about to be overwritten.
enum class Stores { cached, around_caches };

struct Kernels {
    const char* name;
    bool compares;  // whether `decode_values` makes use of near symbols

    // `steps` tokens of one block, or of two blocks of different streams in lockstep.
    Status (*decode_values)(const Alphabet& alphabet, std::span<const ValueJob> jobs, int steps);
    Status (*decode_digits)(std::span<const DigitJob> jobs, int steps);
    // Backwards: the last of `steps` tokens first. Digits are of the tile's values, which stay as they are.
    void (*encode_values)(const Alphabet& alphabet, std::span<const EncodeValueJob> jobs, int steps);
    void (*encode_digits)(std::span<const EncodeDigitJob> jobs, int steps);
    // Every value of a tile becomes its third, to the nearest integer.
    void (*coarsen)(i16* tile);
    // out[j][i] = in[i][j] for 32 rows of 32.
    void (*transpose)(const i16* const* in, i16* const* out);

    // Rows of `count` elements.
    void (*bfloat16_to_float)(const u8* row, std::size_t count, float* out);
    void (*float_to_bfloat16)(const float* values, std::size_t count, u8* row);
    void (*dequantise)(const i16* values, std::size_t count, const GridView& grid, float* out);
    // round((x − mean) · inverse), clamped to ±kValueLimit; ties to even.
    void (*quantise)(const float* values, std::size_t count, const float* mean, const float* inverse, i16* out);
    // One head's pairs (first[i], second[i]), by `direction` 1 or −1.
    void (*rotate)(float* first, float* second, const float* cos, const float* sin, std::size_t pairs, float direction);
    // sum += x, square += x², peak = max(peak, |x|), in double.
    void (*accumulate)(const float* values, std::size_t count, double* sum, double* square, float* peak);
    // Whether every |x| < limit (a NaN is not).
    bool (*below)(const float* values, std::size_t count, float limit);
    // Sum of squares in double: 16 lanes (index mod 16) in order, then halves (reference/numerics.py sum_rows).
    double (*energy)(const float* values, std::size_t count);
    // bits = sign and mantissa (w = 8 bits, one byte each) under exponents; OR of all exponents.
    u16 (*join_bfloat16)(const i16* exponents, const u8* plain, std::size_t count, u8* row);
    void (*split_bfloat16)(const u8* row, std::size_t count, i16* exponents, u8* plain);
    // A window of rows: dequantised, as bfloat16; of keys, rotated by head in pairs (i, i + pairs) before.
    void (*restore_bfloat16)(const RowWindow& window, std::size_t count, const GridView& grid);
    void (*restore_rotated_bfloat16)(const RowWindow& window, std::size_t heads, std::size_t pairs, const GridView& grid);

    // `blocks` blocks of 1024 bytes into the 8 lanes of XXH3 (xxh3.hpp); copies them to `to` if it is not null.
    void (*hash_blocks)(u64* lanes, const u8* from, std::size_t blocks, u8* to, Stores stores);
};

namespace scalar {
void hash_blocks(u64* lanes, const u8* from, std::size_t blocks, u8* to, Stores stores);
}
namespace avx2 {
void hash_blocks(u64* lanes, const u8* from, std::size_t blocks, u8* to, Stores stores);
}

enum class Isa : int { scalar = 0, avx2, avx512 };

// Null where this build or this CPU has no such instructions.
const Kernels* kernels_for(Isa isa);
const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace kvstore
