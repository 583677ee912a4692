// READ ME FIRST
//  * Dispatch, checks of shape, blocking, and the scalar kernels; gemm.hpp has the contract.
//  * Overflow: `fits` compares by division. After it, row * stride + column of any element that exists is below the
//    length of a span, hence below 2^63.
//  * Alignment: the panel is moved up to kAlignment inside the scratch, which has that much to spare.
//  * Bounds: the blocks below are cut to the views before a kernel sees them.
#include "gemm.hpp"

#include <algorithm>
#include <cfenv>
#include <cmath>

#include "float_bits.hpp"
#include "gemm_kernels.hpp"

namespace kvstore::gemm {
namespace {

constexpr std::size_t kLanesScalar = 8, kRowsScalar = 4, kVectorsScalar = 3;
static_assert(kVectorsScalar * kLanesScalar <= kPanelColumnsMax);

// Rounding to nearest and gradual underflow, whatever a host process has set (torch.set_flush_denormal, -ffast-math).
class DefaultFloatEnvironment {
  public:
    DefaultFloatEnvironment() {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
    DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
    DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

  private:
    std::fenv_t saved_;
};

void pack_by_row(const PanelSource& from, float* panel) {
    for (std::size_t k = 0; k < from.depth; ++k, panel += from.vectors * kLanesScalar) {
        const u16* row = from.weights + k * from.stride;
        for (std::size_t c = 0; c < from.vectors * kLanesScalar; ++c)
            panel[c] = c < from.columns ? float16_to_float(row[c]) : 0.0f;
    }
}

void pack_by_column(const PanelSource& from, float* panel) {
    const std::size_t width = from.vectors * kLanesScalar;
    for (std::size_t c = 0; c < width; ++c)
        for (std::size_t k = 0; k < from.depth; ++k)
            panel[k * width + c] = c < from.columns ? float16_to_float(from.weights[c * from.stride + k]) : 0.0f;
}

// Widths are constants so that a compiler whose baseline has fused multiply-add (ARM) keeps `sums` in registers.
template <std::size_t kRows, std::size_t kVectors>
void tile(const Tile& at) {
    constexpr std::size_t kWidth = kVectors * kLanesScalar;
    float sums[kRows][kWidth] = {};
    if (!at.first)
        for (std::size_t r = 0; r < kRows; ++r) std::copy_n(at.out + r * at.stride, at.columns, sums[r]);
    const float* right = at.panel;
    for (std::size_t k = 0; k < at.depth; ++k, right += kWidth)
        for (std::size_t r = 0; r < kRows; ++r) {
            const float left = at.left[r * kRowStride + k];
            for (std::size_t c = 0; c < kWidth; ++c) sums[r][c] = std::fma(left, right[c], sums[r][c]);
        }
    for (std::size_t r = 0; r < kRows; ++r) std::copy_n(sums[r], at.columns, at.out + r * at.stride);
}

void multiply_tile(const Tile& at, std::size_t rows, std::size_t vectors) {
    static constexpr TileFunction kTiles[kRowsScalar][kVectorsScalar] = {
        {tile<1, 1>, tile<1, 2>, tile<1, 3>},
        {tile<2, 1>, tile<2, 2>, tile<2, 3>},
        {tile<3, 1>, tile<3, 2>, tile<3, 3>},
        {tile<4, 1>, tile<4, 2>, tile<4, 3>},
    };
    kTiles[rows - 1][vectors - 1](at);
}

constexpr Kernels kScalar{kLanesScalar, kRowsScalar, kVectorsScalar, pack_by_row, pack_by_column, multiply_tile};

const Kernels* kernels_of(Isa isa) {
    switch (isa) {
        case Isa::scalar: return &kScalar;
        case Isa::avx2: return avx2_kernels();
        case Isa::avx512: return avx512_kernels();
    }
    return nullptr;
}

template <class T>
bool fits(const Matrix<T>& view) {
    if (view.rows == 0 || view.columns == 0) return true;
    if (view.columns > view.values.size()) return false;
    if (view.rows == 1) return true;
    return view.stride >= view.columns && view.rows - 1 <= (view.values.size() - view.columns) / view.stride;
}

// The weights as the right factor [depth, columns].
struct Right {
    const Matrix<const u16>& weights;
    std::size_t first;  // channel
    bool by_column;     // a term is a channel, a column is a component; or the other way round

