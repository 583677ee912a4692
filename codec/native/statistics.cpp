#include "statistics.hpp"

namespace kvstore {
namespace {

using T = LossyTables;

constexpr int kMeanMax = 2047, kMeanShiftMax = 31;
constexpr double kRmsMin = 0x1p-100, kDrainsFiner = 8;
// By quality layers, less one: 16 bits hold twice the peak on the finest grid.
constexpr std::array<double, 3> kStepToPeakMin{0x1p-13, 0x1p-12, 0x1p-10};
constexpr float kStepMax = 0x1p100f;  // also of a mean's unit: nothing decoded can overflow a float
constexpr double kRound = 0x1.8p52;  // added and taken off, it leaves the nearest integer (ties to even)
constexpr u32 kQuotientMax = 15;
constexpr int kParameters = 13, kIdRawBits = 7, kMeanRawBits = 12;

u32 fold(i32 value) { return value > 0 ? 2 * static_cast<u32>(value) - 1 : 2 * static_cast<u32>(-value); }
i32 unfold(u32 folded) { return folded & 1 ? static_cast<i32>((folded + 1) / 2) : -static_cast<i32>(folded / 2); }

int rice_parameter(std::span<const u32> folded, int raw_bits) {
    int best = 0;
    u64 best_cost = ~u64{0};
    for (int k = 0; k < kParameters; ++k) {
        u64 cost = 0;
        for (const u32 z : folded) {
            const u32 quotient = z >> k;
            cost += quotient < kQuotientMax ? quotient + 1 + static_cast<u32>(k) : kQuotientMax + static_cast<u32>(raw_bits);
        }
        if (cost < best_cost) best_cost = cost, best = k;
    }
    return best;
}

int exponent(double value) { return static_cast<int>(std::bit_cast<u64>(value) >> 52); }  // biased, of value ≥ 0

// How many of ascending `thresholds` are ≤ value. They grow by √2, so exponents say where to look.
i32 reached(std::span<const double> thresholds, double value) {
    const int guess = 2 * (exponent(value) - exponent(thresholds.front()));
    auto count = static_cast<std::size_t>(std::clamp(guess, 0, static_cast<int>(thresholds.size())));
    while (count < thresholds.size() && thresholds[count] <= value) ++count;
    while (count > 0 && thresholds[count - 1] > value) --count;
    return static_cast<i32>(count);
}

// Bits, least significant first.
class BitWriter {
  public:
    explicit BitWriter(Bytes& out) : out_(out) {}
    void put(u32 value, int bits) {
        held_ |= static_cast<u64>(value) << count_;
        for (count_ += bits; count_ >= 8; count_ -= 8, held_ >>= 8) out_.push_back(static_cast<u8>(held_));
    }
    void rice(u32 z, int k, int raw_bits) {
        const u32 quotient = z >> k;
        if (quotient < kQuotientMax) {
            put((1u << quotient) - 1, static_cast<int>(quotient) + 1);
            put(z & ((1u << k) - 1), k);
        } else {
            put((1u << kQuotientMax) - 1, kQuotientMax);
            put(z & ((1u << raw_bits) - 1), raw_bits);
        }
    }
    void finish() {
        if (count_ > 0) out_.push_back(static_cast<u8>(held_));
    }

  private:
    Bytes& out_;
    u64 held_ = 0;
    int count_ = 0;
};

class BitReader {
  public:
    explicit BitReader(ByteView bytes) : bytes_(bytes) {}
    bool rice(int k, int raw_bits, u32& z) {
        fill();
        const int ones = std::countr_one(held_);
        if (ones >= static_cast<int>(kQuotientMax)) {
            z = static_cast<u32>(held_ >> kQuotientMax & ((u64{1} << raw_bits) - 1));
            return take(static_cast<int>(kQuotientMax) + raw_bits);
        }
        z = static_cast<u32>(ones) << k | static_cast<u32>(held_ >> (ones + 1) & ((u64{1} << k) - 1));
        return take(ones + 1 + k);
    }
    std::size_t bytes_read() const { return at_ - static_cast<std::size_t>(count_) / 8; }

  private:
    // At least 56 bits, or all that are left; beyond them `held_` is zero. Never 64, so shifts by `count_` are sound.
    void fill() {
        if (bytes_.size() - at_ >= 8) {  // all at once: of the eight bytes, those that fit whole count
            held_ |= load<u64>(bytes_.data() + at_) << count_;
            const int more = (63 - count_) / 8;
            at_ += static_cast<std::size_t>(more);
            count_ += 8 * more;
            held_ &= ~u64{0} >> (64 - count_);
            return;
        }
        for (; count_ < 56 && at_ < bytes_.size(); count_ += 8) held_ |= static_cast<u64>(bytes_[at_++]) << count_;
    }
    bool take(int bits) {
        if (bits > count_) return false;
        held_ >>= bits;
        count_ -= bits;
        return true;
    }

