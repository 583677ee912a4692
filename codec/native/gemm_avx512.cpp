// READ ME FIRST
//  * Tiles of 8 tokens by 48 columns for AVX-512. This file's functions alone are compiled for it, by attribute; none
//    runs before avx512_kernels has looked at the CPU.
//  * Overflow: see gemm_kernels.hpp; masks are made from counts of 1..16.
//  * Alignment: the panel's vectors are aligned; weights, rows and output are read and written unaligned.
//  * Bounds: a last vector that is not full goes through a mask, and a masked lane is neither read nor written.
#include "gemm_kernels.hpp"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <algorithm>

#if !defined(__clang__)  // GCC 12 takes its own header's _mm512_undefined_ps for a mistake (bug 105593)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#if defined(__clang__)
#define KVSTORE_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KVSTORE_UNROLL _Pragma("GCC unroll 16")
#endif

namespace kvstore::gemm {
namespace {

#define KVSTORE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))

constexpr std::size_t kLanes512 = 16, kRows512 = 8, kVectors512 = 3;
static_assert(kVectors512 * kLanes512 <= kPanelColumnsMax);

// The first `count` of 16 lanes.
KVSTORE_AVX512 inline __mmask16 first_lanes(std::size_t count) {
    return static_cast<__mmask16>(count >= kLanes512 ? 0xFFFFu : (1u << count) - 1u);
}

KVSTORE_AVX512 void pack_by_row(const PanelSource& from, float* panel) {
    const std::size_t full = from.vectors - 1;
    const __mmask16 last = first_lanes(from.columns - full * kLanes512);
    for (std::size_t k = 0; k < from.depth; ++k) {
        const u16* row = from.weights + k * from.stride;
        for (std::size_t v = 0; v < full; ++v, row += kLanes512, panel += kLanes512)
            _mm512_store_ps(panel, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row))));
        _mm512_store_ps(panel, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(last, row)));
        panel += kLanes512;
    }
}

// 16 rows of 16 halves, of which `rows` and the lanes of `terms` exist, to 16 terms of a panel's vector, `width` apart.
KVSTORE_AVX512 inline void transpose(const u16* weights, std::size_t stride, std::size_t rows, __mmask16 terms,
                                     std::size_t depth, float* panel, std::size_t width) {
    // Register i: rows i and i + 8. Unpacking thrice transposes 8 by 8 halves within each 128 bits.
    __m512i a[8], b[8];
    KVSTORE_UNROLL
    for (std::size_t i = 0; i < 8; ++i) {
        const std::size_t low = std::min(i, rows - 1), high = std::min(i + 8, rows - 1);
        a[i] = _mm512_inserti64x4(
            _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(i < rows ? terms : __mmask16{0}, weights + low * stride)),
            _mm256_maskz_loadu_epi16(i + 8 < rows ? terms : __mmask16{0}, weights + high * stride), 1);
    }
    KVSTORE_UNROLL
    for (std::size_t i = 0; i < 4; ++i) {
        b[2 * i] = _mm512_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
    }
    // b[2i]: terms 0..3 of rows 2i, 2i+1; b[2i+1]: terms 4..7
    KVSTORE_UNROLL
    for (std::size_t i = 0; i < 2; ++i) {
        KVSTORE_UNROLL
        for (std::size_t h = 0; h < 2; ++h) {
            a[4 * i + 2 * h] = _mm512_unpacklo_epi32(b[4 * i + h], b[4 * i + 2 + h]);
            a[4 * i + 2 * h + 1] = _mm512_unpackhi_epi32(b[4 * i + h], b[4 * i + 2 + h]);
        }
    }
    // a[4i + p]: terms 2p, 2p+1 of rows 4i..4i+3
    KVSTORE_UNROLL
    for (std::size_t p = 0; p < 4; ++p) {
        b[2 * p] = _mm512_unpacklo_epi64(a[p], a[4 + p]);
        b[2 * p + 1] = _mm512_unpackhi_epi64(a[p], a[4 + p]);
    }
    // b[t]: term t of rows 0..7, term t + 8 of rows 0..7, then the same of rows 8..15
    KVSTORE_UNROLL
    for (std::size_t t = 0; t < 8; ++t) {
        const __m512i ordered = _mm512_shuffle_i64x2(b[t], b[t], 0b11011000);
        if (t < depth) _mm512_store_ps(panel + t * width, _mm512_cvtph_ps(_mm512_castsi512_si256(ordered)));
        if (t + 8 < depth)
            _mm512_store_ps(panel + (t + 8) * width, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(ordered, 1)));
    }
}

