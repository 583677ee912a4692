#include "blocks.hpp"

#include <utility>

namespace kvstore {
namespace {

using T = LossyTables;

int shift(int level) { return T::kLevelShift[static_cast<std::size_t>(level)]; }

std::size_t row_at(i32 scale, int level) { return static_cast<std::size_t>(std::min(scale + shift(level), T::kScales - 1)); }

ValueLanes value_lanes(const LossyTables& tables, const Block& block, std::span<const i32> scales) {
    ValueLanes lanes;
    lanes.count = block.lanes;
    for (std::size_t l = 0; l < static_cast<std::size_t>(block.lanes); ++l) {
        const std::size_t row = row_at(scales[block.components[l]], block.level);
        lanes.slots[l] = static_cast<i32>(row * kSlots);
        lanes.codes[l] = static_cast<i32>(row * tables.values.symbols);
        lanes.add[l] = -T::kValueMax;
    }
    return lanes;
}

DigitLanes digit_lanes(const LossyTables& tables, const Block& block, std::span<const i32> scales, int level) {
    DigitLanes lanes;
    lanes.count = block.lanes;
    for (std::size_t l = 0; l < static_cast<std::size_t>(block.lanes); ++l)
        for (std::size_t magnitude = 0; magnitude < 3; ++magnitude) {
            const std::size_t row = 3 * row_at(scales[block.components[l]], level - 1) + magnitude;
            const u16* frequencies = tables.digits.freq.data() + 3 * row;
            lanes.second[magnitude][l] = frequencies[0];
            lanes.third[magnitude][l] = static_cast<u16>(frequencies[0] + frequencies[1]);
        }
    return lanes;
}

void add_blocks(std::vector<Block>& blocks, std::span<const i32> scales, int level) {
    // A counting sort by row.
    std::array<std::size_t, T::kScales> next{};
    const auto enters = [&](i32 scale) {
        return scale + shift(level) >= T::kScaleCodedMin && (level == 0 || scale + shift(level - 1) < T::kScaleCodedMin);
    };
    for (const i32 scale : scales)
        if (enters(scale)) ++next[row_at(scale, level)];
    std::size_t entering = 0;
    for (std::size_t& count : next) count = std::exchange(entering, entering + count);
    const std::size_t before = blocks.size();
    blocks.resize(before + (entering + kLanes - 1) / kLanes, Block{{}, kLanes, level});
    if (entering % kLanes != 0) blocks.back().lanes = static_cast<int>(entering % kLanes);
    for (std::size_t c = 0; c < scales.size(); ++c) {
        if (!enters(scales[c])) continue;
        const std::size_t place = next[row_at(scales[c], level)]++;
        blocks[before + place / kLanes].components[place % kLanes] = static_cast<u32>(c);
    }
}

}  // namespace

i64 ClassPlan::lanes_at(int level) const {
    i64 lanes = 0;
    for (std::size_t b = 0; b < counts[static_cast<std::size_t>(level)]; ++b) lanes += blocks[b].lanes;
    return lanes;
}

ClassPlan plan_class(const LossyTables& tables, std::span<const i32> scales, int levels) {
    ClassPlan plan;
    for (int level = 0; level < levels; ++level) {
        const auto q = static_cast<std::size_t>(level);
        plan.digits[q].reserve(plan.blocks.size());
        for (const Block& block : plan.blocks) plan.digits[q].push_back(digit_lanes(tables, block, scales, level));
        const std::size_t entered = plan.blocks.size();
        add_blocks(plan.blocks, scales, level);
        plan.values.reserve(plan.blocks.size());
        for (std::size_t b = entered; b < plan.blocks.size(); ++b)
            plan.values.push_back(value_lanes(tables, plan.blocks[b], scales));
        plan.counts[q] = plan.blocks.size();
    }
    return plan;
}

}  // namespace kvstore
