#include "lossy.hpp"

#include <limits>

#include "avx512.hpp"

namespace kvstore {
namespace {

constexpr double kDrainKNorm = 0.6, kDrainVNorm = 0.5;
constexpr float kDrainScale = 0.125f;
constexpr int kMeanMax = 2047, kMeanShiftMax = 31, kRawMax = 32767;
constexpr double kRmsMin = 0x1p-100, kRmsToPeakMin = 0x1p-20, kRmsToPeakMinDrains = 0x1p-9, kMagnitudeMax = 0x1p100;
constexpr float kStepMax = 0x1p100f;  // also of a mean's unit: nothing decoded can overflow a float
constexpr float kRound = 0x1.8p23f;  // added and taken off, it leaves the nearest integer (ties to even) below 2^22
constexpr std::size_t kStatisticsBits = 18;
constexpr std::array<float, 3> kLevelDivisor{1, 3, 9};

// Distance between components in Values. The odd cache line keeps 32 lanes out of each other's cache sets.
std::size_t values_stride(std::size_t tokens) { return (tokens + 15) / 16 * 16 + 16; }


float level_step(float step, int level) { return step / kLevelDivisor[static_cast<std::size_t>(level)]; }

// value / 3 to the nearest integer; never a tie.
i32 third(i32 value) { return value < 0 ? -((1 - value) / 3) : (value + 1) / 3; }

std::size_t statistics_bytes(std::size_t channels) { return 5 + (channels * kStatisticsBits + 7) / 8; }

void append_bytes(Bytes& out, const u8* from, std::size_t count) { out.insert(out.end(), from, from + count); }

void write_statistics(Bytes& out, const Statistics& statistics) {
    append(out, statistics.step);
    append(out, statistics.mean_shift);
    const std::size_t channels = statistics.scale_ids.size(), at = out.size();
    out.resize(at + (channels * kStatisticsBits + 7) / 8);
    for (std::size_t channel = 0; channel < channels; ++channel) {
        const u32 packed = statistics.scale_ids[channel] | (static_cast<u32>(statistics.mean_steps[channel]) & 0xFFFu) << 6;
        const std::size_t bit = channel * kStatisticsBits;
        const u32 shifted = packed << bit % 8;  // at most 7 + 18 bits
        for (std::size_t i = 0; i * 8 < bit % 8 + kStatisticsBits; ++i)
            out[at + bit / 8 + i] |= static_cast<u8>(shifted >> 8 * i);
    }
}

void read_statistics(const u8* from, std::size_t channels, Statistics& statistics) {
    statistics.mean_steps.resize(channels);
    statistics.scale_ids.resize(channels);
    for (std::size_t channel = 0; channel < channels; ++channel) {
        const std::size_t bit = channel * kStatisticsBits;
        u32 window = 0;
        for (std::size_t i = 0; i * 8 < bit % 8 + kStatisticsBits; ++i)
            window |= static_cast<u32>(from[bit / 8 + i]) << 8 * i;
        const u32 packed = window >> bit % 8 & 0x3FFFFu;
        statistics.scale_ids[channel] = static_cast<u8>(packed & 63u);
        statistics.mean_steps[channel] = static_cast<i32>((packed >> 6) ^ 0x800u) - 0x800;
    }
}

}  // namespace

float Statistics::quantum() const { return step * 0.25f * std::bit_cast<float>((127u + mean_shift) << 23); }

TokenClasses classify(std::size_t tokens, std::size_t sinks, std::span<const u16> drains) {
    TokenClasses classes;
    classes.drains.assign(drains.begin(), drains.end());
    auto next = drains.begin();
    for (std::size_t token = sinks; token < tokens; ++token) {
        if (next != drains.end() && *next == token) ++next;
        else classes.plain.push_back(static_cast<u32>(token));
    }
    return classes;
}

std::vector<u16> drain_tokens(const PlaneView& k, const PlaneView& v, std::size_t sinks, Dtype dtype) {
    const std::size_t tokens = k.tokens;
    std::vector<bool> drain(tokens, false);
    for (const auto& [plane, limit] : {std::pair{&k, kDrainKNorm}, std::pair{&v, kDrainVNorm}}) {
        std::vector<float> row(plane->channels());
        std::vector<double> energy;
        for (std::size_t token = sinks; token < tokens; ++token) {
            row_to_float(plane->row(token), row.size(), dtype, row.data());
            LaneSum sum;
            for (std::size_t i = 0; i < row.size(); ++i) sum.add(i, static_cast<double>(row[i]) * row[i]);
            energy.push_back(sum.total());
        }
        if (energy.empty()) continue;
        std::vector<double> sorted = energy;
        std::sort(sorted.begin(), sorted.end());
        const double threshold = sorted[(sorted.size() - 1) / 2] * (limit * limit);
        for (std::size_t i = 0; i < energy.size(); ++i)
            if (energy[i] < threshold) drain[sinks + i] = true;
    }
    std::vector<u16> found;
    for (std::size_t token = 0; token < tokens; ++token)
        if (drain[token]) found.push_back(static_cast<u16>(token));
    if (found.size() == tokens - sinks) found.clear();
    return found;
}

// Up to 32 components in lockstep over the tokens of one class. `rows` are table rows: of `values` on entry, else of
// `digits`, to which min(|coarse value|, 2) is added.
struct LossyCodec::Block {
    std::array<u32, kLanes> components;
    std::array<u16, kLanes> rows;
    int lanes;
    bool entry, drain;

