// READ ME FIRST
//  * Every element of a product is one chain of fused multiply-adds in binary32, from +0, in ascending order of the
//    summed index: acc = fma(a[t][k], b[k][c], acc). Nothing splits a sum, so every instruction set, blocking and
//    division of the work gives the same bits. (Finite inputs; the payload of a NaN is not promised.)
//  * The rounding mode and flush-to-zero flags of the calling thread are set aside for the duration of a call.
//  * Overflow: sizes are std::size_t. A view is checked by division before anything is indexed, so every offset that is
//    formed later lies inside a span and cannot wrap.
//  * Alignment: none is asked of the caller beyond that of the element type.
//  * Bounds: nothing outside the rows and columns of a view is read or written, not even between rows.
//  * Outputs and scratch may not overlap each other or any input. Calls share no state: threads may run at once.
#pragma once

#include <span>

#include "core.hpp"

namespace kvstore::gemm {

enum class Isa : int { scalar = 0, avx2, avx512 };

// Whether this build has it and this CPU can run it.
bool supported(Isa isa);
// The fastest that is supported.
Isa best();

// Row-major: element (r, c) is values[r * stride + c].
template <class T>
struct Matrix {
    std::span<T> values;
    std::size_t rows = 0, columns = 0, stride = 0;
};

inline constexpr std::size_t kTokenBlock = 256;  // tokens that share one conversion of the weights
inline constexpr std::size_t kDepthBlock = 384;  // terms added before accumulators go back to the output
inline constexpr std::size_t kPanelColumnsMax = 48;
inline constexpr std::size_t kRowStride = kDepthBlock + 16;  // a cache line apart, or equal steps would share L1 sets
inline constexpr std::size_t kAlignment = 64;

// Elements of scratch that a call with at most `tokens` rows needs, whatever the other sizes; at most 473 KiB.
constexpr std::size_t scratch_floats(std::size_t tokens) {
    const std::size_t rows = tokens < kTokenBlock ? tokens : kTokenBlock;
    return rows * kRowStride + kDepthBlock * kPanelColumnsMax + kAlignment / sizeof(float);
}
static_assert(scratch_floats(~std::size_t{0}) * sizeof(float) <= 512 * 1024);

// `weights` are IEEE half bits [components, channels]. Both return false, having written nothing, where shapes
// disagree, a span is too short for its view, rows of a view overlap, scratch is too small, or `isa` is not supported.

// y[t][j] = sum over i of x[t][i] * weights[j][i], for the first y.columns components.
[[nodiscard]] bool forward(Isa isa, Matrix<const float> x, Matrix<const u16> weights, Matrix<float> y,
                           std::span<float> scratch);

// x[t][c] = sum over j of y[t][j] * weights[j][first_channel + c], over the first y.columns components.
[[nodiscard]] bool inverse(Isa isa, Matrix<const float> y, Matrix<const u16> weights, std::size_t first_channel,
                           Matrix<float> x, std::span<float> scratch);

}  // namespace kvstore::gemm
