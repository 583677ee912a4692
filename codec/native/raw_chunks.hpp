// Raw objects of the chunks of one prompt, each into its place among planes that hold all of them.
//
// READ ME FIRST
//  * Read is only what begins as the encoder's own object of that chunk does: `head` is its header and segment table (FORMAT.md
//    §1, §2), in which an object may differ by its checksums, which are compared with its bytes, and by a provenance up to the
//    worst that is wanted. What begins otherwise (`other`) touches nothing: the general way says what it is.
//  * A head is copied before it is looked at: the memory may be somebody else's. For the payload see raw_planes.hpp.
#pragma once

#include "raw_planes.hpp"

namespace kvstore {

// `hash`: 32 bytes; `position`: of its first token in the prompt.
struct RawChunk {
    ByteView head;
    const u8* hash;
    u64 position;
    Window window;
    u8 provenance_max;
};

// One chunk's object, in pieces as they come. Planes, and what the chunk points at, stay where they are meanwhile.
class RawChunkReader {
  public:
    // `damaged`: `segment` is at fault, and what is in the window is unspecified.
    enum class State : int { reading, done, other, damaged };

    // `head` fits the window (`fits`).
    RawChunkReader(const RawPlanes& planes, const Kernels& kernels, const RawChunk& chunk)
        : planes_(planes), kernels_(kernels), chunk_(chunk) {}

    // Whether a head is one of as many payload bytes as the window has.
    static bool fits(const RawPlanes& planes, const RawChunk& chunk);

    // Takes as much as it can of the next bytes: how much. What is left over is to be there again next time.
    std::size_t take(ByteView bytes);
    State state() const { return state_; }
    std::size_t segment() const { return writer_ ? writer_->outcome().segment : 0; }

  private:
    bool is_the_chunks() const;

    const RawPlanes& planes_;
    const Kernels& kernels_;
    const RawChunk chunk_;
    State state_ = State::reading;
    std::vector<u8> head_;
    std::optional<RawWriter> writer_;  // once the head is there
};

}  // namespace kvstore
