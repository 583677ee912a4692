// Loops over rows that compilers vectorise, included once for each instruction set, in its namespace, with
// KVSTORE_TARGET naming the instructions. Every operation is exact or rounds once; none is reordered.

KVSTORE_TARGET void bfloat16_to_float(const u8* row, std::size_t count, float* out) {
    for (std::size_t i = 0; i < count; ++i) {
        u16 bits;
        __builtin_memcpy(&bits, row + 2 * i, 2);
        const u32 word = static_cast<u32>(bits) << 16;
        __builtin_memcpy(out + i, &word, 4);
    }
}

// To nearest, ties to even; subnormal floats become zeros, as the CPU's own conversion has it. Nothing that is decoded
// reaches the largest finite number (lossy.hpp), so nothing rounds to infinity.
KVSTORE_TARGET __attribute__((always_inline)) inline u16 bfloat16_of(float value) {
    u32 word;
    __builtin_memcpy(&word, &value, 4);
    const u32 rounded = word + 0x7FFFu + (word >> 16 & 1u);
    const u32 kept = (word & 0x7F800000u) != 0 ? rounded : word & 0x80000000u;
    return static_cast<u16>(kept >> 16);
}

KVSTORE_TARGET void float_to_bfloat16(const float* __restrict values, std::size_t count, u8* __restrict row) {
    for (std::size_t i = 0; i < count; ++i) {
        const u16 bits = bfloat16_of(values[i]);
        __builtin_memcpy(row + 2 * i, &bits, 2);
    }
}

KVSTORE_TARGET __attribute__((always_inline)) inline float dequantised(const i16* values, const GridView& grid, std::size_t i) {
    const float value = static_cast<float>(values[i]);
    const float magnitude = __builtin_fabsf(value);
    const float large = magnitude < 3.0f ? grid.shrink[1][i] : grid.shrink[2][i];
    const float some = magnitude < 2.0f ? grid.shrink[0][i] : large;
    const float less = magnitude < 1.0f ? 0.0f : some;
    return (value - __builtin_copysignf(less, value)) * grid.step[i] + grid.mean[i];
}

KVSTORE_TARGET void dequantise(const i16* __restrict values, std::size_t count, const GridView& view, float* __restrict out) {
    const GridView grid = view;
    KVSTORE_NO_ALIAS
    for (std::size_t i = 0; i < count; ++i) out[i] = dequantised(values, grid, i);
}

KVSTORE_TARGET inline void restore_row(const i16* __restrict values, std::size_t count, const GridView& view,
                                       u8* __restrict row) {
    const GridView grid = view;
    KVSTORE_NO_ALIAS
    for (std::size_t i = 0; i < count; ++i) {
        const u16 bits = bfloat16_of(dequantised(values, grid, i));
        __builtin_memcpy(row + 2 * i, &bits, 2);
    }
}

KVSTORE_TARGET inline void restore_head(const i16* __restrict values, std::size_t pairs, const GridView& view,
                                        const float* __restrict cos, const float* __restrict sin, u8* __restrict row) {
    const GridView grid = view;
    KVSTORE_NO_ALIAS
    for (std::size_t i = 0; i < pairs; ++i) {
        const float a = dequantised(values, grid, i), b = dequantised(values, grid, i + pairs);
        const u16 first = bfloat16_of(a * cos[i] - b * sin[i]), second = bfloat16_of(b * cos[i] + a * sin[i]);
        __builtin_memcpy(row + 2 * i, &first, 2);
        __builtin_memcpy(row + 2 * (i + pairs), &second, 2);
    }
}

[[maybe_unused]] KVSTORE_TARGET void restore_bfloat16(const RowWindow& window, std::size_t count, const GridView& grid) {
    for (std::size_t t = 0; t < static_cast<std::size_t>(window.steps); ++t)
        restore_row(window.values + t * window.stride, count, grid, window.rows[t]);
}

