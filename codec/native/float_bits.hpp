// Stored floats to float32 and back (round to nearest even, clamped to the largest finite value), and rotation.
#pragma once

#include <cmath>

#include "core.hpp"

namespace kvstore {

inline float float16_to_float(u16 bits) {
    const u32 sign = static_cast<u32>(bits & 0x8000u) << 16;
    const u32 exponent = bits >> 10 & 0x1Fu, mantissa = bits & 0x3FFu;
    if (exponent == 0x1F) return std::bit_cast<float>(sign | 0x7F800000u | mantissa << 13);
    if (exponent != 0) return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
    const float tiny = static_cast<float>(mantissa) * 0x1p-24f;  // exact
    return sign ? -tiny : tiny;
}

inline u16 float_to_float16(float value) {
    const u32 word = std::bit_cast<u32>(value);
    const u32 sign = word >> 16 & 0x8000u;
    const float magnitude = std::fabs(value);
    if (magnitude >= 65504.0f) return static_cast<u16>(sign | 0x7BFFu);
    if (magnitude < 0x1p-14f)  // subnormal: adding 0.5 aligns the unit of 2^-24 with float32's last bit
        return static_cast<u16>(sign | (std::bit_cast<u32>(magnitude + 0.5f) - 0x3F000000u));
    const u32 bits = std::bit_cast<u32>(magnitude);
    return static_cast<u16>(sign | (((bits + 0xFFFu + (bits >> 13 & 1u)) >> 13) - (112u << 10)));
}

// Of float16 and float32; bfloat16 is the kernels' business.
inline void row_to_float(const u8* row, std::size_t count, Dtype dtype, float* out) {
    switch (dtype) {
        case Dtype::float16:
            for (std::size_t i = 0; i < count; ++i) out[i] = float16_to_float(load<u16>(row + 2 * i));
            break;
        default: if (count > 0) std::memcpy(out, row, 4 * count);  // a plane without components has no memory
    }
}

inline void row_from_float(const float* values, std::size_t count, Dtype dtype, u8* row) {
    switch (dtype) {
        case Dtype::float16:
            for (std::size_t i = 0; i < count; ++i) {
                const u16 bits = float_to_float16(values[i]);
                std::memcpy(row + 2 * i, &bits, 2);
            }
            break;
        default: if (count > 0) std::memcpy(row, values, 4 * count);
    }
}

// Sum in the order of reference/numerics.py sum_rows: 16 lanes, then halves.
class LaneSum {
  public:
    void add(std::size_t index, double value) { lanes_[index % 16] += value; }
    double total() {
        for (std::size_t half = 8; half > 0; half /= 2)
            for (std::size_t i = 0; i < half; ++i) lanes_[i] += lanes_[i + half];
        return lanes_[0];
    }

  private:
    std::array<double, 16> lanes_{};
};

}  // namespace kvstore
