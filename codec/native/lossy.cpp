#include "lossy.hpp"

#include <memory>
#include <numeric>

#include "plane_rows.hpp"
#include "token_classes.hpp"

namespace kvstore {
namespace {

using T = LossyTables;

constexpr float kDrainScale = 0.125f, kMagnitudeMax = 0x1p100f, kMagnitudeMaxProfile = 0x1p60f;
constexpr std::array<float, 3> kLevelDivisor{1, 3, 9};
constexpr std::array<float, 4> kQuarterOctaves{0x1p0f, 0x1.306fe0p0f, 0x1.6a09e6p0f, 0x1.ae89fap0f};
constexpr std::size_t kTransformTokens = 16;  // decoded together, so that converting the basis pays

// The plans of the classes that there are.
struct Plans {
    std::array<ClassPlan, 2> all;
    std::array<const ClassPlan*, 2> coded{};

    Plans(const LossyTables& tables, const TokenClasses& classes, const std::array<std::vector<i32>, 2>& scales, int levels) {
        for (const std::size_t c : {kDrains, kPlain}) {
            if (classes[c].empty()) continue;
            all[c] = plan_class(tables, scales[c], levels);
            coded[c] = &all[c];
        }
    }
    Plans(const Plans&) = delete;  // `coded` points into it
};

}  // namespace

std::size_t LossySegment::channels() const {
    return std::accumulate(planes.begin(), planes.end(), std::size_t{0},
                           [](std::size_t sum, const CodedPlane& coded) { return sum + coded.plane.channels(); });
}

// What turns a component into integers and back.
struct LossyCodec::Grid {
    std::vector<float> mean, unit;  // `unit`: the base step
    std::array<std::vector<i32>, 2> scales;  // at the base step, by class