    ByteView bytes_;
    std::size_t at_ = 0;
    u64 held_ = 0;
    int count_ = 0;
};

}  // namespace

float Statistics::quantum() const { return step * 0.25f * std::bit_cast<float>((127u + mean_shift) << 23); }

Statistics measure(const LossyTables& tables, const PlaneSums& sums, double step_factor, int levels) {
    const std::size_t channels = sums.sum.size();
    Statistics result;
    result.mean_steps.assign(channels, 0);
    result.scale_ids.assign(channels, 0);
    if (sums.tokens == 0 || channels == 0) return result;
    const double count = static_cast<double>(sums.tokens);
    std::vector<double> mean(channels), square(channels);
    LaneSum variance_sum;
    double mean_peak = 0;
    for (std::size_t c = 0; c < channels; ++c) {
        mean[c] = sums.sum[c] / count;
        square[c] = sums.square[c] / count;
        variance_sum.add(c, std::max(square[c] - mean[c] * mean[c], 0.0));
        mean_peak = std::max(mean_peak, std::fabs(mean[c]));
    }
    const double rms = std::sqrt(variance_sum.total() / static_cast<double>(channels));
    const double floor = sums.peak * kStepToPeakMin[static_cast<std::size_t>(levels - 1)] * (sums.drains ? kDrainsFiner : 1.0);
    result.step = std::max(static_cast<float>(step_factor * std::max(rms, kRmsMin)), static_cast<float>(floor));
    result.step = std::min(result.step, kStepMax);
    // A mean's unit is D/4; on fewer tokens a coarser one costs less than the bits it saves.
    result.mean_shift = sums.tokens <= 32 ? 2 : sums.tokens <= 64 ? 1 : 0;
    double quantum = static_cast<double>(result.step) * (0.25 * static_cast<double>(1u << result.mean_shift));
    while (mean_peak > quantum * kMeanMax) {
        ++result.mean_shift;
        quantum *= 2;
    }
    const double step_squared = static_cast<double>(result.step) * result.step;
    std::vector<double> thresholds(tables.thresholds);
    for (double& threshold : thresholds) threshold *= step_squared;
    for (std::size_t c = 0; c < channels; ++c) {
        const double steps = (mean[c] / quantum + kRound) - kRound;
        result.mean_steps[c] = static_cast<i32>(std::clamp(steps, -double{kMeanMax}, double{kMeanMax}));
        const double coded = result.mean(c);
        const double variance = std::max(square[c] - coded * (2.0 * mean[c] - coded), 0.0);
        result.scale_ids[c] = reached(thresholds, variance);
    }
    return result;
}

void write_statistics(Bytes& out, const Statistics& statistics) {
    const std::size_t channels = statistics.scale_ids.size();
    i32 base = 0;
    if (channels > 0) {
        std::vector<i32> sorted = statistics.scale_ids;
        const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>((channels - 1) / 2);
        std::nth_element(sorted.begin(), middle, sorted.end());
        base = *middle;
    }
    std::vector<u32> ids(channels), means(channels);
    for (std::size_t c = 0; c < channels; ++c) {
        ids[c] = fold(statistics.scale_ids[c] - base);
        means[c] = fold(statistics.mean_steps[c]);
    }
    const int id_k = rice_parameter(ids, kIdRawBits), mean_k = rice_parameter(means, kMeanRawBits);
    append(out, statistics.step);
    append(out, statistics.mean_shift);
    append(out, static_cast<u8>(base));
    append(out, static_cast<u8>(id_k));
    append(out, static_cast<u8>(mean_k));
    BitWriter writer(out);
    for (const u32 z : ids) writer.rice(z, id_k, kIdRawBits);
    for (const u32 z : means) writer.rice(z, mean_k, kMeanRawBits);
    writer.finish();
}

Status read_statistics(ByteView payload, std::size_t channels, std::size_t& at, Statistics& statistics) {
    if (payload.size() - at < 8) return Status::too_short;
    statistics.step = load<float>(payload.data() + at);
    statistics.mean_shift = payload[at + 4];
    const i32 base = payload[at + 5];
    const int id_k = payload[at + 6], mean_k = payload[at + 7];
    if (!(statistics.step >= 0x1p-126f && statistics.step <= kStepMax) || statistics.mean_shift > kMeanShiftMax ||
        statistics.quantum() > kStepMax)
        return Status::step_range;
    if (std::max(id_k, mean_k) >= kParameters) return Status::side_information;
    BitReader reader(payload.subspan(at + 8));
    statistics.scale_ids.resize(channels);
    statistics.mean_steps.resize(channels);
    u32 z = 0;
    bool sane = true;
    for (i32& id : statistics.scale_ids) {
        if (!reader.rice(id_k, kIdRawBits, z)) return Status::too_short;
        id = base + unfold(z);
        sane = sane && id >= 0 && id <= T::kScaleIdMax;
    }
    for (i32& mean : statistics.mean_steps) {
        if (!reader.rice(mean_k, kMeanRawBits, z)) return Status::too_short;
        mean = unfold(z);
        sane = sane && std::abs(mean) <= kMeanMax;
    }
    at += 8 + reader.bytes_read();
    return sane ? Status::ok : Status::side_information;
}

// A drain token lies near zero, so it is the mean away from the mean, whatever the channel's σ. All its components
// are coded, quiet channels too: an outlier there may be all that such a token holds.
i32 drain_scale(const LossyTables& tables, i32 scale_id, i32 mean_steps, u8 mean_shift) {
    const double mean = mean_steps * (0.25 * static_cast<double>(u32{1} << mean_shift));
    const double energy = tables.variances[static_cast<std::size_t>(scale_id)] + mean * mean;
    const i32 scale = reached(tables.thresholds, energy) - T::kScaleIdOffset + T::kDrainShift;
    return std::max(scale, i32{T::kScaleCodedMin});
}

}  // namespace kvstore