    const u16* at(std::size_t k, std::size_t c) const {
        const std::size_t component = by_column ? c : k, channel = by_column ? k : c;
        return weights.values.data() + component * weights.stride + first + channel;
    }
};

void copy_rows(const Matrix<const float>& left, std::size_t row, std::size_t rows, std::size_t k, std::size_t depth,
               float* out) {
    for (std::size_t r = 0; r < rows && depth > 0; ++r)
        std::memcpy(out + r * kRowStride, left.values.data() + (row + r) * left.stride + k, depth * sizeof(float));
}

void multiply(const Kernels& kernels, const Matrix<const float>& left, const Right& right, const Matrix<float>& out,
              std::span<float> scratch) {
    const DefaultFloatEnvironment environment;
    const std::size_t misaligned = reinterpret_cast<std::uintptr_t>(scratch.data()) % kAlignment;
    float* const panel = scratch.data() + (kAlignment - misaligned) % kAlignment / sizeof(float);
    float* const block = panel + kDepthBlock * kPanelColumnsMax;
    const auto pack = right.by_column ? kernels.pack_by_column : kernels.pack_by_row;
    const std::size_t vectors = (out.columns + kernels.lanes - 1) / kernels.lanes;
    const std::size_t panels = (vectors + kernels.vectors_max - 1) / kernels.vectors_max;

    for (std::size_t row = 0; row < out.rows; row += kTokenBlock) {
        const std::size_t rows = std::min(out.rows - row, kTokenBlock);
        std::size_t k = 0;
        do {  // once even if there is nothing to add: the sum is then 0
            const std::size_t depth = std::min(left.columns - k, kDepthBlock);
            copy_rows(left, row, rows, k, depth, block);
            std::size_t column = 0;
            for (std::size_t p = 0; p < panels; ++p) {  // of even width: a narrow one would waste loads
                const std::size_t width = vectors / panels + (p < vectors % panels ? 1 : 0);
                const std::size_t columns = std::min(out.columns - column, width * kernels.lanes);
                if (depth > 0) pack({right.at(k, column), right.weights.stride, depth, columns, width}, panel);
                for (std::size_t r = 0; r < rows; r += kernels.rows_max) {
                    float* const to = out.values.data() + (row + r) * out.stride + column;
                    kernels.multiply({block + r * kRowStride, panel, to, out.stride, depth, columns, k == 0},
                                     std::min(rows - r, kernels.rows_max), width);
                }
                column += columns;
            }
            k += depth;
        } while (k < left.columns);
    }
}

}  // namespace

bool supported(Isa isa) { return kernels_of(isa) != nullptr; }

Isa best() { return supported(Isa::avx512) ? Isa::avx512 : supported(Isa::avx2) ? Isa::avx2 : Isa::scalar; }

bool forward(Isa isa, Matrix<const float> x, Matrix<const u16> weights, Matrix<float> y, std::span<float> scratch) {
    const Kernels* kernels = kernels_of(isa);
    if (kernels == nullptr || !fits(x) || !fits(weights) || !fits(y) || x.rows != y.rows ||
        x.columns != weights.columns || y.columns > weights.rows || scratch.size() < scratch_floats(x.rows))
        return false;
    multiply(*kernels, x, {weights, 0, true}, y, scratch);
    return true;
}

bool inverse(Isa isa, Matrix<const float> y, Matrix<const u16> weights, std::size_t first_channel, Matrix<float> x,
             std::span<float> scratch) {
    const Kernels* kernels = kernels_of(isa);
    if (kernels == nullptr || !fits(x) || !fits(weights) || !fits(y) || x.rows != y.rows || y.columns > weights.rows ||
        first_channel > weights.columns || x.columns > weights.columns - first_channel ||
        scratch.size() < scratch_floats(x.rows))
        return false;
    multiply(*kernels, y, {weights, first_channel, false}, x, scratch);
    return true;
}

}  // namespace kvstore::gemm