    std::size_t components() const { return unit.size(); }
    std::vector<float> steps(int level, std::size_t token_class) const {
        std::vector<float> out(unit);
        for (float& step : out) {
            step /= kLevelDivisor[static_cast<std::size_t>(level)];
            if (token_class == kDrains) step *= kDrainScale;
        }
        return out;
    }
};

// A segment's channels as floats, keys un-rotated: [tokens, channels]; sinks are zero.
struct LossyCodec::Flat {
    std::unique_ptr<float[]> values;  // not set to zero first
    std::size_t tokens = 0, channels = 0;
    void reset(std::size_t rows, std::size_t columns) {
        tokens = rows;
        channels = columns;
        values = std::make_unique_for_overwrite<float[]>(rows * columns);
    }
    const float* row(std::size_t token) const { return values.get() + token * channels; }
    float* row(std::size_t token) { return values.get() + token * channels; }
    std::span<float> all() const { return {values.get(), tokens * channels}; }
};

std::vector<u16> LossyCodec::drain_tokens(std::span<const DrainLayer> layers, std::size_t sinks, Dtype dtype) const {
    const std::size_t tokens = layers.front().k.tokens;
    std::vector<std::vector<double>> energies;
    std::vector<float> row;
    Bytes spare;
    for (const DrainLayer& layer : layers)
        for (const PlaneView* plane : {&layer.k, &layer.v}) {
            std::vector<double>& energy = energies.emplace_back();
            row.resize(plane->channels());
            for (std::size_t token = sinks; token < tokens; ++token) {
                to_float(kernels_, *plane, token, dtype, spare, row.data());
                energy.push_back(kernels_.energy(row.data(), row.size()));
            }
        }
    return quiet_tokens(energies, tokens, sinks);
}

void LossyCodec::read_planes(const LossySegment& segment, std::size_t sinks, Dtype dtype, Flat& flat,
                             std::vector<std::vector<double>>* energies) const {
    const std::size_t tokens = segment.tokens();
    flat.reset(tokens, segment.channels());
    std::fill_n(flat.row(0), sinks * flat.channels, 0.0f);
    Bytes spare;
    std::size_t first = 0;
    for (const CodedPlane& coded : segment.planes) {
        const std::size_t channels = coded.plane.channels();
        if (energies) energies->emplace_back().reserve(tokens);
        for (std::size_t token = sinks; token < tokens; ++token) {
            float* row = flat.row(token) + first;
            to_float(kernels_, coded.plane, token, dtype, spare, row);
            if (energies) energies->back().push_back(kernels_.energy(row, channels));
            if (coded.rotation.pairs > 0) rotate_row(kernels_, row, coded.plane, coded.rotation, token, -1.0f);
        }
        first += channels;
    }
}

LossyCodec::Grid LossyCodec::measured_grid(const std::vector<Statistics>& statistics, bool drains) const {
    std::size_t components = 0;
    for (const Statistics& plane : statistics) components += plane.scale_ids.size();
    Grid grid;
    grid.mean.resize(components);
    grid.unit.resize(components);
    grid.scales[kPlain].resize(components);
    if (drains) grid.scales[kDrains].resize(components);
    std::size_t j = 0;
    for (const Statistics& plane : statistics) {
        const float quantum = plane.quantum();
        for (std::size_t c = 0; c < plane.scale_ids.size(); ++c, ++j) {
            grid.mean[j] = static_cast<float>(plane.mean_steps[c]) * quantum;
            grid.unit[j] = plane.step;
            grid.scales[kPlain][j] = plane.scale_ids[c] - T::kScaleIdOffset;
            if (drains) grid.scales[kDrains][j] = drain_scale(tables_, plane.scale_ids[c], plane.mean_steps[c], plane.mean_shift);
        }
    }
    return grid;
}

LossyCodec::Grid LossyCodec::profile_grid(const GroupProfile& profile, int step_quarters) const {
    const int octaves = (step_quarters - (step_quarters & 3)) / 4;
    const float step = kQuarterOctaves[static_cast<std::size_t>(step_quarters & 3)] *
                       std::bit_cast<float>(static_cast<u32>(127 + octaves) << 23);
    Grid grid;
    grid.mean.assign(profile.components, 0.0f);
    grid.unit.assign(profile.components, step);
    for (std::size_t j = 0; j < profile.components; ++j) {
        grid.scales[kPlain].push_back(profile.scale_ids[j] - T::kScaleIdOffset - step_quarters);
        grid.scales[kDrains].push_back(grid.scales[kPlain].back() + T::kDrainShift);
        if (profile.basis) continue;
        grid.mean[j] = profile.mean[j];
        grid.unit[j] = step * (1.0f / profile.weight[j]);
    }
    return grid;
}

Status LossyCodec::encode(const LossySegment& segment, std::size_t sinks, Dtype dtype, int levels, Workspace& workspace,
                          std::vector<Bytes>& payloads) const {
    const std::size_t tokens = segment.tokens();
    Flat flat;
    std::vector<std::vector<double>> energies;
    read_planes(segment, sinks, dtype, flat, segment.find_drains ? &energies : nullptr);
    std::vector<u16> drains(segment.drains.begin(), segment.drains.end());
    if (segment.find_drains) drains = quiet_tokens(energies, tokens, sinks);
    const TokenClasses classes = classify(tokens, sinks, drains);
    payloads.assign(static_cast<std::size_t>(levels), {});
    Bytes& side = payloads.front();
    append(side, static_cast<u8>(segment.profile != nullptr));
    append(side, static_cast<u8>(segment.step_quarters));
    append(side, static_cast<u16>(drains.size()));
    append_bytes(side, reinterpret_cast<const u8*>(drains.data()), 2 * drains.size());

    Grid grid;
    const GroupProfile* const profile = segment.profile;
    if (profile == nullptr) {
        std::vector<double> sum(flat.channels), square(flat.channels);
        std::vector<float> peak(flat.channels);
        for (const u32 token : classes[kPlain])
            kernels_.accumulate(flat.row(token), flat.channels, sum.data(), square.data(), peak.data());
        std::vector<double> ignored(flat.channels);
        for (const u32 token : classes[kDrains])  // of these only the peak counts
            kernels_.accumulate(flat.row(token), flat.channels, ignored.data(), ignored.data(), peak.data());
        // A NaN shows in the sums, an infinity in the peak as well.
        for (std::size_t c = 0; c < flat.channels; ++c)
            if (!(peak[c] < kMagnitudeMax) || !std::isfinite(square[c] + ignored[c])) return Status::not_finite;
        std::vector<Statistics> statistics;
        std::size_t first = 0;
        for (const CodedPlane& coded : segment.planes) {
            const std::size_t channels = coded.plane.channels();
            const float top = std::accumulate(peak.begin() + static_cast<std::ptrdiff_t>(first),
                                              peak.begin() + static_cast<std::ptrdiff_t>(first + channels), 0.0f,
                                              [](float a, float b) { return std::max(a, b); });
            const PlaneSums sums{{sum.data() + first, channels}, {square.data() + first, channels},
                                 classes[kPlain].size(), top, !classes[kDrains].empty()};
            write_statistics(side, statistics.emplace_back(measure(tables_, sums, coded.step_factor, levels)));
            first += channels;
        }
        grid = measured_grid(statistics, !drains.empty());
    } else {
        for (std::size_t token = sinks; token < tokens; ++token)
            if (!kernels_.below(flat.row(token), flat.channels, kMagnitudeMaxProfile)) return Status::not_finite;
        grid = profile_grid(*profile, segment.step_quarters);
        if (profile->basis) {
            for (std::size_t token = sinks; token < tokens; ++token) {
                float* row = flat.row(token);
                for (std::size_t c = 0; c < flat.channels; ++c) row[c] = (row[c] - profile->mean[c]) * profile->weight[c];
            }
            Flat turned;
            turned.reset(tokens, profile->components);
            std::vector<float> scratch(gemm::scratch_floats(tokens));
            const bool fits = gemm::forward(
                gemm_, {flat.all(), tokens, flat.channels, flat.channels},
                {{profile->basis, profile->components * profile->channels}, profile->components, profile->channels, profile->channels},
                {turned.all(), tokens, turned.channels, turned.channels}, scratch);
            if (!fits) return Status::side_information;
            flat = std::move(turned);
        }
    }
    append_sinks(side, segment, sinks, dtype);

    const Plans plans(tables_, classes, grid.scales, levels);
    WindowEncoder encoder(workspace, kernels_, tables_.alphabet(), plans.coded, {classes[kDrains].size(), classes[kPlain].size()}, levels);
    WindowBuffers buffers(workspace, grid.components());
    for (const std::size_t c : {kPlain, kDrains}) {
        if (classes[c].empty()) continue;
        std::vector<float> inverse = grid.steps(levels - 1, c);
        for (float& step : inverse) step = 1.0f / step;
        const std::size_t count = classes[c].size();
        for (std::size_t first = (count - 1) / kWindow * kWindow;; first -= kWindow) {
            const std::size_t steps = std::min(kWindow, count - first);
            for (std::size_t t = 0; t < steps; ++t)
                kernels_.quantise(flat.row(classes[c][first + t]), grid.components(), grid.mean.data(), inverse.data(),
                                  buffers.row(t));
            encoder.previous(c, static_cast<int>(steps), buffers);
            if (first == 0) break;
        }
    }
    for (std::size_t level = 0; level < payloads.size(); ++level) encoder.finish(level, payloads[level]);
    return Status::ok;
}

Status LossyCodec::read_side(ByteView payload, const LossySegment& segment, std::size_t sinks, Dtype dtype,
                             std::vector<u16>& drains, Grid& grid, std::size_t& at) const {
    if (payload.size() < 4) return Status::too_short;
    const int quarters = static_cast<std::int8_t>(payload[1]);
    const std::size_t count = load<u16>(payload.data() + 2), tokens = segment.tokens();
    if (payload[0] != static_cast<u8>(segment.profile != nullptr) || (quarters != 0 && payload[0] == 0) ||
        count > (payload.size() - 4) / 2)
        return Status::side_information;
    drains.resize(count);
    if (count > 0) std::memcpy(drains.data(), payload.data() + 4, 2 * count);
    if (std::adjacent_find(drains.begin(), drains.end(), std::greater_equal<u16>()) != drains.end())
        return Status::side_information;
    if (count > 0 && (drains.front() < sinks || drains.back() >= tokens)) return Status::token_classes;
    at = 4 + 2 * count;
    if (segment.profile == nullptr) {
        std::vector<Statistics> statistics;
        for (const CodedPlane& coded : segment.planes) {
            const Status status = read_statistics(payload, coded.plane.channels(), at, statistics.emplace_back());
            if (status != Status::ok) return status;
        }
        grid = measured_grid(statistics, count > 0);
    } else {
        grid = profile_grid(*segment.profile, quarters);
    }
    if (payload.size() - at < sink_bytes(segment, sinks, dtype)) return Status::too_short;
    at += sink_bytes(segment, sinks, dtype);
    return Status::ok;
}

// Rows of integers to rows of floats, and on into the planes.
class LossyCodec::RowWriter {
  public:
    RowWriter(const LossyCodec& codec, const LossySegment& segment, const Grid& grid, int level, Dtype dtype)
        : codec_(codec), segment_(segment), grid_(grid), planes_(codec.kernels_, dtype), level_(level), row_(grid.components()) {}

