"""Rotation tables: the cosines and sines by which keys are un-rotated before coding and rotated after.

The tables are part of what stored bits mean, so they are computed by operations that every IEEE machine rounds
alike: frequencies in decimal arithmetic, angles and polynomials in float64 adds and multiplies, one rounding to
float32 at the end. The model's own float32 tables differ by up to 1e-4 rad at position 1500, which does not
matter: what is un-rotated here is rotated back here.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore_codec.layout import LayerSpec, RoPE, RopeScaling


class Rotation(NamedTuple):
    """`cos`, `sin`: float32 `[tokens, pairs]`; pair i is dims (2i, 2i+1) if interleaved, else (i, i + pairs)."""

    cos: npt.NDArray[np.float32]
    sin: npt.NDArray[np.float32]
    interleaved: bool


def rotation_for(layer: LayerSpec, first_position: int, tokens: int) -> Rotation | None:
    """Tables for `tokens` positions from `first_position`, or None where the layer's keys do not rotate."""
    if layer.rope is None:
        return None
    return _rotation(layer.rope, layer.rope.rotary_dims or layer.k_dim, first_position, tokens)


#: tables are made so many tokens at a time: float64 intermediates are eight times their size
_BLOCK_TOKENS = 64


@lru_cache(maxsize=128)
def _rotation(rope: RoPE, rotary_dims: int, first_position: int, tokens: int) -> Rotation:
    frequencies = _frequencies(rope, rotary_dims)
    cos, sin = np.empty((2, tokens, len(frequencies)), np.float32)
    for first in range(0, tokens, _BLOCK_TOKENS):
        positions = np.arange(first, min(first + _BLOCK_TOKENS, tokens), dtype=np.float64) + first_position
        some = slice(first, first + len(positions))
        sin[some], cos[some] = _sin_cos(positions[:, None] * frequencies[None, :])
    return Rotation(cos, sin, rope.interleaved)


@lru_cache(maxsize=64)
def _frequencies(rope: RoPE, rotary_dims: int) -> npt.NDArray[np.float64]:
    """Radians a token: θ^(−2i/rotary_dims), scaled as the model scales them."""
    with localcontext() as context:
        context.prec = 40
        theta = Decimal(rope.theta)
        plain = [theta ** (Decimal(-2 * i) / Decimal(rotary_dims)) for i in range(rotary_dims // 2)]
        scaled = plain if rope.scaling is None else [_scaled(f, rope.scaling) for f in plain]
        return np.array([float(frequency) for frequency in scaled])


def _scaled(frequency: Decimal, scaling: RopeScaling) -> Decimal:
    factor = Decimal(scaling.factor)
    if scaling.kind == "linear":
        return frequency / factor
    # Llama 3.1: long wavelengths are stretched, short ones kept, those between blended.
    low, high = Decimal(scaling.low_freq_factor or 1), Decimal(scaling.high_freq_factor or 1)
    turns = Decimal(scaling.original_max_position or 1) * frequency / (2 * Decimal(math.pi))
    if turns < low:
        return frequency / factor
    if turns > high:
        return frequency
    smooth = (turns - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


# Cody–Waite reduction by π/2 in three parts of 33 bits (fdlibm), then fdlibm's minimax polynomials.
_PIO2 = (
    float.fromhex("0x1.921fb54400000p+0"),
    float.fromhex("0x1.0b4611a600000p-34"),
    float.fromhex("0x1.3198a2e037073p-69"),
)
_TWO_OVER_PI = float.fromhex("0x1.45f306dc9c883p-1")
_SIN = (-1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04,
        2.75573137070700676789e-06, -2.50507602534068634195e-08, 1.58969099521155010221e-10)  # fmt: skip
_COS = (4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05,
        -2.75573143513906633035e-07, 2.08757232129817482790e-09, -1.13596475577881948265e-11)  # fmt: skip


def _sin_cos(angle: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    quadrant = np.rint(angle * _TWO_OVER_PI)
    r = ((angle - quadrant * _PIO2[0]) - quadrant * _PIO2[1]) - quadrant * _PIO2[2]
    z = r * r
    s, c = np.full_like(z, _SIN[-1]), np.full_like(z, _COS[-1])
    for sin_term, cos_term in zip(_SIN[-2::-1], _COS[-2::-1], strict=True):
        s = s * z + sin_term
        c = c * z + cos_term
    sin_r = r + r * z * s
    cos_r = 1.0 - 0.5 * z + z * z * c
    turn = quadrant.astype(np.int64) & 3
    sin = np.choose(turn, [sin_r, cos_r, -sin_r, -cos_r])
    cos = np.choose(turn, [cos_r, -sin_r, -cos_r, sin_r])
    return sin, cos