KVSTORE_TARGET void restore_rotated_bfloat16(const RowWindow& window, std::size_t heads, std::size_t pairs,
                                             const GridView& grid) {
    for (std::size_t t = 0; t < static_cast<std::size_t>(window.steps); ++t)
        for (std::size_t head = 0; head < heads; ++head) {
            const std::size_t first = 2 * pairs * head;
            restore_head(window.values + t * window.stride + first, pairs, grid.from(first), window.cos[t], window.sin[t],
                         window.rows[t] + 2 * first);
        }
}

KVSTORE_TARGET void quantise(const float* __restrict values, std::size_t count, const float* __restrict mean,
                             const float* __restrict inverse, i16* __restrict out) {
    constexpr float round = 0x1.8p23f;  // added and taken off, it leaves the nearest integer (ties to even)
    for (std::size_t i = 0; i < count; ++i) {
        const float scaled = (values[i] - mean[i]) * inverse[i];
        const float high = scaled < kValueLimit ? scaled : kValueLimit;
        const float kept = high > -kValueLimit ? high : -kValueLimit;
        out[i] = static_cast<i16>(static_cast<i32>((kept + round) - round));
    }
}

KVSTORE_TARGET void rotate(float* __restrict first, float* __restrict second, const float* __restrict cos,
                           const float* __restrict sin, std::size_t pairs, float direction) {
    for (std::size_t i = 0; i < pairs; ++i) {
        const float a = first[i], b = second[i], c = cos[i], s = direction * sin[i];
        first[i] = a * c - b * s;
        second[i] = b * c + a * s;
    }
}

KVSTORE_TARGET void accumulate(const float* __restrict values, std::size_t count, double* __restrict sum,
                               double* __restrict square, float* __restrict peak) {
    for (std::size_t i = 0; i < count; ++i) {
        const double x = values[i];
        sum[i] += x;
        square[i] += x * x;
        const float magnitude = __builtin_fabsf(values[i]);
        peak[i] = peak[i] < magnitude ? magnitude : peak[i];
    }
}

KVSTORE_TARGET bool below(const float* values, std::size_t count, float limit) {
    u32 wrong = 0;
    for (std::size_t i = 0; i < count; ++i) wrong |= __builtin_fabsf(values[i]) < limit ? 0u : 1u;
    return wrong == 0;
}

KVSTORE_TARGET double energy(const float* values, std::size_t count) {
    double lanes[16] = {};
    std::size_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (std::size_t l = 0; l < 16; ++l) {
            const double x = values[i + l];
            lanes[l] += x * x;
        }
    for (std::size_t l = 0; i + l < count; ++l) {
        const double x = values[i + l];
        lanes[l] += x * x;
    }
    for (std::size_t half = 8; half > 0; half /= 2)
        for (std::size_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    return lanes[0];
}

KVSTORE_TARGET u16 join_bfloat16(const i16* __restrict exponents, const u8* __restrict plain, std::size_t count,
                                 u8* __restrict row) {
    u16 seen = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const u16 exponent = static_cast<u16>(exponents[i]), bits = plain[i];
        seen = static_cast<u16>(seen | exponent);
        const u16 whole = static_cast<u16>((bits & 0x80u) << 8 | (exponent & 0xFFu) << 7 | (bits & 0x7Fu));
        __builtin_memcpy(row + 2 * i, &whole, 2);
    }
    return seen;
}

KVSTORE_TARGET void split_bfloat16(const u8* __restrict row, std::size_t count, i16* __restrict exponents,
                                   u8* __restrict plain) {
    for (std::size_t i = 0; i < count; ++i) {
        u16 bits;
        __builtin_memcpy(&bits, row + 2 * i, 2);
        exponents[i] = static_cast<i16>(bits >> 7 & 0xFFu);
        plain[i] = static_cast<u8>((bits >> 8 & 0x80u) | (bits & 0x7Fu));
    }
}
