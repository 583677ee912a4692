// The nested lossy codec (FORMAT.md §4, reference/lossy.py): one segment at a time, with or without a profile.
//
// READ ME FIRST
//  * Buffers are sized by the caller's planes and profile, never by what a segment says.
//  * The encoder's values are at most 32760 on the finest grid, so i16 holds them on every grid.
//  * Magnitudes: coded values are below 2^100, with a profile 2^60, weights and their inverses at most 2^40 (profile.py checks), steps at most
//    2^32 and channels at most 2^20 a group, so nothing a segment or an array says makes an infinity on the way.
#pragma once

#include "gemm.hpp"
#include "statistics.hpp"
#include "window_streams.hpp"

namespace kvstore {

struct CodedPlane {
    PlaneView plane;
    RotationView rotation;
    double step_factor = 0;
};

// A profile's group (profile.py). `basis`: half-precision bits [components, channels]; null: components are channels.
struct GroupProfile {
    const float* mean = nullptr;
    const float* weight = nullptr;
    const u16* basis = nullptr;
    const u8* scale_ids = nullptr;
    std::size_t channels = 0, components = 0;
};

struct LossySegment {
    std::vector<CodedPlane> planes;
    std::span<const u16> drains;  // encoders only, unless `find_drains`
    bool find_drains = false;  // from its own planes, which are K and V of whole layers
    const GroupProfile* profile = nullptr;
    int step_quarters = 0;  // encoders only

    std::size_t tokens() const { return planes.front().plane.tokens; }
    std::size_t channels() const;
};

struct DrainLayer {
    PlaneView k, v;
};

class LossyCodec {
  public:
    LossyCodec(LossyTables tables, const Kernels& kernels, gemm::Isa gemm)
        : tables_(std::move(tables)), kernels_(kernels), gemm_(gemm) {}

    std::vector<u16> drain_tokens(std::span<const DrainLayer> layers, std::size_t sinks, Dtype dtype) const;
    // Payloads of quality layers 0…levels−1.
    Status encode(const LossySegment& segment, std::size_t sinks, Dtype dtype, int levels, Workspace& workspace,
                  std::vector<Bytes>& payloads) const;
    Status decode(const LossySegment& segment, std::span<const ByteView> payloads, std::size_t sinks, Dtype dtype,
                  Workspace& workspace) const;

  private:
    struct Grid;
    struct Flat;

    void read_planes(const LossySegment& segment, std::size_t sinks, Dtype dtype, Flat& flat,
                     std::vector<std::vector<double>>* energies) const;
    Grid measured_grid(const std::vector<Statistics>& statistics, bool drains) const;
    Grid profile_grid(const GroupProfile& profile, int step_quarters) const;
    Status read_side(ByteView payload, const LossySegment& segment, std::size_t sinks, Dtype dtype, std::vector<u16>& drains,
                     Grid& grid, std::size_t& at) const;
    class RowWriter;
    class TransformWriter;

    LossyTables tables_;
    const Kernels& kernels_;
    gemm::Isa gemm_;
};

}  // namespace kvstore
