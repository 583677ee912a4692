// What a fuzzer's bytes ask the codec to do: a header of 24 bytes, then payloads or values.
// tests/fuzz/native_cases.py reads the same bytes in Python: change both.
//
//  at  field     meaning
//   0  dtype     mod 3 or 5
//   1  levels    1 + mod 3
//   2  tokens    1 + it, less where elements would be too many
//   3  sinks     mod 5
//   4  memory    mod 5: contiguous, gaps between tokens, every other element, pages, heads outside tokens
//   5  profile   mod 3: none, diagonal, with a basis
//   6  seed      of the profile; from 128 on it is at the limits of what a profile may hold
//   7  rotation  bit 0: planes 0, 2, … rotate; bit 1: interleaved; bit 2: one pair alone
//   8  planes    1 + mod 4
//   9  shapes    (heads − 1 mod 8, dim mod 65) of up to four planes
//  17  quarters  i8, the step exponent
//  18  fill      mod 4: any bits, finite, the same for all tokens, some tokens quiet; from 240 on there are more elements
//  19  drains    mod 3: none, to be found, every token whose byte is odd; / 3: the step factor
//  20  lengths   u16, u16: of the first two payloads
#pragma once

#include <optional>

#include "lossy.hpp"

namespace kvstore::fuzz {

// Ends the process, so that the fuzzer keeps the input.
void require(bool holds, const char* what);

struct Case {
    static constexpr std::size_t kHeaderBytes = 24;

    Dtype dtype{};
    int levels = 1, quarters = 0;
    std::size_t tokens = 1, sinks = 0;
    unsigned memory = 0, profile = 0, seed = 0, rotation = 0, fill = 0, drains = 0;
    std::vector<std::array<std::size_t, 2>> shapes;  // heads, dim
    std::array<std::size_t, 2> lengths{};
    ByteView rest;

    std::size_t channels() const;
    // In memory of their exact lengths, so that a read beyond one is seen.
    std::vector<Bytes> payloads(int levels) const;
    // The bits of all planes, token-major, plane after plane, made from `rest`.
    Bytes values() const;
    std::vector<u16> drain_tokens() const;
    double step_factor() const;
};

// None where there is no whole header.
std::optional<Case> read_case(ByteView data, unsigned dtypes);

// The planes of a case in memory of their exact size, which the codec must not leave.
class Planes {
  public:
    Planes(const Case& input, u8 background);
    Planes(const Planes&) = delete;
    Planes& operator=(const Planes&) = delete;

    const std::vector<PlaneView>& views() const { return views_; }
    void write(const Bytes& values);
    // As Case::values; with zeros for the first `sinks` tokens.
    Bytes read(std::size_t sinks = 0) const;
    // That memory between elements is as it was.
    void require_gaps_kept() const;
    bool same_memory(const Planes& other) const { return memory_ == other.memory_; }

  private:
    std::size_t bytes_;
    u8 background_;
    std::vector<Bytes> memory_;
    std::vector<i64> pages_;
    std::vector<PlaneView> views_;
};

// A segment of `planes`, with rotation and profile.
class Segment {
  public:
    Segment(const Case& input, const Planes& planes);
    Segment(const Segment&) = delete;
    Segment& operator=(const Segment&) = delete;

    LossySegment& operator*() { return segment_; }

  private:
    void add_profile(const Case& input);

    std::vector<std::vector<float>> cosines_, sines_;
    std::vector<float> mean_, weight_;
    std::vector<u16> basis_;
    Bytes scale_ids_;
    GroupProfile profile_;
    LossySegment segment_;
};

// What must be the same whatever the instruction set: the status; and what was written, where all was decoded. A stream
// that ends where it should not is noticed last, except that sinks, and rows that pass through a basis, come later still.
struct Outcome {
    Status status;
    Bytes values;
    bool operator==(const Outcome&) const = default;
};
Outcome lossy_outcome(Status status, const Planes& planes, const Case& input);
Outcome lossless_outcome(Status status, const Planes& planes);

// Set by tests/fuzz/run.py for seeds that hold what an encoder wrote: that the two languages agree on this header.
bool must_decode();

}  // namespace kvstore::fuzz