    void begin(std::size_t token_class) {
        steps_ = grid_.steps(level_, token_class);
        for (std::vector<float>& shrink : shrink_) shrink.resize(grid_.components());
        for (std::size_t c = 0; c < grid_.components(); ++c) {
            const float* shrinkage =
                codec_.tables_.shrinkage_of(grid_.scales[token_class][c] + T::kLevelShift[static_cast<std::size_t>(level_)]);
            for (std::size_t m = 0; m < 3; ++m) shrink_[m][c] = shrinkage[m + 1];
        }
    }
    GridView view() const {
        return {steps_.data(), grid_.mean.data(), {shrink_[0].data(), shrink_[1].data(), shrink_[2].data()}};
    }
    bool write(WindowBuffers& buffers, std::span<const u32> tokens) {
        std::size_t first = 0;
        for (const CodedPlane& coded : segment_.planes) {
            const std::size_t channels = coded.plane.channels();
            const GridView grid = view().from(first);
            if (!planes_.restore(coded, tokens, buffers.row(0) + first, buffers.stride(), grid))
                for (std::size_t t = 0; t < tokens.size(); ++t) {
                    codec_.kernels_.dequantise(buffers.row(t) + first, channels, grid, row_.data());
                    planes_.write(coded, tokens[t], row_.data());
                }
            first += channels;
        }
        return true;
    }

