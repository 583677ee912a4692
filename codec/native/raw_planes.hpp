// The planes of a raw object: its payload copied into them or made from them, each byte read once and checksummed on the way.
//
// READ ME FIRST
//  * Segments are read from the object's table (FORMAT.md §2), which strangers write: each is compared with the planes before
//    anything is touched. What is in the planes when a checksum turns out wrong is unspecified.
//  * Tokens that lie together are copied while they are hashed; rows that do not are moved a few KiB at a time.
//  * The payload may be memory that somebody else writes to. It is read once where tokens lie together; elsewhere rows are
//    copied after they were hashed, so whoever shares the memory has to make sure of it afterwards.
//  * Planes may hold more tokens than an object has: a Window says which of them are the object's.
#pragma once

#include <optional>

#include "xxh3.hpp"

namespace kvstore {

// How it went: `segment` is the first that is not what it should be, where the status is not ok.
struct RawOutcome {
    Status status = Status::ok;
    std::size_t segment = 0;
};

// Some tokens of planes, which hold at least those.
struct Window {
    std::size_t first = 0, tokens = 0;
};

class RawPlanes {
  public:
    // K₀, V₀, K₁, V₁, …; elements of 1, 2 or 4 bytes.
    RawPlanes(std::vector<PlaneView> planes, std::size_t element, const Kernels& kernels)
        : planes_(std::move(planes)), element_(element), kernels_(kernels) {}

    // Of the plane that has the fewest.
    std::size_t tokens() const;
    // Bytes of the payload of an object of all tokens, or of a window.
    std::size_t bytes(std::optional<Window> window = {}) const;
    // Copies a payload into the planes.
    RawOutcome write(ByteView table, ByteView payload) const;
    // `object`: a header and a table of `segments`, whose checksums it does not have yet, then room for the payload. Fills in
    // all of them. False where the table does not fit the planes.
    bool seal(std::span<u8> object, std::size_t segments) const;

  private:
    friend class RawWriter;

    struct Segment {
        std::size_t first, last, step;  // planes
        std::size_t bytes;
        u64 checksum;
    };
    std::optional<Segment> segment(ByteView table, std::size_t index, std::optional<Window> window) const;
    PlaneView plane(std::size_t index, std::optional<Window> window) const;
    std::size_t plane_bytes(const PlaneView& plane) const { return plane.tokens * plane.channels() * element_; }

    std::vector<PlaneView> planes_;
    std::size_t element_;
    const Kernels& kernels_;
};

// A payload on its way into planes, in pieces as they come. Planes and table stay where they are meanwhile.
class RawWriter {
  public:
    // `payload_bytes`: of all of it. No window: all tokens.
    RawWriter(const RawPlanes& planes, ByteView table, std::size_t payload_bytes, std::optional<Window> window = {})
        : planes_(planes), table_(table), window_(window), left_(payload_bytes),
          stores_(payload_bytes >= kAroundCaches ? Stores::around_caches : Stores::cached) {}

    // Copies the next bytes, as many of them as are whole rows: how many. What is left over is to be there again next time.
    std::size_t take(ByteView bytes);
    // Whether nothing more is taken: all segments are there, or one is at fault.
    bool ended() const { return status_ != Status::ok || segment_ == segments(); }
    RawOutcome outcome() const { return {status_, segment_}; }

  private:
    // From here on a payload is larger than what caches will keep of it.
    static constexpr std::size_t kAroundCaches = 512 << 10;

    std::size_t segments() const;
    bool begin_segment();
    // Of the next rows of the open segment: those that lie together, or a few. Bytes taken, 0 where not even one row is there.
    std::size_t take_rows(ByteView bytes);

    const RawPlanes& planes_;
    const ByteView table_;
    const std::optional<Window> window_;
    std::size_t left_;  // bytes of the payload
    const Stores stores_;
    Status status_ = Status::ok;
    std::size_t segment_ = 0;
    std::optional<RawPlanes::Segment> open_;  // that segment, once its first bytes are asked for
    std::optional<Xxh3> hash_;                // of it so far
    PlaneView plane_;                         // where it goes on:
    std::size_t plane_index_ = 0, token_ = 0;
};

}  // namespace kvstore
