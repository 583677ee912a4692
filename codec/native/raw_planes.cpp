#include "raw_planes.hpp"

#include <algorithm>

namespace kvstore {

namespace {

constexpr std::size_t kEntry = 24, kHeader = 192;
constexpr std::size_t kEntryChecksum = 16, kTableChecksum = 168, kHeaderChecksum = 184;
// Rows that do not lie together are moved so many bytes at a time: they stay in the first cache until they are hashed.
constexpr std::size_t kGroup = 8 << 10;
// From here on a payload is larger than what caches will keep of it.
constexpr std::size_t kAroundCaches = 512 << 10;

void store(u8* at, u64 value) { std::memcpy(at, &value, sizeof value); }

// How many tokens from `token` on lie together; 0 where rows themselves do not.
std::size_t together(const PlaneView& plane, std::size_t token, std::size_t element) {
    if (!plane.whole_rows(element)) return 0;
    const std::size_t left = plane.tokens - token;
    if (plane.token_group != 0 || (left > 1 && plane.token_stride != static_cast<std::ptrdiff_t>(plane.channels() * element))) return 1;
    return plane.pages == nullptr ? left : std::min(left, plane.page_tokens - (plane.first_token + token) % plane.page_tokens);
}

}  // namespace

std::size_t RawPlanes::bytes() const {
    std::size_t sum = 0;
    for (const PlaneView& plane : planes_) sum += plane_bytes(plane);
    return sum;
}

std::optional<RawPlanes::Segment> RawPlanes::segment(ByteView table, std::size_t index) const {
    const u8* const entry = table.data() + kEntry * index;
    const u8 sides = entry[1];
    const std::size_t layer = load<u16>(entry + 2), layers = load<u16>(entry + 4);
    if (entry[0] != 0 || sides < 1 || sides > 3 || layers < 1 || 2 * (layer + layers) > planes_.size()) return {};
    Segment found{2 * layer + (sides == 2), 2 * (layer + layers), sides == 3 ? 1u : 2u, 0, load<u64>(entry + kEntryChecksum)};
    for (std::size_t plane = found.first; plane < found.last; plane += found.step) found.bytes += plane_bytes(planes_[plane]);
    if (load<u64>(entry + 8) != found.bytes) return {};
    return found;
}

// `job(plane, token, tokens, bytes, whole)`: the segment's bytes in order, in pieces that lie together (whole) or are small.
template <class Job>
void RawPlanes::for_each_piece(const Segment& segment, const Job& job) const {
    for (std::size_t index = segment.first; index < segment.last; index += segment.step) {
        const PlaneView& plane = planes_[index];
        const std::size_t row = plane.channels() * element_;
        if (row == 0) continue;  // such a plane has no memory
        for (std::size_t token = 0; token < plane.tokens;) {
            std::size_t tokens = together(plane, token, element_);
            const bool whole = tokens * row >= kGroup || (tokens > 0 && tokens == plane.tokens - token);
            if (!whole) tokens = std::min(std::max<std::size_t>(1, kGroup / row), plane.tokens - token);
            job(plane, token, tokens, tokens * row, whole);
            token += tokens;
        }
    }
}

RawOutcome RawPlanes::write(ByteView table, ByteView payload) const {
    const std::size_t segments = table.size() / kEntry;
    const Stores stores = payload.size() >= kAroundCaches ? Stores::around_caches : Stores::cached;
    const u8* from = payload.data();
    for (std::size_t index = 0; index < segments; ++index) {
        const std::optional<Segment> found = segment(table, index);
        if (!found || found->bytes > static_cast<std::size_t>(payload.data() + payload.size() - from))
            return {Status::raw_length, index};
        Xxh3 hash(kernels_);
        for_each_piece(*found, [&](const PlaneView& plane, std::size_t token, std::size_t tokens, std::size_t bytes, bool whole) {
            hash.add(from, bytes, whole ? plane.at(token) : nullptr, stores);
            const std::size_t row = bytes / tokens;
            for (std::size_t t = 0; !whole && t < tokens; ++t) write_row(plane, token + t, element_, from + t * row);
            from += bytes;
        });
        if (hash.digest() != found->checksum) return {Status::checksum, index};
    }
    return {from == payload.data() + payload.size() ? Status::ok : Status::raw_length, segments};
}

bool RawPlanes::seal(std::span<u8> object, std::size_t segments) const {
    const std::span<u8> table = object.subspan(kHeader, segments * kEntry);
    u8* to = table.data() + table.size();
    for (std::size_t index = 0; index < segments; ++index) {
        const std::optional<Segment> found = segment(table, index);
        if (!found || found->bytes > static_cast<std::size_t>(object.data() + object.size() - to)) return false;
        Xxh3 hash(kernels_);
        for_each_piece(*found, [&](const PlaneView& plane, std::size_t token, std::size_t tokens, std::size_t bytes, bool whole) {
            const std::size_t row = bytes / tokens;
            for (std::size_t t = 0; !whole && t < tokens; ++t) read_row(plane, token + t, element_, to + t * row);
            hash.add(whole ? plane.at(token) : to, bytes, whole ? to : nullptr);
            to += bytes;
        });
        store(table.data() + kEntry * index + kEntryChecksum, hash.digest());
    }
    store(object.data() + kTableChecksum, xxh3(kernels_, table));
    store(object.data() + kHeaderChecksum, xxh3(kernels_, object.first(kHeaderChecksum)));
    return to == object.data() + object.size();
}

}  // namespace kvstore
