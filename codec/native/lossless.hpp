// The exact codec (FORMAT.md §5, reference/lossless.py): exponents through shared tables, the other bits as they are.
//
// READ ME FIRST
//  * Works on bits only; no float is ever formed, so NaN payloads and signed zeros survive.
//  * Exponents are component-major while coding, like the lossy codec's values.
#pragma once

#include "rans.hpp"

namespace kvstore {

struct LosslessTables {
    static constexpr int kTables = 40, kSymbols = 64, kEscape = 63, kBasesTried = 3;
    static constexpr i64 kEscapeCost = 16 << 8;

    SlotTable exponents;
    std::vector<i32> costs;  // [40, 64], 1/256 bit, for choosing a table
};

class LosslessCodec {
  public:
    explicit LosslessCodec(LosslessTables tables);

    Bytes encode(std::span<const PlaneView> planes, Dtype dtype) const;
    Status decode(ByteView payload, std::span<const PlaneView> planes, Dtype dtype) const;

  private:
    struct Choice {
        u8 table = 0, base = 0;
    };
    struct Block {
        std::array<u32, kLanes> components;
        int lanes;
    };

    Choice choose(const u8* exponents, std::size_t tokens) const;
    static std::vector<Block> blocks(std::span<const u8> tables);
    Status decode_block(StreamDecoder& stream, const Block& block, std::span<const u8> tables, std::span<const u8> bases,
                        std::size_t tokens, int exponent_limit, std::vector<u8>& exponents) const;

    LosslessTables tables_;
    std::vector<i64> cost_columns_;  // tables_.costs by symbol, then table
};

}  // namespace kvstore
