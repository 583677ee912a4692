// The streams of a segment's quality layers, a window of 32 tokens at a time (FORMAT.md §3).
//
// READ ME FIRST
//  * Memory follows the number of components, never the number of tokens: a tile of 2 KiB a block, 64 bytes a component.
//  * Windows must be asked for in order: all of one class, then all of the next, as the streams hold them.
#pragma once

#include "blocks.hpp"
#include "pages.hpp"

namespace kvstore {

// 64-byte aligned numbers; vectors are read and written whole, so sizes are rounded up.
template <class T>
class Aligned {
  public:
    // What it holds then is zeros, or what it held before.
    void reserve(std::size_t count) {
        if (count + 64 / sizeof(T) <= held_.size()) return;
        held_.assign(count + 64 / sizeof(T), T{});
        const auto address = reinterpret_cast<std::uintptr_t>(held_.data());
        data_ = held_.data() + (64 - address % 64) % 64 / sizeof(T);
    }
    T* data() { return data_; }
    const T* data() const { return data_; }
    T& operator[](std::size_t index) { return data_[index]; }
    const T& operator[](std::size_t index) const { return data_[index]; }

  private:
    std::vector<T> held_;
    T* data_ = nullptr;
};

// The memory of a window, kept from segment to segment: freed and taken again for each, it would be new pages each time.
struct Workspace {
    Aligned<i16> rows, columns, tiles;
    std::array<Aligned<i16>, 2> near;  // by class of tokens
    Pages<float> components, channels, scratch;  // of a linear transform
};

inline std::size_t padded(std::size_t components) { return (components + kLanes - 1) / kLanes * kLanes; }

// Rows of a window [32, padded components], and the same by component [padded components, 32].
class WindowBuffers {
  public:
    WindowBuffers(Workspace& workspace, std::size_t components);
    // Components that no block scatters to are zero from here on.
    void clear();
    i16* row(std::size_t token) { return rows_.data() + token * stride_; }
    std::size_t stride() const { return stride_; }
    void rows_to_columns(const Kernels& kernels);
    void columns_to_rows(const Kernels& kernels);
    // A block's tile from its components' columns, and back.
    void gather(const Kernels& kernels, std::span<const u32> components, i16* tile);
    void scatter(const Kernels& kernels, std::span<const u32> components, const i16* tile);

  private:
    std::size_t stride_;
    Aligned<i16>&rows_, &columns_;
    alignas(64) std::array<i16, kLanes> spare_{};  // where lanes without a component go to, and come from
};

class WindowDecoder {
  public:
    // `classes`: the plans of the classes of tokens that are there, in coding order (null: no such tokens). `near_tokens`:
    // how many there are of each, or 0 where near symbols are not worth their memory.
    WindowDecoder(Workspace& workspace, const Kernels& kernels, const Alphabet& alphabet,
                  std::array<const ClassPlan*, 2> classes, std::array<std::size_t, 2> near_tokens,
                  std::size_t components);
    Status open(std::span<const ByteView> sections);
    // The next `steps` tokens of class `index`; they are rows 0…steps−1 of `buffers`.
    Status next(std::size_t index, int steps, WindowBuffers& buffers);
    Status finish() const;

  private:
    void find_near(std::size_t index);
    ValueJob value_job(std::size_t level, std::size_t index, std::size_t stream, std::size_t block);
    Status decode_layer(std::size_t level, std::size_t index, int steps);

    const Kernels& kernels_;
    Alphabet alphabet_;
    std::array<const ClassPlan*, 2> classes_;
    std::array<Aligned<i16>, 2>& near_;        // near symbols (near_symbols.hpp) by class: a tile a block
    std::array<std::vector<int>, 2> reaches_;  // how far each of them reaches; empty where they are not used
    std::vector<std::vector<StreamDecoder>> streams_;  // by quality layer
    Aligned<i16>& tiles_;
};

class WindowEncoder {
  public:
    // `tokens`: how many there are of each class.
    WindowEncoder(Workspace& workspace, const Kernels& kernels, const Alphabet& alphabet,
                  std::array<const ClassPlan*, 2> classes, std::array<std::size_t, 2> tokens, int levels);
    // Backwards: the last window of the last class first. `buffers`: its rows, on the finest grid.
    void previous(std::size_t index, int steps, WindowBuffers& buffers);
    void finish(std::size_t level, Bytes& out) const { join_streams(out, streams_[level]); }

  private:
    void encode_layer(std::size_t level, std::size_t index, int steps);

    const Kernels& kernels_;
    Alphabet alphabet_;
    std::array<const ClassPlan*, 2> classes_;
    std::vector<std::vector<StreamEncoder>> streams_;
    Aligned<i16>& tiles_;
};

}  // namespace kvstore
