// READ ME FIRST
//  * Everything here follows codec/kvstore_codec/reference/ bit for bit; FORMAT.md says the same in prose.
//  * Bytes come from strangers. Every read is bounded by a span; every count is compared with the bytes that are
//    there before anything is allocated by it. A coder returns a Status, it does not throw.
//  * All floating point is IEEE single or double, one rounding an operation (-ffp-contract=off), in the order
//    written. Reordering a sum changes the stored bytes.
//  * Integers are unsigned where they wrap or shift; signed values stay below 2^31 by the limits named here.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

static_assert(std::endian::native == std::endian::little, "the stored format is little-endian");

namespace kvstore {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i32 = std::int32_t;
using i64 = std::int64_t;
using Bytes = std::vector<u8>;
using ByteView = std::span<const u8>;

// Order and meaning are shared with kvstore_codec/native.py.
enum class Status : int {
    ok = 0,
    too_short,
    side_information,
    token_classes,
    step_range,
    stream_count,
    stream_length,
    bytes_left_over,
    state_range,
    stream_ends_early,
    stream_end,
    unknown_table,
    impossible_exponent,
    not_finite,
};

enum class Dtype : int { bfloat16 = 0, float16, float32, float8_e4m3fn, float8_e5m2 };

inline constexpr int kLanes = 32;
inline constexpr u32 kStateMin = 1u << 16;
inline constexpr int kSlotBits = 12;
inline constexpr u32 kSlots = 1u << kSlotBits;
inline constexpr i64 kStreamSymbols = 3 << 15;

// One plane: `tokens` rows of `heads * dim` elements, rows `token_stride` bytes apart.
struct PlaneView {
    u8* data = nullptr;
    std::size_t tokens = 0, heads = 0, dim = 0;
    std::ptrdiff_t token_stride = 0;

    std::size_t channels() const { return heads * dim; }
    u8* row(std::size_t token) const { return data + static_cast<std::ptrdiff_t>(token) * token_stride; }
};

// Rotation of a plane's keys: `pairs` angles a token; absent where pairs == 0.
struct RotationView {
    const float* cos = nullptr;
    const float* sin = nullptr;
    std::size_t pairs = 0;
    bool interleaved = false;
};

template <class T>
T load(const u8* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

template <class T>
void append(Bytes& out, T value) {
    const std::size_t at = out.size();
    out.resize(at + sizeof value);
    std::memcpy(out.data() + at, &value, sizeof value);
}

inline std::size_t element_bytes(Dtype dtype) {
    switch (dtype) {
        case Dtype::float32: return 4;
        case Dtype::bfloat16:
        case Dtype::float16: return 2;
        default: return 1;
    }
}

}  // namespace kvstore