KVSTORE_AVX512 void pack_by_column(const PanelSource& from, float* panel) {
    const std::size_t width = from.vectors * kLanes512;
    for (std::size_t v = 0; v < from.vectors; ++v) {
        const std::size_t column = v * kLanes512, rows = std::min(from.columns - column, kLanes512);
        const u16* weights = from.weights + column * from.stride;
        for (std::size_t k = 0; k < from.depth; k += kLanes512) {
            const std::size_t depth = std::min(from.depth - k, kLanes512);
            transpose(weights + k, from.stride, rows, first_lanes(depth), depth, panel + k * width + column, width);
        }
    }
}

template <std::size_t kRows, std::size_t kVectors>
KVSTORE_AVX512 void tile(const Tile& at) {
    const __mmask16 last = first_lanes(at.columns - (kVectors - 1) * kLanes512);
    __m512 sums[kRows][kVectors];
    KVSTORE_UNROLL
    for (std::size_t r = 0; r < kRows; ++r) {
        KVSTORE_UNROLL
        for (std::size_t v = 0; v < kVectors; ++v)
            sums[r][v] = at.first ? _mm512_setzero_ps()
                                  : _mm512_maskz_loadu_ps(v + 1 < kVectors ? __mmask16{0xFFFF} : last,
                                                          at.out + r * at.stride + v * kLanes512);
    }
    const float* right = at.panel;
    const float* left = at.left;
    for (std::size_t k = 0; k < at.depth; ++k, ++left, right += kVectors * kLanes512) {
        __m512 b[kVectors];
        KVSTORE_UNROLL
        for (std::size_t v = 0; v < kVectors; ++v) b[v] = _mm512_load_ps(right + v * kLanes512);
        KVSTORE_UNROLL
        for (std::size_t r = 0; r < kRows; ++r) {
            const __m512 a = _mm512_set1_ps(left[r * kRowStride]);
            KVSTORE_UNROLL
            for (std::size_t v = 0; v < kVectors; ++v) sums[r][v] = _mm512_fmadd_ps(a, b[v], sums[r][v]);
        }
    }
    KVSTORE_UNROLL
    for (std::size_t r = 0; r < kRows; ++r) {
        KVSTORE_UNROLL
        for (std::size_t v = 0; v < kVectors; ++v)
            _mm512_mask_storeu_ps(at.out + r * at.stride + v * kLanes512,
                                  v + 1 < kVectors ? __mmask16{0xFFFF} : last, sums[r][v]);
    }
}

void multiply_tile(const Tile& at, std::size_t rows, std::size_t vectors) {
    static constexpr TileFunction kTiles[kRows512][kVectors512] = {
        {tile<1, 1>, tile<1, 2>, tile<1, 3>}, {tile<2, 1>, tile<2, 2>, tile<2, 3>},
        {tile<3, 1>, tile<3, 2>, tile<3, 3>}, {tile<4, 1>, tile<4, 2>, tile<4, 3>},
        {tile<5, 1>, tile<5, 2>, tile<5, 3>}, {tile<6, 1>, tile<6, 2>, tile<6, 3>},
        {tile<7, 1>, tile<7, 2>, tile<7, 3>}, {tile<8, 1>, tile<8, 2>, tile<8, 3>},
    };
    kTiles[rows - 1][vectors - 1](at);
}

constexpr Kernels kAvx512{kLanes512, kRows512, kVectors512, pack_by_row, pack_by_column, multiply_tile};

}  // namespace

const Kernels* avx512_kernels() {
    static const bool can = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return can ? &kAvx512 : nullptr;
}

}  // namespace kvstore::gemm

#else

namespace kvstore::gemm {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace kvstore::gemm

#endif
