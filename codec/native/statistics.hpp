// What the reader of a calibration-free plane must know, and how it is written (FORMAT.md §4.1; reference/statistics.py).
//
// READ ME FIRST
//  * Reading is bounded bit by bit; a Rice quotient ends after 15 ones, so no hostile string loops long.
//  * Mean steps are within ±2047, shifts within 31, so quanta stay below 2^100 and means are finite.
#pragma once

#include "blocks.hpp"

namespace kvstore {

struct Statistics {
    float step = 1;
    u8 mean_shift = 0;
    std::vector<i32> mean_steps;
    std::vector<i32> scale_ids;

    float quantum() const;
    float mean(std::size_t channel) const { return static_cast<float>(mean_steps[channel]) * quantum(); }
};

// Sums over a plane's plain tokens, and the largest magnitude of all its tokens that are coded.
struct PlaneSums {
    std::span<const double> sum, square;
    std::size_t tokens;
    float peak;
    bool drains;
};

// `levels`: quality layers to be coded.
Statistics measure(const LossyTables& tables, const PlaneSums& sums, double step_factor, int levels);

void write_statistics(Bytes& out, const Statistics& statistics);
// `at` moves past what was read.
Status read_statistics(ByteView payload, std::size_t channels, std::size_t& at, Statistics& statistics);

// Scale index at D/8 of the drain tokens of a channel (reference Statistics.drain_scales).
i32 drain_scale(const LossyTables& tables, i32 scale_id, i32 mean_steps, u8 mean_shift);

}  // namespace kvstore
