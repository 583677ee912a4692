#include "raw_planes.hpp"

#include <algorithm>

namespace kvstore {

namespace {

constexpr std::size_t kEntry = 24, kHeader = 192;
constexpr std::size_t kEntryChecksum = 16, kTableChecksum = 168, kHeaderChecksum = 184;
// Rows that do not lie together are moved so many bytes at a time: they stay in the first cache until they are hashed.
constexpr std::size_t kGroup = 8 << 10;

void store(u8* at, u64 value) { std::memcpy(at, &value, sizeof value); }

// How many tokens from `token` on lie together; 0 where rows themselves do not.
std::size_t together(const PlaneView& plane, std::size_t token, std::size_t element) {
    if (!plane.whole_rows(element)) return 0;
    const std::size_t left = plane.tokens - token;
    if (plane.token_group != 0 || (left > 1 && plane.token_stride != static_cast<std::ptrdiff_t>(plane.channels() * element))) return 1;
    return plane.pages == nullptr ? left : std::min(left, plane.page_tokens - (plane.first_token + token) % plane.page_tokens);
}

// The next tokens of a plane that are moved at once: such as lie together (whole), or a few.
struct Run {
    std::size_t tokens;
    bool whole;
};
Run next_run(const PlaneView& plane, std::size_t token, std::size_t element) {
    const std::size_t row = plane.channels() * element, tokens = together(plane, token, element), left = plane.tokens - token;
    if (tokens * row >= kGroup || (tokens > 0 && tokens == left)) return {tokens, true};
    return {std::min(std::max<std::size_t>(1, kGroup / row), left), false};
}

}  // namespace

std::size_t RawPlanes::tokens() const {
    std::size_t fewest = planes_.empty() ? 0 : planes_.front().tokens;
    for (const PlaneView& plane : planes_) fewest = std::min(fewest, plane.tokens);
    return fewest;
}

std::size_t RawPlanes::bytes(std::optional<Window> window) const {
    std::size_t sum = 0;
    for (std::size_t index = 0; index < planes_.size(); ++index) sum += plane_bytes(plane(index, window));
    return sum;
}

PlaneView RawPlanes::plane(std::size_t index, std::optional<Window> window) const {
    PlaneView view = planes_[index];
    if (!window) return view;
    view.tokens = window->tokens;
    if (view.pages != nullptr) view.first_token += window->first;
    else if (view.data != nullptr) view.data += static_cast<std::ptrdiff_t>(window->first) * view.token_stride;
    return view;
}

std::optional<RawPlanes::Segment> RawPlanes::segment(ByteView table, std::size_t index, std::optional<Window> window) const {
    const u8* const entry = table.data() + kEntry * index;
    const u8 sides = entry[1];
    const std::size_t layer = load<u16>(entry + 2), layers = load<u16>(entry + 4);
    if (entry[0] != 0 || sides < 1 || sides > 3 || layers < 1 || 2 * (layer + layers) > planes_.size()) return {};
    Segment found{2 * layer + (sides == 2), 2 * (layer + layers), sides == 3 ? 1u : 2u, 0, load<u64>(entry + kEntryChecksum)};
    for (std::size_t at = found.first; at < found.last; at += found.step) found.bytes += plane_bytes(plane(at, window));
    if (load<u64>(entry + 8) != found.bytes) return {};
    return found;
}

RawOutcome RawPlanes::write(ByteView table, ByteView payload) const {
    RawWriter writer(*this, table, payload.size());
    const std::size_t taken = writer.take(payload);
    const RawOutcome outcome = writer.outcome();
    return outcome.status == Status::ok && taken < payload.size() ? RawOutcome{Status::raw_length, outcome.segment} : outcome;
}

bool RawPlanes::seal(std::span<u8> object, std::size_t segments) const {
    const std::span<u8> table = object.subspan(kHeader, segments * kEntry);
    u8* to = table.data() + table.size();
    for (std::size_t index = 0; index < segments; ++index) {
        const std::optional<Segment> found = segment(table, index, {});
        if (!found || found->bytes > static_cast<std::size_t>(object.data() + object.size() - to)) return false;
        Xxh3 hash(kernels_);
        for (std::size_t at = found->first; at < found->last; at += found->step) {
            const PlaneView& plane = planes_[at];
            const std::size_t row = plane.channels() * element_;
            if (row == 0) continue;  // such a plane has no memory
            for (std::size_t token = 0; token < plane.tokens;) {
                const auto [tokens, whole] = next_run(plane, token, element_);
                for (std::size_t t = 0; !whole && t < tokens; ++t) read_row(plane, token + t, element_, to + t * row);
                hash.add(whole ? plane.at(token) : to, tokens * row, whole ? to : nullptr);
                to += tokens * row;
                token += tokens;
            }
        }
        store(table.data() + kEntry * index + kEntryChecksum, hash.digest());
    }
    store(object.data() + kTableChecksum, xxh3(kernels_, table));
    store(object.data() + kHeaderChecksum, xxh3(kernels_, object.first(kHeaderChecksum)));
    return to == object.data() + object.size();
}

std::size_t RawWriter::segments() const { return table_.size() / kEntry; }

bool RawWriter::begin_segment() {
    open_ = planes_.segment(table_, segment_, window_);
    if (!open_ || open_->bytes > left_) {
        status_ = Status::raw_length;
        return false;
    }
    hash_.emplace(planes_.kernels_);
    plane_index_ = open_->first;
    plane_ = planes_.plane(plane_index_, window_);
    token_ = 0;
    return true;
}

std::size_t RawWriter::take_rows(ByteView bytes) {
    const std::size_t row = plane_.channels() * planes_.element_;
    auto [tokens, whole] = next_run(plane_, token_, planes_.element_);
    tokens = std::min(tokens, bytes.size() / row);
    if (tokens == 0) return 0;
    hash_->add(bytes.data(), tokens * row, whole ? plane_.at(token_) : nullptr, stores_);
    for (std::size_t t = 0; !whole && t < tokens; ++t)
        write_row(plane_, token_ + t, planes_.element_, bytes.data() + t * row);
    token_ += tokens;
    return tokens * row;
}

std::size_t RawWriter::take(ByteView bytes) {
    std::size_t taken = 0;
    while (!ended()) {
        if (!open_ && !begin_segment()) break;
        while (plane_index_ < open_->last) {
            if (plane_.channels() == 0 || token_ == plane_.tokens) {  // a plane without channels has no memory
                plane_index_ += open_->step;
                if (plane_index_ < open_->last) plane_ = planes_.plane(plane_index_, window_);
                token_ = 0;
                continue;
            }
            const std::size_t count = take_rows(bytes.subspan(taken));
            if (count == 0) return taken;
            taken += count;
            left_ -= count;
        }
        if (hash_->digest() != open_->checksum) {
            status_ = Status::checksum;
            break;
        }
        open_.reset();
        ++segment_;
    }
    return taken;
}

}  // namespace kvstore