  protected:
    const LossyCodec& codec_;
    const LossySegment& segment_;
    const Grid& grid_;
    PlaneWriter planes_;

  private:
    int level_;
    std::vector<float> steps_, row_;
    std::array<std::vector<float>, 3> shrink_;
};

// The same through a profile's basis, some tokens at a time.
class LossyCodec::TransformWriter : public RowWriter {
  public:
    TransformWriter(const LossyCodec& codec, const LossySegment& segment, const Grid& grid, int level, Dtype dtype,
                    Workspace& workspace)
        : RowWriter(codec, segment, grid, level, dtype), y_(workspace.components), x_(workspace.channels), scratch_(workspace.scratch) {
        std::size_t widest = 0;
        for (const CodedPlane& coded : segment.planes) widest = std::max(widest, coded.plane.channels());
        y_.reserve(kTransformTokens * grid.components());
        x_.reserve(kTransformTokens * widest);
        scratch_.reserve(gemm::scratch_floats(kTransformTokens));
        for (std::size_t c = 0; c < segment.profile->channels; ++c) inverse_weight_.push_back(1.0f / segment.profile->weight[c]);
    }
    // False where the profile's shape does not fit the segment.
    bool write(WindowBuffers& buffers, std::span<const u32> tokens) {
        for (std::size_t t = 0; t < tokens.size(); ++t) {
            codec_.kernels_.dequantise(buffers.row(t), grid_.components(), view(),
                                       y_.data() + tokens_.size() * grid_.components());
            tokens_.push_back(tokens[t]);
            if (tokens_.size() == kTransformTokens && !flush()) return false;
        }
        return true;
    }
    bool flush() {
        const GroupProfile& profile = *segment_.profile;
        const std::size_t components = grid_.components();
        std::size_t first = 0;
        for (const CodedPlane& coded : segment_.planes) {
            const std::size_t channels = coded.plane.channels();
            if (channels == 0 || tokens_.empty()) continue;
            const bool fits = gemm::inverse(codec_.gemm_, {{y_.data(), tokens_.size() * components}, tokens_.size(), components, components},
                                            {{profile.basis, components * profile.channels}, components, profile.channels, profile.channels},
                                            first, {{x_.data(), tokens_.size() * channels}, tokens_.size(), channels, channels},
                                            {scratch_.data(), gemm::scratch_floats(kTransformTokens)});
            if (!fits) return false;
            for (std::size_t t = 0; t < tokens_.size(); ++t) {
                float* row = x_.data() + t * channels;
                for (std::size_t c = 0; c < channels; ++c) row[c] = row[c] * inverse_weight_[first + c] + profile.mean[first + c];
                planes_.write(coded, tokens_[t], row);
            }
            first += channels;
        }
        tokens_.clear();
        return true;
    }

