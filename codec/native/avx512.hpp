// Whole blocks by AVX-512: the arithmetic of StreamDecoder and StreamEncoder, 16 lanes an instruction.
//
// Everything is an integer (or a quotient of integers that a double holds exactly), so the results are those of the
// scalar code, whose checks stay in charge of whatever is unusual.
#pragma once

#include <array>

#include "rans.hpp"

namespace kvstore::avx512 {

// Whether this build has it and this CPU can run it.
bool supported();

// A whole block: where each lane's component begins in `values`, and its tokens.
template <class Value>
struct WholeBlock {
    Value* values;
    std::array<i32, kLanes> bases;
    std::span<const u32> tokens;
};

// Decoders stop where a step might run short of words (the last tokens of a stream) and return how many tokens they
// have decoded; the rest is the caller's.

// Entering components: `slots` by full tables (rans.hpp), lane l's at `offsets[l]`; a symbol is value + `bias`, and
// `escape` stands for a raw word.
std::size_t decode_values(StreamDecoder& stream, const WholeBlock<i32>& block, const u32* slots,
                          const std::array<i32, kLanes>& offsets, int bias, int escape);

// Refinement digits: `frequencies` of three symbols a row; lane l uses row `rows[l]` + min(|coarse value|, 2).
std::size_t decode_digits(StreamDecoder& stream, const WholeBlock<i32>& block, const u16* frequencies,
                          const std::array<u16, kLanes>& rows);

// Encoders code all tokens, backwards. `codes` is SlotTable's; an entering value is at most ±`value_max` as a symbol,
// at most ±`raw_max` as a raw word.
void encode_values(StreamEncoder& stream, const WholeBlock<const i32>& block, const u32* codes,
                   const std::array<i32, kLanes>& offsets, int value_max, int raw_max, int escape);
void encode_digits(StreamEncoder& stream, const WholeBlock<const i32>& block, const u32* codes,
                   const std::array<u16, kLanes>& rows);

}  // namespace kvstore::avx512
