// The calibration-free nested codec "CF" (FORMAT.md §4, reference/lossy.py): one segment at a time.
//
// READ ME FIRST
//  * Values on the finest grid are int32: at most 32767 · 9, so 3·value and value·2 never overflow.
//  * `Values` is component-major: a component's tokens lie together, as the lanes of a block read them.
//  * Buffers are sized by the caller's planes, never by what a segment says.
#pragma once

#include <numeric>
#include <optional>

#include "float_bits.hpp"
#include "rans.hpp"

namespace kvstore {

struct CodedPlane {
    PlaneView plane;
    RotationView rotation;
    double step_factor = 0;
};

struct LossyTables {
    static constexpr int kScales = 48, kValueMax = 127, kEscape = 255, kCentroids = 255;
    static constexpr int kScaleIdOffset = 8, kScaleCodedMin = 6, kDrainShift = 12;
    static constexpr std::array<int, 3> kLevelShift{0, 6, 13};

    SlotTable values, digits;
    std::vector<float> centroids;    // [48, 255]
    std::vector<double> thresholds;  // (σ/step)² from which a scale id is one more
    std::vector<double> variances;   // (σ/step)² that a scale id stands for
};

using Tokens = std::vector<u32>;

// Tokens of a segment by class; sinks are the first ones and in neither list.
struct TokenClasses {
    Tokens plain, drains;

    const Tokens& of(bool drain) const { return drain ? drains : plain; }
};

TokenClasses classify(std::size_t tokens, std::size_t sinks, std::span<const u16> drains);
std::vector<u16> drain_tokens(const PlaneView& k, const PlaneView& v, std::size_t sinks, Dtype dtype);

// What the reader must know of one plane.
struct Statistics {
    float step = 1;
    u8 mean_shift = 0;
    std::vector<i32> mean_steps;
    std::vector<u8> scale_ids;

    // Scale indices at the base step, of plain and of drain tokens; derived from the fields above.
    std::vector<int> plain_scales, drain_scales;

    float quantum() const;
    float mean(std::size_t channel) const { return static_cast<float>(mean_steps[channel]) * quantum(); }
};

class LossyCodec {
  public:
    // `vector`: use the CPU's vector instructions, which must be there.
    LossyCodec(LossyTables tables, bool vector) : tables_(std::move(tables)), vector_(vector) {}

    // Payloads of quality layers 0…levels−1.
    Status encode(std::span<const CodedPlane> planes, std::span<const u16> drains, std::size_t sinks, Dtype dtype,
                  int levels, std::vector<Bytes>& payloads) const;
    Status decode(std::span<const ByteView> payloads, std::span<const CodedPlane> planes, std::size_t sinks,
                  Dtype dtype) const;

  private:
    struct Block;
    using Values = std::vector<i32>;  // [components, stride], a component's tokens together

    void derive_scales(Statistics& statistics) const;
    Statistics measure(const std::vector<float>& flat, std::size_t channels, const TokenClasses& classes,
                       double step_factor) const;
    static std::vector<Block> blocks(std::span<const Statistics> statistics, int level, bool drains);
    void encode_streams(Bytes& out, const Values& values, std::size_t stride, std::span<const Statistics> statistics,
                        int level, const TokenClasses& classes) const;
    void encode_block(StreamEncoder& encoder, const Block& block, const Tokens& tokens, const Values& values,
                      std::size_t stride) const;
    Status decode_streams(ByteView payload, Values& values, std::size_t stride, std::span<const Statistics> statistics,
                          int level, const TokenClasses& classes) const;
    Status decode_block(StreamDecoder& stream, const Block& block, const Tokens& tokens, Values& values,
                        std::size_t stride) const;
    // Whether vector code may take a block; all of it where encoding, its first tokens (how many) where decoding.
    bool for_vector(const Block& block, const Values& values) const;
    bool encode_by_vector(StreamEncoder& stream, const Block& block, const Tokens& tokens, const Values& values,
                          std::size_t stride) const;
    std::size_t decode_by_vector(StreamDecoder& stream, const Block& block, const Tokens& tokens, Values& values,
                                 std::size_t stride) const;
    void reconstruct(const CodedPlane& coded, const Statistics& statistics, const i32* values,
                     const TokenClasses& classes, int level, Dtype dtype) const;
    // Reads side information; `at` becomes where the streams start.
    Status read_side(ByteView payload, std::span<const CodedPlane> planes, std::size_t sinks, Dtype dtype,
                     std::vector<u16>& drains, std::vector<Statistics>& statistics, std::size_t& at) const;

    LossyTables tables_;
    bool vector_;
};

}  // namespace kvstore
