// Rows of a plane as floats and back: conversion, rotation, the caller's strides (FORMAT.md §4.4).
//
// READ ME FIRST
//  * A row's memory may be unaligned, strided or in pages; only whole rows of bfloat16 take the fast ways.
//  * Rotation tables have one row a token of the plane (bind.cpp checks).
#pragma once

#include "lossy.hpp"

namespace kvstore {

// One token's elements; `spare` is used where they do not lie together.
void to_float(const Kernels& kernels, const PlaneView& plane, std::size_t token, Dtype dtype, Bytes& spare, float* out);

// Rotates one token's keys in place by its angles, or back (`direction` −1).
void rotate_row(const Kernels& kernels, float* row, const PlaneView& plane, const RotationView& rotation, std::size_t token,
                float direction);

// The raw rows of the first `sinks` tokens, plane by plane.
void append_sinks(Bytes& out, const LossySegment& segment, std::size_t sinks, Dtype dtype);
std::size_t sink_bytes(const LossySegment& segment, std::size_t sinks, Dtype dtype);

// Finished rows into the caller's planes.
class PlaneWriter {
  public:
    PlaneWriter(const Kernels& kernels, Dtype dtype) : kernels_(kernels), dtype_(dtype) {}
    // Integers, the common case in one pass over a window's rows; false for any other.
    bool restore(const CodedPlane& coded, std::span<const u32> tokens, const i16* values, std::size_t stride,
                 const GridView& grid);
    // Floats, which are rotated in place.
    void write(const CodedPlane& coded, std::size_t token, float* row);

  private:
    const Kernels& kernels_;
    Dtype dtype_;
    Bytes spare_;
};

}  // namespace kvstore
