// READ ME FIRST
//  * Tiles of 6 tokens by 16 columns for AVX2 with FMA3 and F16C. This file's functions alone are compiled for them, by
//    attribute; none runs before avx2_kernels has looked at the CPU.
//  * Overflow: see gemm_kernels.hpp; masks and partial copies are made from counts of 1..8.
//  * Alignment: the panel's vectors are aligned; weights, rows and output are read and written unaligned.
//  * Bounds: a vector of halves that is not full is copied first; the last vector of an output goes through a mask, and
//    a masked lane is neither read nor written.
#include "gemm_kernels.hpp"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>

#if defined(__clang__)
#define KVSTORE_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KVSTORE_UNROLL _Pragma("GCC unroll 8")
#endif

namespace kvstore::gemm {
namespace {

#define KVSTORE_AVX2 __attribute__((target("avx2,fma,f16c")))

constexpr std::size_t kLanes256 = 8, kRows256 = 6, kVectors256 = 2;
static_assert(kVectors256 * kLanes256 <= kPanelColumnsMax);

// `count` halves (at most 8), then zeros.
KVSTORE_AVX2 inline __m128i load_halves(const u16* from, std::size_t count) {
    if (count >= kLanes256) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    alignas(16) u16 halves[kLanes256] = {};
    std::memcpy(halves, from, count * sizeof(u16));
    return _mm_load_si128(reinterpret_cast<const __m128i*>(halves));
}

KVSTORE_AVX2 void pack_by_row(const PanelSource& from, float* panel) {
    for (std::size_t k = 0; k < from.depth; ++k)
        for (std::size_t c = 0; c < from.vectors * kLanes256; c += kLanes256, panel += kLanes256)
            _mm256_store_ps(panel, _mm256_cvtph_ps(load_halves(from.weights + k * from.stride + c, from.columns - c)));
}

// 8 rows of 8 halves, of which `rows` and `depth` terms exist, to 8 terms of a panel's vector, `width` apart.
KVSTORE_AVX2 inline void transpose(const u16* weights, std::size_t stride, std::size_t rows, std::size_t depth,
                                   float* panel, std::size_t width) {
    __m128i a[8], b[8];
    KVSTORE_UNROLL
    for (std::size_t i = 0; i < 8; ++i)
        a[i] = i < rows ? load_halves(weights + i * stride, depth) : _mm_setzero_si128();
    KVSTORE_UNROLL
    for (std::size_t i = 0; i < 4; ++i) {
        b[2 * i] = _mm_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
    }
    // b[2i]: terms 0..3 of rows 2i, 2i+1; b[2i+1]: terms 4..7
    KVSTORE_UNROLL
    for (std::size_t i = 0; i < 2; ++i) {
        KVSTORE_UNROLL
        for (std::size_t h = 0; h < 2; ++h) {
            a[4 * i + 2 * h] = _mm_unpacklo_epi32(b[4 * i + h], b[4 * i + 2 + h]);
            a[4 * i + 2 * h + 1] = _mm_unpackhi_epi32(b[4 * i + h], b[4 * i + 2 + h]);
        }
    }
    // a[4i + p]: terms 2p, 2p+1 of rows 4i..4i+3
    KVSTORE_UNROLL
    for (std::size_t p = 0; p < 4; ++p) {
        b[2 * p] = _mm_unpacklo_epi64(a[p], a[4 + p]);
        b[2 * p + 1] = _mm_unpackhi_epi64(a[p], a[4 + p]);
    }
    KVSTORE_UNROLL
    for (std::size_t t = 0; t < 8; ++t)
        if (t < depth) _mm256_store_ps(panel + t * width, _mm256_cvtph_ps(b[t]));
}

KVSTORE_AVX2 void pack_by_column(const PanelSource& from, float* panel) {
    const std::size_t width = from.vectors * kLanes256;
    for (std::size_t c = 0; c < width; c += kLanes256)
        for (std::size_t k = 0; k < from.depth; k += kLanes256)
            transpose(from.weights + c * from.stride + k, from.stride, std::min(from.columns - c, kLanes256),
                      std::min(from.depth - k, kLanes256), panel + k * width + c, width);
}

template <std::size_t kRows, std::size_t kVectors>
KVSTORE_AVX2 void tile(const Tile& at) {
    const int count = static_cast<int>(at.columns - (kVectors - 1) * kLanes256);
    const __m256i last = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256 sums[kRows][kVectors];
    KVSTORE_UNROLL
    for (std::size_t r = 0; r < kRows; ++r) {
        KVSTORE_UNROLL
        for (std::size_t v = 0; v < kVectors; ++v) {
            const float* from = at.out + r * at.stride + v * kLanes256;
            sums[r][v] = at.first           ? _mm256_setzero_ps()
                         : v + 1 < kVectors ? _mm256_loadu_ps(from)
                                            : _mm256_maskload_ps(from, last);
        }
    }
    const float* right = at.panel;
    const float* left = at.left;
    for (std::size_t k = 0; k < at.depth; ++k, ++left, right += kVectors * kLanes256) {
        __m256 b[kVectors];
        KVSTORE_UNROLL
        for (std::size_t v = 0; v < kVectors; ++v) b[v] = _mm256_load_ps(right + v * kLanes256);
        KVSTORE_UNROLL
        for (std::size_t r = 0; r < kRows; ++r) {
            const __m256 a = _mm256_set1_ps(left[r * kRowStride]);
            KVSTORE_UNROLL
            for (std::size_t v = 0; v < kVectors; ++v) sums[r][v] = _mm256_fmadd_ps(a, b[v], sums[r][v]);
        }
    }
    KVSTORE_UNROLL
    for (std::size_t r = 0; r < kRows; ++r) {
        float* to = at.out + r * at.stride;
        KVSTORE_UNROLL
        for (std::size_t v = 0; v + 1 < kVectors; ++v) _mm256_storeu_ps(to + v * kLanes256, sums[r][v]);
        _mm256_maskstore_ps(to + (kVectors - 1) * kLanes256, last, sums[r][kVectors - 1]);
    }
}

void multiply_tile(const Tile& at, std::size_t rows, std::size_t vectors) {
    static constexpr TileFunction kTiles[kRows256][kVectors256] = {
        {tile<1, 1>, tile<1, 2>}, {tile<2, 1>, tile<2, 2>}, {tile<3, 1>, tile<3, 2>},
        {tile<4, 1>, tile<4, 2>}, {tile<5, 1>, tile<5, 2>}, {tile<6, 1>, tile<6, 2>},
    };
    kTiles[rows - 1][vectors - 1](at);
}

constexpr Kernels kAvx2{kLanes256, kRows256, kVectors256, pack_by_row, pack_by_column, multiply_tile};

// Not among the names that every compiler's __builtin_cpu_supports knows.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

}  // namespace

const Kernels* avx2_kernels() {
    static const bool can = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    return can ? &kAvx2 : nullptr;
}

}  // namespace kvstore::gemm

#else

namespace kvstore::gemm {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace kvstore::gemm

#endif
