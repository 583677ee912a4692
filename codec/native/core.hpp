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
using i16 = std::int16_t;
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
    raw_length,
    checksum,
    not_finite,
};

enum class Dtype : int { bfloat16 = 0, float16, float32, float8_e4m3fn, float8_e5m2 };

inline constexpr int kLanes = 32;
inline constexpr u32 kStateMin = 1u << 16;
inline constexpr int kSlotBits = 12;
inline constexpr u32 kSlots = 1u << kSlotBits;
inline constexpr i64 kStreamSymbols = 1 << 17, kStreamPairSymbols = 1 << 15;
inline constexpr std::size_t kWindow = 32;  // tokens coded block by block before the next come

// One plane of a caller's array: element (token, head, d) lies at the strides' sum, in bytes. In an engine's pages, token
// t is token (first_token + t) of the pages that `pages` lists. Pages may be laid out for a matrix unit: then a page's
// tokens, and the elements of a head, come in groups of so many, and the strides are those within a group. 0: no groups.
struct PlaneView {
    u8* data = nullptr;
    std::size_t tokens = 0, heads = 0, dim = 0;
    std::ptrdiff_t token_stride = 0, head_stride = 0, dim_stride = 0;
    const i64* pages = nullptr;
    std::size_t page_tokens = 0, first_token = 0;
    std::ptrdiff_t page_stride = 0;
    std::size_t token_group = 0, dim_group = 0;  // whole groups make a page, and a head
    std::ptrdiff_t token_group_stride = 0, dim_group_stride = 0;

    std::size_t channels() const { return heads * dim; }
    u8* at(std::size_t token) const {
        if (data == nullptr) return nullptr;  // a plane without components may have no memory
        if (pages == nullptr) return data + static_cast<std::ptrdiff_t>(token) * token_stride;
        const std::size_t place = first_token + token, in_page = place % page_tokens;
        u8* const page = data + static_cast<std::ptrdiff_t>(pages[place / page_tokens]) * page_stride;
        if (token_group == 0) return page + static_cast<std::ptrdiff_t>(in_page) * token_stride;
        return page + static_cast<std::ptrdiff_t>(in_page / token_group) * token_group_stride +
               static_cast<std::ptrdiff_t>(in_page % token_group) * token_stride;
    }
    // Whether a token's elements lie together.
    bool whole_rows(std::size_t bytes) const {
        const auto element = static_cast<std::ptrdiff_t>(bytes);
        return dim_group == 0 && (dim <= 1 || dim_stride == element) && (heads <= 1 || head_stride == static_cast<std::ptrdiff_t>(dim) * element);
    }
};

namespace detail {
// Copies a token's elements between the plane and a row, `to_row` or back.
template <std::size_t Bytes, bool ToRow>
void copy_row(const PlaneView& plane, std::size_t token, u8* row) {
    u8* const first = plane.at(token);
    const bool groups = plane.dim_group != 0;
    const bool together = !groups && (plane.dim <= 1 || plane.dim_stride == static_cast<std::ptrdiff_t>(Bytes));
    const std::size_t run = groups ? plane.dim_group : plane.dim;
    for (std::size_t head = 0; head < plane.heads; ++head) {
        u8* const start = first + static_cast<std::ptrdiff_t>(head) * plane.head_stride;
        if (together) {
            if constexpr (ToRow) std::memcpy(row, start, plane.dim * Bytes);
            else std::memcpy(start, row, plane.dim * Bytes);
            row += plane.dim * Bytes;
            continue;
        }
        for (std::size_t group = 0; group * run < plane.dim; ++group) {
            u8* from = start + static_cast<std::ptrdiff_t>(group) * plane.dim_group_stride;
            for (std::size_t d = 0; d < run; ++d, row += Bytes, from += plane.dim_stride) {
                if constexpr (ToRow) std::memcpy(row, from, Bytes);
                else std::memcpy(from, row, Bytes);
            }
        }
    }
}
template <bool ToRow>
void copy_row(const PlaneView& plane, std::size_t token, std::size_t bytes, u8* row) {
    if (plane.channels() == 0) return;  // such a plane has no memory
    switch (bytes) {
        case 1: return copy_row<1, ToRow>(plane, token, row);
        case 2: return copy_row<2, ToRow>(plane, token, row);
        default: return copy_row<4, ToRow>(plane, token, row);
    }
}
}  // namespace detail

inline void read_row(const PlaneView& plane, std::size_t token, std::size_t bytes, u8* row) {
    detail::copy_row<true>(plane, token, bytes, row);
}
inline void write_row(const PlaneView& plane, std::size_t token, std::size_t bytes, const u8* row) {
    detail::copy_row<false>(plane, token, bytes, const_cast<u8*>(row));
}

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

inline void append_bytes(Bytes& out, const u8* from, std::size_t count) { out.insert(out.end(), from, from + count); }

inline std::size_t element_bytes(Dtype dtype) {
    switch (dtype) {
        case Dtype::float32: return 4;
        case Dtype::bfloat16:
        case Dtype::float16: return 2;
        default: return 1;
    }
}

}  // namespace kvstore