    // Of a whole block: where each lane's component begins in Values, and its table among tables of `entries`.
    std::array<i32, kLanes> starts(std::size_t stride) const {
        std::array<i32, kLanes> at;
        for (std::size_t l = 0; l < kLanes; ++l) at[l] = static_cast<i32>(components[l] * stride);
        return at;
    }
    std::array<i32, kLanes> tables(std::size_t entries) const {
        std::array<i32, kLanes> at;
        for (std::size_t l = 0; l < kLanes; ++l) at[l] = static_cast<i32>(rows[l] * entries);
        return at;
    }
};

Statistics LossyCodec::measure(const std::vector<float>& flat, std::size_t channels, const TokenClasses& classes,
                               double step_factor) const {
    const Tokens& plain = classes.plain;
    Statistics result;
    result.mean_steps.assign(channels, 0);
    result.scale_ids.assign(channels, 0);
    if (plain.empty() || channels == 0) {
        derive_scales(result);
        return result;
    }
    std::vector<double> mean(channels, 0.0), square(channels, 0.0);
    float peak = 0;
    for (const u32 token : plain) {
        const float* row = flat.data() + token * channels;
        for (std::size_t c = 0; c < channels; ++c) {
            const double x = row[c];
            mean[c] += x;
            square[c] += x * x;
            peak = std::max(peak, std::fabs(row[c]));
        }
    }
    const double count = static_cast<double>(plain.size());
    LaneSum variance_sum;
    double mean_peak = 0;
    for (std::size_t c = 0; c < channels; ++c) {
        mean[c] /= count;
        square[c] /= count;
        variance_sum.add(c, std::max(square[c] - mean[c] * mean[c], 0.0));
        mean_peak = std::max(mean_peak, std::fabs(mean[c]));
    }
    // Of the drain tokens only the peak counts: they are few, but one may be far out in another layer of its group.
    for (const u32 token : classes.drains)
        for (std::size_t c = 0; c < channels; ++c) peak = std::max(peak, std::fabs(flat[token * channels + c]));
    const double rms = std::sqrt(variance_sum.total() / static_cast<double>(channels));
    const double floor = peak * (classes.drains.empty() ? kRmsToPeakMin : kRmsToPeakMinDrains);
    result.step = static_cast<float>(step_factor * std::max({rms, floor, kRmsMin}));
    double quantum = static_cast<double>(result.step) * 0.25;
    while (mean_peak > quantum * kMeanMax) {
        ++result.mean_shift;
        quantum *= 2;
    }
    const double step_squared = static_cast<double>(result.step) * result.step;
    std::vector<double> thresholds(tables_.thresholds);
    for (double& threshold : thresholds) threshold *= step_squared;
    for (std::size_t c = 0; c < channels; ++c) {
        const double steps = std::nearbyint(mean[c] / quantum);
        result.mean_steps[c] = static_cast<i32>(std::clamp(steps, -double{kMeanMax}, double{kMeanMax}));
        const double coded = result.mean(c);
        const double variance = std::max(square[c] - coded * (2.0 * mean[c] - coded), 0.0);
        const auto above = std::upper_bound(thresholds.begin(), thresholds.end(), variance);
        result.scale_ids[c] = static_cast<u8>(above - thresholds.begin());
    }
    derive_scales(result);
    return result;
}

// A drain token lies near zero, so it is the mean away from the mean, whatever the channel's σ. All its components
// are coded, quiet channels too: an outlier there may be all that such a token holds.
void LossyCodec::derive_scales(Statistics& statistics) const {
    using T = LossyTables;
    const double unit = 0.25 * static_cast<double>(u32{1} << statistics.mean_shift);
    statistics.plain_scales.clear();
    statistics.drain_scales.clear();
    for (std::size_t c = 0; c < statistics.scale_ids.size(); ++c) {
        const int id = statistics.scale_ids[c];
        const double mean = statistics.mean_steps[c] * unit;
        const double energy = tables_.variances[static_cast<std::size_t>(id)] + mean * mean;
        const auto above = std::upper_bound(tables_.thresholds.begin(), tables_.thresholds.end(), energy);
        const int drain = static_cast<int>(above - tables_.thresholds.begin()) - T::kScaleIdOffset + T::kDrainShift;
        statistics.plain_scales.push_back(id - T::kScaleIdOffset);
        statistics.drain_scales.push_back(std::max(drain, T::kScaleCodedMin));
    }
}

std::vector<LossyCodec::Block> LossyCodec::blocks(std::span<const Statistics> statistics, int level, bool drains) {
    using T = LossyTables;
    std::vector<Block> out;
    std::array<std::vector<u32>, T::kScales> by_scale;
    for (int drain = 0; drain <= (drains ? 1 : 0); ++drain) {
        const int now_shift = T::kLevelShift[static_cast<std::size_t>(level)];
        const int before_shift = level > 0 ? T::kLevelShift[static_cast<std::size_t>(level - 1)] : 0;
        for (const bool entry : {true, false}) {
            if (!entry && level == 0) continue;
            for (auto& list : by_scale) list.clear();
            u32 component = 0;
            for (const Statistics& plane : statistics) {
                for (const int base : drain ? plane.drain_scales : plane.plain_scales) {
                    const u32 c = component++;
                    const bool before = level > 0 && base + before_shift >= T::kScaleCodedMin;
                    const int scale = base + (entry ? now_shift : before_shift);
                    if (entry ? before || scale < T::kScaleCodedMin : !before) continue;
                    by_scale[static_cast<std::size_t>(std::min(scale, T::kScales - 1))].push_back(c);
                }
            }
            Block block{{}, {}, 0, entry, drain != 0};
            for (std::size_t scale = 0; scale < by_scale.size(); ++scale) {
                for (const u32 component : by_scale[scale]) {
                    block.components[static_cast<std::size_t>(block.lanes)] = component;
                    block.rows[static_cast<std::size_t>(block.lanes)] = static_cast<u16>(entry ? scale : 3 * scale);
                    if (++block.lanes == kLanes) {
                        out.push_back(block);
                        block.lanes = 0;
                    }
                }
            }
            if (block.lanes > 0) out.push_back(block);
        }
    }
    return out;
}

// Backwards, as the encoder goes: the last token first.
void LossyCodec::encode_block(StreamEncoder& encoder, const Block& block, const Tokens& tokens, const Values& values,
                              std::size_t stride) const {
    using T = LossyTables;
    if (encode_by_vector(encoder, block, tokens, values, stride)) return;
    for (auto token = tokens.rbegin(); token != tokens.rend(); ++token) {
        encoder.reserve_step();
        std::array<u8, kLanes> symbol;
        std::array<u16, kLanes> row;
        for (int lane = block.lanes; lane-- > 0;) {
            const auto l = static_cast<std::size_t>(lane);
            const i32 value = values[block.components[l] * stride + *token];
            if (block.entry) {
                const i32 kept = std::clamp(value, -kRawMax, kRawMax);
                row[l] = block.rows[l];
                int s = std::abs(kept) <= T::kValueMax ? kept + T::kValueMax : T::kEscape;
                if (tables_.values.freq[row[l] * tables_.values.symbols + static_cast<std::size_t>(s)] == 0)
                    s = T::kEscape;
                symbol[l] = static_cast<u8>(s);
                if (s == T::kEscape) encoder.put_raw(static_cast<u16>(kept));
            } else {
                const i32 coarse = third(value);
                const i32 digit = value - 3 * coarse;
                row[l] = static_cast<u16>(block.rows[l] + std::min(std::abs(coarse), 2));
                symbol[l] = static_cast<u8>((coarse < 0 ? -digit : digit) + 1);
            }
        }
        const SlotTable& table = block.entry ? tables_.values : tables_.digits;
        for (int lane = block.lanes; lane-- > 0;) {
            const auto l = static_cast<std::size_t>(lane);
            const std::size_t at = row[l] * table.symbols + symbol[l];
            encoder.put(lane, table.freq[at], table.start[at]);
        }
    }
}

void LossyCodec::encode_streams(Bytes& out, const Values& values, std::size_t stride, std::span<const Statistics> statistics,
                                int level, const TokenClasses& classes) const {
    const std::vector<Block> coded = blocks(statistics, level, !classes.drains.empty());
    i64 symbols = 0;
    for (const Block& block : coded) symbols += block.lanes * static_cast<i64>(classes.of(block.drain).size());
    const auto encode = [&](std::size_t first, std::size_t last, StreamEncoder& encoder) {
        for (std::size_t index = last; index-- > first;)
            encode_block(encoder, coded[index], classes.of(coded[index].drain), values, stride);
    };
    join_streams(out, coded.size(), symbols, encode);
}

Status LossyCodec::encode(std::span<const CodedPlane> planes, std::span<const u16> drains, std::size_t sinks,
                          Dtype dtype, int levels, std::vector<Bytes>& payloads) const {
    const std::size_t tokens = planes.front().plane.tokens;
    const TokenClasses classes = classify(tokens, sinks, drains);
    const std::size_t stride = values_stride(tokens);
    const float limit = kRawMax * kLevelDivisor[static_cast<std::size_t>(levels - 1)];
    payloads.assign(static_cast<std::size_t>(levels), {});
    Bytes& side = payloads.front();
    append(side, u8{0});
    append(side, u8{0});
    append(side, static_cast<u16>(drains.size()));
    append_bytes(side, reinterpret_cast<const u8*>(drains.data()), drains.size_bytes());
    Values values;
    std::vector<Statistics> statistics;
    std::size_t first = 0;
    std::vector<float> flat;
    for (const CodedPlane& coded : planes) {
        const PlaneView& plane = coded.plane;
        const std::size_t channels = plane.channels();
        flat.assign(tokens * channels, 0.0f);
        for (std::size_t token = sinks; token < tokens; ++token) {
            float* row = flat.data() + token * channels;
            row_to_float(plane.row(token), channels, dtype, row);
            bool sane = true;
            for (std::size_t c = 0; c < channels; ++c) sane &= std::fabs(row[c]) < static_cast<float>(kMagnitudeMax);
            if (!sane) return Status::not_finite;
            if (coded.rotation.pairs > 0) rotate_row(row, plane.heads, plane.dim, coded.rotation, token, -1.0f);
        }
        const Statistics& measured =
            statistics.emplace_back(measure(flat, channels, classes, coded.step_factor));
        write_statistics(side, measured);
        values.resize((first + channels) * stride, 0);
        const float step = level_step(measured.step, levels - 1);
        std::vector<float> means(channels);
        for (std::size_t c = 0; c < channels; ++c) means[c] = measured.mean(c);
        for (const bool drain : {false, true}) {
            const float inverse = 1.0f / (drain ? step * kDrainScale : step);
            for (const u32 token : classes.of(drain)) {
                const float* row = flat.data() + token * channels;
                for (std::size_t c = 0; c < channels; ++c) {
                    const float scaled = std::clamp((row[c] - means[c]) * inverse, -limit, limit);
                    values[(first + c) * stride + token] = static_cast<i32>((scaled + kRound) - kRound);
                }
            }
        }
        first += channels;
    }
    for (const CodedPlane& coded : planes)
        for (std::size_t token = 0; token < sinks; ++token)
            append_bytes(side, coded.plane.row(token), coded.plane.channels() * element_bytes(dtype));
    for (int level = levels; level-- > 0;) {
        encode_streams(payloads[static_cast<std::size_t>(level)], values, stride, statistics, level, classes);
        if (level > 0)
            for (i32& value : values) value = third(value);
    }
    return Status::ok;
}

Status LossyCodec::read_side(ByteView payload, std::span<const CodedPlane> planes, std::size_t sinks, Dtype dtype,
                             std::vector<u16>& drains, std::vector<Statistics>& statistics, std::size_t& at) const {
    const std::size_t tokens = planes.front().plane.tokens;
    if (payload.size() < 4) return Status::too_short;
    const std::size_t count = load<u16>(payload.data() + 2);
    if (payload[0] != 0 || payload[1] != 0 || count > (payload.size() - 4) / 2) return Status::side_information;
    drains.resize(count);
    if (count > 0) std::memcpy(drains.data(), payload.data() + 4, 2 * count);
    if (std::adjacent_find(drains.begin(), drains.end(), std::greater_equal<u16>()) != drains.end())
        return Status::side_information;
    if (count > 0 && (drains.front() < sinks || drains.back() >= tokens)) return Status::token_classes;
    at = 4 + 2 * count;
    for (const CodedPlane& coded : planes) {
        const std::size_t channels = coded.plane.channels(), size = statistics_bytes(channels);
        if (payload.size() - at < size) return Status::too_short;
        Statistics& plane = statistics.emplace_back();
        plane.step = load<float>(payload.data() + at);
        plane.mean_shift = payload[at + 4];
        if (!(plane.step >= 0x1p-126f && plane.step <= kStepMax) || plane.mean_shift > kMeanShiftMax ||
            plane.quantum() > kStepMax)
            return Status::step_range;
        read_statistics(payload.data() + at + 5, channels, plane);
        derive_scales(plane);
        at += size;
    }
    std::size_t sink_bytes = 0;
    for (const CodedPlane& coded : planes) sink_bytes += sinks * coded.plane.channels() * element_bytes(dtype);
    if (payload.size() - at < sink_bytes) return Status::too_short;
    at += sink_bytes;
    return Status::ok;
}

bool LossyCodec::for_vector(const Block& block, const Values& values) const {
    return vector_ && block.lanes == kLanes && values.size() <= static_cast<std::size_t>(std::numeric_limits<i32>::max());
}

bool LossyCodec::encode_by_vector(StreamEncoder& stream, const Block& block, const Tokens& tokens, const Values& values,
                                  std::size_t stride) const {
    using T = LossyTables;
    if (!for_vector(block, values)) return false;
    const avx512::WholeBlock<const i32> whole{values.data(), block.starts(stride), tokens};
    if (block.entry)
        avx512::encode_values(stream, whole, tables_.values.codes.data(), block.tables(tables_.values.symbols), T::kValueMax,
                              kRawMax, T::kEscape);
    else
        avx512::encode_digits(stream, whole, tables_.digits.codes.data(), block.rows);
    return true;
}

std::size_t LossyCodec::decode_by_vector(StreamDecoder& stream, const Block& block, const Tokens& tokens,
                                         Values& values, std::size_t stride) const {
    using T = LossyTables;
    if (!for_vector(block, values)) return 0;
    const avx512::WholeBlock<i32> whole{values.data(), block.starts(stride), tokens};
    if (!block.entry) return avx512::decode_digits(stream, whole, tables_.digits.freq.data(), block.rows);
    return avx512::decode_values(stream, whole, tables_.values.slots.data(), block.tables(kSlots), T::kValueMax, T::kEscape);
}

Status LossyCodec::decode_block(StreamDecoder& stream, const Block& block, const Tokens& all, Values& values,
                                std::size_t stride) const {
    using T = LossyTables;
    const std::span<const u32> tokens = std::span(all).subspan(decode_by_vector(stream, block, all, values, stride));
    std::array<i32*, kLanes> lanes;
    std::array<u8, kLanes> symbols;
    for (std::size_t l = 0; l < static_cast<std::size_t>(block.lanes); ++l)
        lanes[l] = values.data() + block.components[l] * stride;
    if (block.entry) {
        std::array<const u32*, kLanes> slots;
        for (std::size_t l = 0; l < static_cast<std::size_t>(block.lanes); ++l)
            slots[l] = tables_.values.slots.data() + std::size_t{block.rows[l]} * kSlots;
        for (const u32 token : tokens) {
            if (!stream.step(block.lanes, slots.data(), symbols.data())) return Status::stream_ends_early;
            for (std::size_t l = 0; l < static_cast<std::size_t>(block.lanes); ++l) {
                i32 value = symbols[l] - T::kValueMax;
                if (symbols[l] == T::kEscape) {
                    u16 word = 0;
                    if (!stream.raw(word)) return Status::stream_ends_early;
                    value = static_cast<std::int16_t>(word);
                }
                lanes[l][token] = value;
            }
        }
        return Status::ok;
    }
    std::array<const u16*, kLanes> rows;
    for (const u32 token : tokens) {
        for (std::size_t l = 0; l < static_cast<std::size_t>(block.lanes); ++l) {
            const std::size_t row = block.rows[l] + static_cast<std::size_t>(std::min(std::abs(lanes[l][token]), 2));
            rows[l] = tables_.digits.freq.data() + 3 * row;
        }
        if (!stream.step3(block.lanes, rows.data(), symbols.data())) return Status::stream_ends_early;
        for (std::size_t l = 0; l < static_cast<std::size_t>(block.lanes); ++l) {
            i32& value = lanes[l][token];
            const i32 digit = symbols[l] - 1;
            value = 3 * value + (value < 0 ? -digit : digit);
        }
    }
    return Status::ok;
}

Status LossyCodec::decode_streams(ByteView payload, Values& values, std::size_t stride, std::span<const Statistics> statistics,
                                  int level, const TokenClasses& classes) const {
    const std::vector<Block> coded = blocks(statistics, level, !classes.drains.empty());
    const auto decode = [&](ByteView stream, std::size_t first, std::size_t last) {
        StreamDecoder decoder;
        Status status = decoder.begin(stream);
        for (std::size_t index = first; index < last && status == Status::ok; ++index)
            status = decode_block(decoder, coded[index], classes.of(coded[index].drain), values, stride);
        return status == Status::ok ? decoder.finish() : status;
    };
    return split_streams(payload, coded.size(), decode);
}

void LossyCodec::reconstruct(const CodedPlane& coded, const Statistics& statistics, const i32* values,
                             const TokenClasses& classes, int level, Dtype dtype) const {
    using T = LossyTables;
    const PlaneView& plane = coded.plane;
    const std::size_t channels = plane.channels();
    const std::size_t stride = values_stride(plane.tokens);
    const float step = level_step(statistics.step, level);
    std::vector<float> row(channels), means(channels);
    for (std::size_t c = 0; c < channels; ++c) means[c] = statistics.mean(c);
    for (const bool drain : {false, true}) {
        const float scale_step = drain ? step * kDrainScale : step;
        const std::vector<int>& scales = drain ? statistics.drain_scales : statistics.plain_scales;
        std::vector<const float*> centroids(channels);
        for (std::size_t c = 0; c < channels; ++c) {
            const int scale = std::clamp(scales[c] + T::kLevelShift[static_cast<std::size_t>(level)], 0, T::kScales - 1);
            centroids[c] = tables_.centroids.data() + scale * T::kCentroids + T::kValueMax;
        }
        for (const u32 token : classes.of(drain)) {
            for (std::size_t c = 0; c < channels; ++c) {
                const i32 value = values[c * stride + token];
                const float steps = std::abs(value) <= T::kValueMax ? centroids[c][value] : static_cast<float>(value);
                row[c] = steps * scale_step + means[c];
            }
            if (coded.rotation.pairs > 0) rotate_row(row.data(), plane.heads, plane.dim, coded.rotation, token, 1.0f);
            row_from_float(row.data(), channels, dtype, plane.row(token));
        }
    }
}

Status LossyCodec::decode(std::span<const ByteView> payloads, std::span<const CodedPlane> planes, std::size_t sinks,
                          Dtype dtype) const {
    std::vector<u16> drains;
    std::vector<Statistics> statistics;
    std::size_t at = 0;
    if (const Status status = read_side(payloads.front(), planes, sinks, dtype, drains, statistics, at);
        status != Status::ok)
        return status;
    const std::size_t tokens = planes.front().plane.tokens;
    const TokenClasses classes = classify(tokens, sinks, drains);
    std::size_t components = 0;
    for (const CodedPlane& coded : planes) components += coded.plane.channels();
    const std::size_t stride = values_stride(tokens);
    Values values(components * stride, 0);
    for (std::size_t level = 0; level < payloads.size(); ++level) {
        const ByteView streams = level == 0 ? payloads[0].subspan(at) : payloads[level];
        const Status status = decode_streams(streams, values, stride, statistics, static_cast<int>(level), classes);
        if (status != Status::ok) return status;
    }
    const u8* sink_rows = payloads.front().data() + at;
    for (const CodedPlane& coded : planes) sink_rows -= sinks * coded.plane.channels() * element_bytes(dtype);
    const i32* next = values.data();
    for (std::size_t index = 0; index < planes.size(); ++index) {
        const PlaneView& plane = planes[index].plane;
        reconstruct(planes[index], statistics[index], next, classes, static_cast<int>(payloads.size()) - 1, dtype);
        next += plane.channels() * stride;
        const std::size_t row_bytes = plane.channels() * element_bytes(dtype);
        for (std::size_t token = 0; token < sinks; ++token, sink_rows += row_bytes)
            if (row_bytes > 0) std::memcpy(plane.row(token), sink_rows, row_bytes);
    }
    return Status::ok;
}

}  // namespace kvstore
