// Which components a quality layer codes, in which blocks of 32 (FORMAT.md §3, §4.3; reference/blocks.py).
//
// READ ME FIRST
//  * Scale indices come from side information: at most 63 + 12 + 13 in magnitude, so table rows are clamped, never
//    negative where a component is coded (coded means index ≥ 6).
//  * A block keeps its components for good: finer quality layers refine it as it is.
#pragma once

#include "kernels.hpp"

namespace kvstore {

struct LossyTables {
    static constexpr int kScales = 48, kValueMax = 127, kEscape = 255, kShrinkage = 4;
    static constexpr int kScaleIdOffset = 8, kScaleIdMax = 63, kScaleCodedMin = 6, kDrainShift = 12, kLevels = 3;
    static constexpr std::array<int, kLevels> kLevelShift{0, 6, 13};

    SlotTable values, digits;
    NearSymbols near;  // values
    std::vector<float> shrinkage;    // [48, 4]
    std::vector<double> thresholds;  // (σ/step)² from which a scale id is one more
    std::vector<double> variances;   // (σ/step)² that a scale id stands for

    Alphabet alphabet() const { return {&values, &near, kValueMax, kEscape, false}; }
    const float* shrinkage_of(int scale) const {
        return shrinkage.data() + kShrinkage * std::clamp(scale, 0, kScales - 1);
    }
};

struct Block {
    std::array<u32, kLanes> components;
    int lanes;
    int level;  // where it enters
};

// The blocks of one token class at quality layers 0…levels−1, with what their lanes need.
struct ClassPlan {
    std::vector<Block> blocks;  // in order of entry
    std::array<std::size_t, LossyTables::kLevels> counts{};  // how many of them quality layers 0…q code
    std::vector<ValueLanes> values;  // one a block
    std::array<std::vector<DigitLanes>, LossyTables::kLevels> digits;  // [q], q ≥ 1: one for each that layer q refines

    i64 lanes_at(int level) const;
};

// `scales`: of all components, at the base step.
ClassPlan plan_class(const LossyTables& tables, std::span<const i32> scales, int levels);

}  // namespace kvstore
