// The exact codec (FORMAT.md §5, reference/lossless.py): exponents through shared tables, the other bits as they are.
//
// READ ME FIRST
//  * Works on bits only; no float is ever formed, so NaN payloads and signed zeros survive.
//  * Exponents pass through the same windows and streams as the lossy codec's values; an escape's word is checked
//    against the dtype's range after the fact, by the OR of all of them.
#pragma once

#include "window_streams.hpp"

namespace kvstore {

struct LosslessTables {
    static constexpr int kTables = 40, kSymbols = 64, kEscape = 63, kBasesTried = 3;
    static constexpr i64 kEscapeCost = 16 << 8;

    SlotTable exponents;
    NearSymbols near;
    std::vector<i32> costs;  // [40, 64], 1/256 bit, for choosing a table
};

class LosslessCodec {
  public:
    LosslessCodec(LosslessTables tables, const Kernels& kernels);

    Bytes encode(std::span<const PlaneView> planes, Dtype dtype, Workspace& workspace) const;
    Status decode(ByteView payload, std::span<const PlaneView> planes, Dtype dtype, Workspace& workspace) const;

  private:
    struct Choice {
        u8 table = 0, base = 0;
    };

    Choice choose(const u32* histogram) const;
    ClassPlan plan(std::span<const u8> tables, std::span<const u8> bases) const;
    Alphabet alphabet() const { return {&tables_.exponents, &tables_.near, 0, LosslessTables::kEscape, true}; }

    LosslessTables tables_;
    const Kernels& kernels_;
    std::vector<i64> cost_columns_;  // tables_.costs by symbol, then table
};

}  // namespace kvstore
