#include "window_streams.hpp"

namespace kvstore {
namespace {

constexpr std::size_t kTileSize = kTile;
constexpr std::size_t kNearTokensMin = 2 * kWindow;  // for fewer, near symbols are not worth their memory

std::size_t blocks_at(const std::array<const ClassPlan*, 2>& classes, std::size_t level) {
    std::size_t blocks = 0;
    for (const ClassPlan* plan : classes) blocks += plan ? plan->counts[level] : 0;
    return blocks;
}

std::span<const u32> components_of(const Block& block) {
    return {block.components.data(), static_cast<std::size_t>(block.lanes)};
}

struct Place {
    std::size_t stream, block;
};

// Calls `work` for every block of a quality layer, in each stream's order, or backwards; streams two at a time, block beside
// block where both enter, or both are refined (the first `refined` are).
template <bool Backwards, class Work>
Status side_by_side(std::size_t blocks, std::size_t refined, std::size_t streams, const Work& work) {
    for (std::size_t s = 0; s < streams; s += 2) {
        Deal share[2] = {deal(blocks, streams, s), {0, 0}};
        if (s + 1 < streams) share[1] = deal(blocks, streams, s + 1);
        const auto left = [&](std::size_t n) { return share[n].first < share[n].last; };
        const auto front = [&](std::size_t n) { return Backwards ? share[n].last - 1 : share[n].first; };
        const auto take = [&](std::size_t n) { return Place{s + n, Backwards ? --share[n].last : share[n].first++}; };
        while (left(0) || left(1)) {
            Status status;
            if (left(0) && left(1) && (front(0) < refined) == (front(1) < refined)) {
                const Place places[2] = {take(0), take(1)};
                status = work(std::span<const Place>(places));
            } else {
                const Place place = take(left(0) ? 0 : 1);
                status = work(std::span<const Place>(&place, 1));
            }
            if (status != Status::ok) return status;
        }
    }
    return Status::ok;
}

}  // namespace

WindowBuffers::WindowBuffers(Workspace& workspace, std::size_t components)
    : stride_(padded(components)), rows_(workspace.rows), columns_(workspace.columns) {
    rows_.reserve(kWindow * stride_);
    columns_.reserve(kWindow * stride_);
    clear();
}

void WindowBuffers::clear() { std::fill_n(columns_.data(), stride_ * kWindow, i16{0}); }

void WindowBuffers::rows_to_columns(const Kernels& kernels) {
    const i16* in[kLanes];
    i16* out[kLanes];
    for (std::size_t first = 0; first < stride_; first += kLanes) {
        for (std::size_t i = 0; i < kLanes; ++i) {
            in[i] = rows_.data() + i * stride_ + first;
            out[i] = columns_.data() + (first + i) * kWindow;
        }
        kernels.transpose(in, out);
    }
}

void WindowBuffers::columns_to_rows(const Kernels& kernels) {
    const i16* in[kLanes];
    i16* out[kLanes];
    for (std::size_t first = 0; first < stride_; first += kLanes) {
        for (std::size_t i = 0; i < kLanes; ++i) {
            in[i] = columns_.data() + (first + i) * kWindow;
            out[i] = rows_.data() + i * stride_ + first;
        }
        kernels.transpose(in, out);
    }
}

void WindowBuffers::gather(const Kernels& kernels, std::span<const u32> components, i16* tile) {
    const i16* in[kLanes];
    i16* out[kLanes];
    for (std::size_t i = 0; i < kLanes; ++i) {
        in[i] = i < components.size() ? columns_.data() + std::size_t{components[i]} * kWindow : spare_.data();
        out[i] = tile + i * kLanes;
    }
    kernels.transpose(in, out);
}

void WindowBuffers::scatter(const Kernels& kernels, std::span<const u32> components, const i16* tile) {
    const i16* in[kLanes];
    i16* out[kLanes];
    for (std::size_t i = 0; i < kLanes; ++i) {
        in[i] = tile + i * kLanes;
        out[i] = i < components.size() ? columns_.data() + std::size_t{components[i]} * kWindow : spare_.data();
    }
    kernels.transpose(in, out);
}

WindowDecoder::WindowDecoder(Workspace& workspace, const Kernels& kernels, const Alphabet& alphabet,
                             std::array<const ClassPlan*, 2> classes, std::array<std::size_t, 2> near_tokens,
                             std::size_t components)
    : kernels_(kernels), alphabet_(alphabet), classes_(classes), near_(workspace.near), tiles_(workspace.tiles) {
    for (std::size_t index = 0; index < classes.size(); ++index)
        if (classes[index] && kernels.compares && near_tokens[index] >= kNearTokensMin) find_near(index);
    std::size_t blocks = 0;
    for (const ClassPlan* plan : classes) blocks = std::max(blocks, plan ? plan->blocks.size() : 0);
    tiles_.reserve(std::max(blocks, components > 0 ? std::size_t{1} : 0) * kTileSize);
}

Status WindowDecoder::open(std::span<const ByteView> sections) {
    streams_.resize(sections.size());
    for (std::size_t level = 0; level < sections.size(); ++level) {
        const Status status = split_streams(sections[level], blocks_at(classes_, level), streams_[level]);
        if (status != Status::ok) return status;
    }
    return Status::ok;
}

Status WindowDecoder::next(std::size_t index, int steps, WindowBuffers& buffers) {
    for (std::size_t level = 0; level < streams_.size(); ++level)
        if (const Status status = decode_layer(level, index, steps); status != Status::ok) return status;
    const ClassPlan& plan = *classes_[index];
    for (std::size_t b = 0; b < plan.counts[streams_.size() - 1]; ++b)
        buffers.scatter(kernels_, components_of(plan.blocks[b]), tiles_.data() + b * kTileSize);
    buffers.columns_to_rows(kernels_);
    return Status::ok;
}

void WindowDecoder::find_near(std::size_t index) {
    const ClassPlan& plan = *classes_[index];
    near_[index].reserve(plan.blocks.size() * kTileSize);
    const NearRow none;
    const i16* in[kLanes];
    i16* out[kLanes];
    for (std::size_t b = 0; b < plan.values.size(); ++b) {
        const ValueLanes& lanes = plan.values[b];
        int reach = 0;
        bool all = true;
        for (std::size_t l = 0; l < kLanes; ++l) {
            const bool used = l < static_cast<std::size_t>(lanes.count);
            const std::size_t table = static_cast<std::size_t>(lanes.slots[l]) / kSlots;
            in[l] = reinterpret_cast<const i16*>(used ? &alphabet_.near->row(table) : &none);
            out[l] = near_[index].data() + b * kTileSize + l * kLanes;
            if (!used) continue;
            reach = std::max(reach, alphabet_.near->reach(table));
            all = all && alphabet_.near->reach(table) > 0;
        }
        reaches_[index].push_back(all ? reach : 0);
        if (all) kernels_.transpose(in, out);
    }
}

ValueJob WindowDecoder::value_job(std::size_t level, std::size_t index, std::size_t stream, std::size_t block) {
    const int reach = reaches_[index].empty() ? 0 : reaches_[index][block];
    return {&streams_[level][stream], &classes_[index]->values[block], reach > 0 ? near_[index].data() + block * kTileSize : nullptr, reach,
            tiles_.data() + block * kTileSize};
}

Status WindowDecoder::decode_layer(std::size_t level, std::size_t index, int steps) {
    const ClassPlan& plan = *classes_[index];
    std::vector<StreamDecoder>& streams = streams_[level];
    const std::size_t refined = level > 0 ? plan.counts[level - 1] : 0;
    return side_by_side<false>(plan.counts[level], refined, streams.size(), [&](std::span<const Place> places) {
        if (places[0].block < refined) {
            std::array<DigitJob, 2> jobs;
            for (std::size_t n = 0; n < places.size(); ++n)
                jobs[n] = {&streams[places[n].stream], &plan.digits[level][places[n].block], tiles_.data() + places[n].block * kTileSize};
            return kernels_.decode_digits({jobs.data(), places.size()}, steps);
        }
        std::array<ValueJob, 2> jobs;
        for (std::size_t n = 0; n < places.size(); ++n) jobs[n] = value_job(level, index, places[n].stream, places[n].block);
        return kernels_.decode_values(alphabet_, {jobs.data(), places.size()}, steps);
    });
}

Status WindowDecoder::finish() const {
    for (const auto& streams : streams_)
        if (const Status status = finish_streams(streams); status != Status::ok) return status;
    return Status::ok;
}

WindowEncoder::WindowEncoder(Workspace& workspace, const Kernels& kernels, const Alphabet& alphabet,
                             std::array<const ClassPlan*, 2> classes, std::array<std::size_t, 2> tokens, int levels)
    : kernels_(kernels), alphabet_(alphabet), classes_(classes), streams_(static_cast<std::size_t>(levels)),
      tiles_(workspace.tiles) {
    for (std::size_t level = 0; level < streams_.size(); ++level) {
        i64 symbols = 0;
        for (std::size_t index = 0; index < classes.size(); ++index)
            if (classes[index]) symbols += classes[index]->lanes_at(static_cast<int>(level)) * static_cast<i64>(tokens[index]);
        streams_[level].resize(stream_count(blocks_at(classes, level), symbols));
    }
    std::size_t blocks = 0;
    for (const ClassPlan* plan : classes) blocks = std::max(blocks, plan ? plan->blocks.size() : 0);
    tiles_.reserve(blocks * kTileSize);
}

void WindowEncoder::previous(std::size_t index, int steps, WindowBuffers& buffers) {
    const ClassPlan& plan = *classes_[index];
    buffers.rows_to_columns(kernels_);
    for (std::size_t b = 0; b < plan.counts[streams_.size() - 1]; ++b)
        buffers.gather(kernels_, components_of(plan.blocks[b]), tiles_.data() + b * kTileSize);
    for (std::size_t level = streams_.size(); level-- > 0;) {
        encode_layer(level, index, steps);
        for (std::size_t b = 0; level > 0 && b < plan.counts[level - 1]; ++b) kernels_.coarsen(tiles_.data() + b * kTileSize);
    }
}

void WindowEncoder::encode_layer(std::size_t level, std::size_t index, int steps) {
    const ClassPlan& plan = *classes_[index];
    std::vector<StreamEncoder>& streams = streams_[level];
    const std::size_t refined = level > 0 ? plan.counts[level - 1] : 0;
    side_by_side<true>(plan.counts[level], refined, streams.size(), [&](std::span<const Place> places) {
        if (places[0].block < refined) {
            std::array<EncodeDigitJob, 2> jobs;
            for (std::size_t n = 0; n < places.size(); ++n)
                jobs[n] = {&streams[places[n].stream], &plan.digits[level][places[n].block], tiles_.data() + places[n].block * kTileSize};
            kernels_.encode_digits({jobs.data(), places.size()}, steps);
            return Status::ok;
        }
        std::array<EncodeValueJob, 2> jobs;
        for (std::size_t n = 0; n < places.size(); ++n)
            jobs[n] = {&streams[places[n].stream], &plan.values[places[n].block], tiles_.data() + places[n].block * kTileSize};
        kernels_.encode_values(alphabet_, {jobs.data(), places.size()}, steps);
        return Status::ok;
    });
}

}  // namespace kvstore
