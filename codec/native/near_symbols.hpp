// Decoding without a lookup in memory: the symbols around the likeliest, found by comparing a slot with their cumulative
// frequencies. A gather of 32 entries takes longer than a dozen comparisons of vectors, and tables of 16 KiB miss caches.
//
// READ ME FIRST
//  * Slots are counted from the first of the `centre` symbol: t = slot − start, width = its frequency. A rising alphabet's
//    frequencies are the same on both sides of the centre, so t < 0 is mirrored: d = −1 − t there, t − width elsewhere.
//  * Symbol centre ± k holds edges[k − 1] ≤ d < edges[k]; edges[0] = 0, and the centre itself has d < 0 (t < width).
//  * d ≥ edges[reach] is no near symbol: that step is looked up in SlotTable::slots.
#pragma once

#include "rans.hpp"

namespace kvstore {

// Of one table, 64 bytes; 32 of them transposed serve the lanes of a block.
struct NearRow {
    static constexpr std::size_t kEdges = 15, kReachMax = kEdges - 1;
    std::array<u16, kEdges> edges{};
    u16 start = 0;
    std::array<u16, kEdges> codes{};  // of centre ± k: k << 12 | (frequency − 1)
    u16 width = 0;
};
static_assert(sizeof(NearRow) == 2 * kLanes);

class NearSymbols {
  public:
    NearSymbols(const SlotTable& table, std::size_t centre, bool mirrored);
    const NearRow& row(std::size_t table) const { return rows_[table]; }
    // How many symbols to each side of the centre leave out few enough slots, an even number; 0: none do.
    int reach(std::size_t table) const { return reaches_[table]; }

  private:
    std::vector<NearRow> rows_;
    std::vector<int> reaches_;
};

}  // namespace kvstore