  private:
    Pages<float>&y_, &x_, &scratch_;
    std::vector<float> inverse_weight_;
    std::vector<std::size_t> tokens_;
};

Status LossyCodec::decode(const LossySegment& segment, std::span<const ByteView> payloads, std::size_t sinks,
                          Dtype dtype, Workspace& workspace) const {
    std::vector<u16> drains;
    Grid grid;
    std::size_t at = 0;
    if (const Status status = read_side(payloads.front(), segment, sinks, dtype, drains, grid, at); status != Status::ok)
        return status;
    const TokenClasses classes = classify(segment.tokens(), sinks, drains);
    const int levels = static_cast<int>(payloads.size());
    const Plans plans(tables_, classes, grid.scales, levels);
    const bool transformed = segment.profile != nullptr && segment.profile->basis != nullptr;  // which takes nearly all time
    std::array<std::size_t, 2> near_tokens{};
    if (!transformed) near_tokens = {classes[kDrains].size(), classes[kPlain].size()};
    WindowDecoder decoder(workspace, kernels_, tables_.alphabet(), plans.coded, near_tokens, grid.components());
    std::vector<ByteView> sections(payloads.begin(), payloads.end());
    sections.front() = sections.front().subspan(at);
    if (const Status status = decoder.open(sections); status != Status::ok) return status;

    WindowBuffers buffers(workspace, grid.components());
    const auto decode_all = [&](auto& writer) {
        for (const std::size_t c : {kDrains, kPlain}) {
            if (classes[c].empty()) continue;
            writer.begin(c);
            buffers.clear();
            for (std::size_t first = 0; first < classes[c].size(); first += kWindow) {
                const std::size_t steps = std::min(kWindow, classes[c].size() - first);
                if (const Status status = decoder.next(c, static_cast<int>(steps), buffers); status != Status::ok) return status;
                if (!writer.write(buffers, std::span(classes[c]).subspan(first, steps))) return Status::side_information;
            }
        }
        return decoder.finish();
    };
    Status status;
    if (transformed) {
        TransformWriter writer(*this, segment, grid, levels - 1, dtype, workspace);
        status = decode_all(writer);
        if (status == Status::ok && !writer.flush()) status = Status::side_information;
    } else {
        RowWriter writer(*this, segment, grid, levels - 1, dtype);
        status = decode_all(writer);
    }
    if (status != Status::ok) return status;
    const u8* sink_row = payloads.front().data() + at - sink_bytes(segment, sinks, dtype);
    for (const CodedPlane& coded_plane : segment.planes)
        for (std::size_t token = 0; token < sinks; ++token) {
            write_row(coded_plane.plane, token, element_bytes(dtype), sink_row);
            sink_row += coded_plane.plane.channels() * element_bytes(dtype);
        }
    return Status::ok;
}

}  // namespace kvstore
