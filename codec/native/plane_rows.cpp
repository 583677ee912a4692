#include "plane_rows.hpp"

namespace kvstore {

void to_float(const Kernels& kernels, const PlaneView& plane, std::size_t token, Dtype dtype, Bytes& spare, float* out) {
    const std::size_t bytes = element_bytes(dtype), channels = plane.channels();
    const u8* row = plane.at(token);
    if (!plane.whole_rows(bytes)) {
        spare.resize(channels * bytes);
        read_row(plane, token, bytes, spare.data());
        row = spare.data();
    }
    if (dtype == Dtype::bfloat16) kernels.bfloat16_to_float(row, channels, out);
    else row_to_float(row, channels, dtype, out);
}

void rotate_row(const Kernels& kernels, float* row, const PlaneView& plane, const RotationView& rotation, std::size_t token,
                float direction) {
    const float* cos = rotation.cos + token * rotation.pairs;
    const float* sin = rotation.sin + token * rotation.pairs;
    for (std::size_t head = 0; head < plane.heads; ++head, row += plane.dim) {
        if (!rotation.interleaved) {
            kernels.rotate(row, row + rotation.pairs, cos, sin, rotation.pairs, direction);
            continue;
        }
        for (std::size_t pair = 0; pair < rotation.pairs; ++pair)
            kernels.rotate(row + 2 * pair, row + 2 * pair + 1, cos + pair, sin + pair, 1, direction);
    }
}

void append_sinks(Bytes& out, const LossySegment& segment, std::size_t sinks, Dtype dtype) {
    Bytes row;
    for (const CodedPlane& coded : segment.planes)
        for (std::size_t token = 0; token < sinks; ++token) {
            row.resize(coded.plane.channels() * element_bytes(dtype));
            read_row(coded.plane, token, element_bytes(dtype), row.data());
            append_bytes(out, row.data(), row.size());
        }
}

std::size_t sink_bytes(const LossySegment& segment, std::size_t sinks, Dtype dtype) {
    return sinks * segment.channels() * element_bytes(dtype);
}

bool PlaneWriter::restore(const CodedPlane& coded, std::span<const u32> tokens, const i16* values, std::size_t stride,
                          const GridView& grid) {
    const PlaneView& plane = coded.plane;
    const RotationView& rotation = coded.rotation;
    const bool rotated = rotation.pairs > 0;
    if (dtype_ != Dtype::bfloat16 || plane.channels() == 0 || !plane.whole_rows(2) ||
        (rotated && (rotation.interleaved || 2 * rotation.pairs != plane.dim)))
        return false;
    RowWindow window{values, stride, static_cast<int>(tokens.size()), {}, {}, {}};
    for (std::size_t t = 0; t < tokens.size(); ++t) {
        window.rows[t] = plane.at(tokens[t]);
        window.cos[t] = rotation.cos + tokens[t] * rotation.pairs;
        window.sin[t] = rotation.sin + tokens[t] * rotation.pairs;
    }
    if (rotated) kernels_.restore_rotated_bfloat16(window, plane.heads, rotation.pairs, grid);
    else kernels_.restore_bfloat16(window, plane.channels(), grid);
    return true;
}

void PlaneWriter::write(const CodedPlane& coded, std::size_t token, float* row) {
    const PlaneView& plane = coded.plane;
    const std::size_t channels = plane.channels(), bytes = element_bytes(dtype_);
    if (channels == 0) return;
    if (coded.rotation.pairs > 0) rotate_row(kernels_, row, plane, coded.rotation, token, 1.0f);
    const bool in_place = plane.whole_rows(bytes);
    if (!in_place) spare_.resize(channels * bytes);
    u8* const to = in_place ? plane.at(token) : spare_.data();
    if (dtype_ == Dtype::bfloat16) kernels_.float_to_bfloat16(row, channels, to);
    else row_from_float(row, channels, dtype_, to);
    if (!in_place) write_row(plane, token, bytes, to);
}

}  // namespace kvstore
