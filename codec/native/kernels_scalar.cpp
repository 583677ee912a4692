#include "kernels.hpp"

namespace kvstore {
namespace scalar {
namespace {

#define KVSTORE_TARGET
#include "row_loops.inl"
#undef KVSTORE_TARGET

std::size_t magnitude_class(i16 value) {
    const i16 magnitude = static_cast<i16>(value < 0 ? -value : value);  // −2^15 stays negative and counts as 0
    return magnitude < 0 ? 0 : static_cast<std::size_t>(std::min<i16>(magnitude, 2));
}

// value / 3 to the nearest integer; never a tie.
i16 third(i16 value) { return static_cast<i16>(value < 0 ? -((1 - value) / 3) : (value + 1) / 3); }

Status decode_block_values(const Alphabet& alphabet, const ValueJob& job, int steps) {
    const ValueLanes& lanes = *job.lanes;
    std::array<u8, kLanes> symbols;
    for (int step = 0; step < steps; ++step) {
        if (!job.stream->step(lanes.count, alphabet.table->slots.data(), lanes.slots.data(), symbols.data()))
            return Status::stream_ends_early;
        i16* const row = job.tile + step * kLanes;
        for (int lane = 0; lane < lanes.count; ++lane) {
            const auto l = static_cast<std::size_t>(lane);
            if (symbols[l] == alphabet.escape) {
                u16 word = 0;
                if (!job.stream->raw(word)) return Status::stream_ends_early;
                row[lane] = static_cast<i16>(word);
            } else {
                row[lane] = static_cast<i16>(alphabet.falling ? lanes.add[l] - symbols[l] : lanes.add[l] + symbols[l]);
            }
        }
    }
    return Status::ok;
}

Status decode_block_digits(const DigitJob& job, int steps) {
    const DigitLanes& lanes = *job.lanes;
    std::array<u8, kLanes> symbols;
    std::array<u16, kLanes> second{}, third_start{};
    for (int step = 0; step < steps; ++step) {
        i16* const row = job.tile + step * kLanes;
        for (int lane = 0; lane < lanes.count; ++lane) {
            const auto l = static_cast<std::size_t>(lane);
            const std::size_t magnitude = magnitude_class(row[lane]);
            second[l] = lanes.second[magnitude][l];
            third_start[l] = lanes.third[magnitude][l];
        }
        if (!job.stream->step3(lanes.count, second.data(), third_start.data(), symbols.data()))
            return Status::stream_ends_early;
        for (int lane = 0; lane < lanes.count; ++lane) {
            const int digit = symbols[static_cast<std::size_t>(lane)] - 1, coarse = row[lane];
            row[lane] = static_cast<i16>(3 * coarse + (coarse < 0 ? -digit : digit));
        }
    }
    return Status::ok;
}

Status decode_values(const Alphabet& alphabet, std::span<const ValueJob> jobs, int steps) {
    for (const ValueJob& job : jobs)
        if (const Status status = decode_block_values(alphabet, job, steps); status != Status::ok) return status;
    return Status::ok;
}

Status decode_digits(std::span<const DigitJob> jobs, int steps) {
    for (const DigitJob& job : jobs)
        if (const Status status = decode_block_digits(job, steps); status != Status::ok) return status;
    return Status::ok;
}

void encode_block_values(StreamEncoder& stream, const Alphabet& alphabet, const ValueLanes& lanes, const i16* tile, int steps) {
    const SlotTable& table = *alphabet.table;
    for (int step = steps; step-- > 0;) {
        stream.reserve_step();
        std::array<std::size_t, kLanes> code;
        for (int lane = lanes.count; lane-- > 0;) {
            const auto l = static_cast<std::size_t>(lane);
            const i16 value = tile[step * kLanes + lane];
            const int distance = alphabet.falling ? lanes.add[l] - value : value - lanes.add[l];
            const auto row = static_cast<std::size_t>(lanes.codes[l]);
            int symbol = distance >= 0 && distance < alphabet.escape ? distance : alphabet.escape;
            if (table.freq[row + static_cast<std::size_t>(symbol)] == 0) symbol = alphabet.escape;
            if (symbol == alphabet.escape) stream.put_raw(static_cast<u16>(value));
            code[l] = row + static_cast<std::size_t>(symbol);
        }
        for (int lane = lanes.count; lane-- > 0;) {
            const std::size_t at = code[static_cast<std::size_t>(lane)];
            stream.put(lane, table.freq[at], table.start[at]);
        }
    }
}

void encode_block_digits(StreamEncoder& stream, const DigitLanes& lanes, const i16* tile, int steps) {
    for (int step = steps; step-- > 0;) {
        stream.reserve_step();
        for (int lane = lanes.count; lane-- > 0;) {
            const auto l = static_cast<std::size_t>(lane);
            const i16 value = tile[step * kLanes + lane], coarse = third(value);
            const int digit = value - 3 * coarse, symbol = (coarse < 0 ? -digit : digit) + 1;
            const std::size_t row = magnitude_class(coarse);
            const u32 second = lanes.second[row][l], third_start = lanes.third[row][l];
            const u32 start = symbol == 0 ? 0 : symbol == 1 ? second : third_start;
            const u32 end = symbol == 0 ? second : symbol == 1 ? third_start : kSlots;
            stream.put(lane, end - start, start);
        }
    }
}

void encode_values(const Alphabet& alphabet, std::span<const EncodeValueJob> jobs, int steps) {
    for (const EncodeValueJob& job : jobs) encode_block_values(*job.stream, alphabet, *job.lanes, job.tile, steps);
}

void encode_digits(std::span<const EncodeDigitJob> jobs, int steps) {
    for (const EncodeDigitJob& job : jobs) encode_block_digits(*job.stream, *job.lanes, job.tile, steps);
}

void coarsen(i16* tile) {
    for (int i = 0; i < kTile; ++i) tile[i] = third(tile[i]);
}

void transpose(const i16* const* in, i16* const* out) {
    for (std::size_t i = 0; i < kLanes; ++i)
        for (std::size_t j = 0; j < kLanes; ++j) out[j][i] = in[i][j];
}

}  // namespace

}  // namespace scalar

const Kernels* scalar_kernels() {
    using namespace scalar;
    static constexpr Kernels table{"scalar", false, decode_values, decode_digits, encode_values, encode_digits, coarsen, transpose,
                                   bfloat16_to_float, float_to_bfloat16, dequantise, quantise, rotate, accumulate, below,
                                   energy, join_bfloat16, split_bfloat16,
                                   restore_bfloat16, restore_rotated_bfloat16, hash_blocks};
    return &table;
}

const Kernels* kernels_for(Isa isa) {
    switch (isa) {
        case Isa::avx512: return avx512_kernels();
        case Isa::avx2: return avx2_kernels();
        default: return scalar_kernels();
    }
}

}  // namespace kvstore
