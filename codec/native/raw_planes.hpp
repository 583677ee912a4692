// The planes of a raw object: its payload copied into them or made from them, each byte read once and checksummed on the way.
//
// READ ME FIRST
//  * Segments are read from the object's table (FORMAT.md §2), which strangers write: each is compared with the planes before
//    anything is touched. What is in the planes when a checksum turns out wrong is unspecified.
//  * Tokens that lie together are copied while they are hashed; rows that do not are moved a few KiB at a time.
//  * The payload may be memory that somebody else writes to. It is read once where tokens lie together; elsewhere rows are
//    copied after they were hashed, so whoever shares the memory has to make sure of it afterwards.
#pragma once

#include <optional>

#include "xxh3.hpp"

namespace kvstore {

// How it went: `segment` is the first that is not what it should be, where the status is not ok.
struct RawOutcome {
    Status status = Status::ok;
    std::size_t segment = 0;
};

class RawPlanes {
  public:
    // K₀, V₀, K₁, V₁, …; elements of 1, 2 or 4 bytes.
    RawPlanes(std::vector<PlaneView> planes, std::size_t element, const Kernels& kernels)
        : planes_(std::move(planes)), element_(element), kernels_(kernels) {}

    // Bytes of the payload.
    std::size_t bytes() const;
    // Copies a payload into the planes.
    RawOutcome write(ByteView table, ByteView payload) const;
    // `object`: a header and a table of `segments`, whose checksums it does not have yet, then room for the payload. Fills in
    // all of them. False where the table does not fit the planes.
    bool seal(std::span<u8> object, std::size_t segments) const;

  private:
    struct Segment {
        std::size_t first, last, step;  // planes
        std::size_t bytes;
        u64 checksum;
    };
    std::optional<Segment> segment(ByteView table, std::size_t index) const;
    std::size_t plane_bytes(const PlaneView& plane) const { return plane.tokens * plane.channels() * element_; }
    template <class Job>
    void for_each_piece(const Segment& segment, const Job& job) const;

    std::vector<PlaneView> planes_;
    std::size_t element_;
    const Kernels& kernels_;
};

}  // namespace kvstore
