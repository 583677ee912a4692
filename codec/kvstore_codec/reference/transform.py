"""The linear transform of a calibrated profile, in NumPy: two products whose every rounding is fixed (FORMAT.md §4.5).

Each output element is a chain of fused multiply-adds in float32, in ascending order of the summed index, from 0. A
fused multiply-add rounds once, so every machine that has one gives the same bits, whatever its vector width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_codec.reference.numerics import Float32s


def forward(x: Float32s, basis: npt.NDArray[np.float16], components: int) -> Float32s:
    """[tokens, channels] to [tokens, components]: y_j = Σᵢ x_i · basis[j, i]."""
    rows = basis[:components].astype(np.float32)
    y = np.zeros((x.shape[0], components), np.float32)
    for channel in range(x.shape[1]):
        y = fma(x[:, channel : channel + 1], rows[:, channel], y)
    return y


def inverse(y: Float32s, basis: npt.NDArray[np.float16]) -> Float32s:
    """[tokens, components] to [tokens, channels]: x_i = Σⱼ y_j · basis[j, i], over the components there are."""
    x = np.zeros((y.shape[0], basis.shape[1]), np.float32)
    for component in range(y.shape[1]):
        x = fma(y[:, component : component + 1], basis[component].astype(np.float32), x)
    return x


def fma(a: npt.NDArray[Any], b: npt.NDArray[Any], c: Float32s) -> Float32s:
    """a · b + c in float32 with one rounding.

    The product of two float32 is exact in float64; the sum is rounded to odd there (Boldo & Melquiond, 2008), so that
    rounding it once more to float32 gives what one rounding of the exact sum gives.
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    virtual = total - product  # Knuth's TwoSum: total + error is the exact sum
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(np.int64)
    even = (error != 0) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)  # the exact sum is farther from zero than `total`
    bits = np.where(even, bits + np.where(away, 1, -1), bits)
    result: Float32s = bits.view(np.float64).astype(np.float32)
    return result
