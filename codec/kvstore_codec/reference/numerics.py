"""Float conversions and sums whose every rounding is fixed, so that other implementations can follow."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_codec.rope import Rotation

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]

SUM_LANES = 16
FLOAT16_MAX = np.float32(65504.0)


def to_float32(bits: npt.NDArray[Any], dtype: str) -> Float32s:
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return bits.view(np.float32)


def from_float32(values: Float32s, dtype: str) -> npt.NDArray[Any]:
    """Round to nearest even. float16: magnitudes beyond the largest finite number become it. bfloat16: subnormal floats
    become zeros, as CPUs' own conversions have it; nothing that is decoded is large enough to overflow."""
    if dtype == "bfloat16":
        word = values.view(np.uint32)
        rounded = word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))
        normal = (word & np.uint32(0x7F800000)) != 0
        return (np.where(normal, rounded, word & np.uint32(0x80000000)) >> np.uint32(16)).astype(np.uint16)
    if dtype == "float16":
        return np.clip(values, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16).view(np.uint16)
    return values.view(np.uint32)


def sum_rows(values: Float64s) -> Float64s:
    """Sum over the last axis: 16 lanes (index mod 16) accumulate in order, then are halved 8, 4, 2, 1."""
    count = values.shape[-1]
    lanes = np.zeros((*values.shape[:-1], SUM_LANES))
    for first in range(0, count, SUM_LANES):
        part = values[..., first : first + SUM_LANES]
        lanes[..., : part.shape[-1]] += part
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
    return lanes[..., 0]


def sum_columns(values: Float64s) -> Float64s:
    """Sum over the first axis, in order."""
    total = np.zeros(values.shape[1:])
    for row in values:
        total += row
    return total


def rotate(values: Float32s, rotation: Rotation | None, *, inverse: bool) -> Float32s:
    """`values` float32 [tokens, heads, dim], rotated by each token's angles (or back). Returns a new array."""
    if rotation is None:
        return values.copy()
    pairs = rotation.cos.shape[1]
    cos, sin = rotation.cos[:, None, :], rotation.sin[:, None, :]
    if inverse:
        sin = -sin
    if rotation.interleaved:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    a, b = values[..., first], values[..., second]
    out = values.copy()
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out
