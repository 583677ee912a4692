// Decoding of whole blocks by AVX-512: the arithmetic of StreamDecoder, 16 lanes an instruction.
#pragma once

#include <array>

#include "rans.hpp"

namespace kvstore::avx512 {

// Whether this build has it and this CPU can run it.
bool supported();

// A whole block: where each lane's component begins in `values`, and the tokens to decode.
struct WholeBlock {
    i32* values;
    std::array<i32, kLanes> bases;
    std::span<const u32> tokens;
};

// Both stop where a step might run short of words (the last tokens of a stream) and return how many tokens they have
// decoded; the rest is the caller's. Everything is an integer, so the result is that of the scalar code.

// Entering components: `slots` by full tables (rans.hpp), lane l's at `offsets[l]`; a symbol is value + `bias`, and
// `escape` stands for a raw word.
std::size_t decode_values(StreamDecoder& stream, const WholeBlock& block, const u32* slots,
                          const std::array<i32, kLanes>& offsets, int bias, int escape);

// Refinement digits: `frequencies` of three symbols a row; lane l uses row `rows[l]` + min(|coarse value|, 2).
std::size_t decode_digits(StreamDecoder& stream, const WholeBlock& block, const u16* frequencies,
                          const std::array<u16, kLanes>& rows);

}  // namespace kvstore::avx512
