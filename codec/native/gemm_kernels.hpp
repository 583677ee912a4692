// READ ME FIRST
//  * What an instruction set provides for gemm.cpp, which alone calls it, with sizes that it has checked.
//  * Overflow: `depth` <= kDepthBlock, `rows` and `columns` fit one tile; a stride passes as it came and is only ever
//    multiplied by the index of a row that exists.
//  * Alignment: `panel` is aligned to kAlignment; the rest to its element type alone.
//  * Bounds: a panel holds depth * vectors * lanes floats, zero where it has no column; weights and output are touched
//    in the columns that exist, and nowhere else.
#pragma once

#include "gemm.hpp"

namespace kvstore::gemm {

// A piece of the weights [depth, columns] that becomes panel[k * vectors * lanes + c].
struct PanelSource {
    const u16* weights;  // of element (0, 0)
    std::size_t stride;  // of the weights' rows
    std::size_t depth, columns, vectors;
};

struct Tile {
    const float* left;  // rows kRowStride apart
    const float* panel;
    float* out;
    std::size_t stride;  // of the output's rows
    std::size_t depth, columns;
    bool first;  // start from 0, not from what the output holds
};

using TileFunction = void (*)(const Tile&);

// A tile has at most `rows_max` rows and a panel `vectors_max` vectors of `lanes` columns: as many sums as fit the
// registers beside one panel vector each and one element of the left factor.
struct Kernels {
    std::size_t lanes, rows_max, vectors_max;
    void (*pack_by_row)(const PanelSource&, float* panel);     // term k is a row of the weights
    void (*pack_by_column)(const PanelSource&, float* panel);  // term k is a column of the weights
    void (*multiply)(const Tile&, std::size_t rows, std::size_t vectors);
};

// Null where this build or this CPU lacks the instructions.
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace kvstore::gemm
