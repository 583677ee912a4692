"""The constant tables of the bitstream: `tables.bin`, read once, and the thresholds that choose among them.

Scale tables: index 0–47 stands for σ/step = 2^((index − 16)/4). Symbols 0–254 are the values −127…127, symbol 255
is the escape. Frequencies sum to 4096; a symbol with frequency 0 is written by escape.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, localcontext
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

SLOT_BITS = 12
SLOTS = 1 << SLOT_BITS
SCALES = 48
SYMBOLS = 256
VALUE_MAX = 127
ESCAPE = 255
EXPONENT_TABLES = 40
EXPONENT_SYMBOLS = 64
EXPONENT_ESCAPE = 63

#: a channel's stored scale id is its scale index + 8, 0–63, so that channels which only a refinement codes have one
SCALE_ID_OFFSET = 8
SCALE_ID_MAX = 63
#: channels under this scale index are not coded: σ/step < 0.16
SCALE_CODED_MIN = 6
#: scale index grows by this much from step D to D/3 and D/9: round(4·log2 3), round(4·log2 9)
LEVEL_SHIFT = (0, 6, 13)
#: drain tokens are coded at step/8: three octaves
DRAIN_SHIFT = 12


@dataclass(frozen=True)
class SlotTable:
    """Frequencies, cumulative starts, and the symbol of each of the 4096 slots; one row a table."""

    freq: npt.NDArray[np.uint32]
    start: npt.NDArray[np.uint32]
    symbol: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, freq: npt.NDArray[Any]) -> SlotTable:
        rows = freq.reshape(-1, freq.shape[-1]).astype(np.uint32)
        if not (rows.sum(axis=1) == SLOTS).all():
            raise ValueError("tables.bin is damaged: reinstall the package")
        start = np.cumsum(rows, axis=1, dtype=np.uint32) - rows
        symbol = np.stack([np.repeat(np.arange(rows.shape[1]), row) for row in rows]).astype(np.uint8)
        return cls(rows, start, symbol)


def _read() -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    data = resources.files("kvstore_codec").joinpath("tables.bin").read_bytes()
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("<u2", (SCALES, SYMBOLS)),
        ("<u2", (SCALES, 3, 3)),
        ("<f2", (SCALES, 4)),
        ("<u2", (EXPONENT_TABLES, EXPONENT_SYMBOLS)),
    ]
    arrays, at = [], 0
    for dtype, shape in shapes:
        count = int(np.prod(shape))
        arrays.append(np.frombuffer(data, dtype, count, at).reshape(shape))
        at += count * 2
    return arrays[0], arrays[1], arrays[2], arrays[3]


_symbol_freq, _digit_freq, _shrinkage, _exponent_freq = _read()

#: [48] tables of 256 symbols: a channel's first coded value
VALUES = SlotTable.of(_symbol_freq)
#: [48 × 3] tables of 3 symbols: refinement digits, row 3·index + min(|coarse value|, 2), sign-folded
DIGITS = SlotTable.of(_digit_freq)
#: [40] tables of 64 symbols: distance below a channel's base exponent
EXPONENTS = SlotTable.of(_exponent_freq)
#: [48, 4] float32: how far, in steps, the centroid of a value of magnitude 0, 1, 2, 3 or more lies nearer to zero
SHRINKAGE = _shrinkage.astype(np.float32)


def _scale_thresholds() -> npt.NDArray[np.float64]:
    """thresholds[i]: the (σ/step)² from which the scale id is at least i + 1, 2^((i + 1 − 8 − 16.5)/2).

    Decimal arithmetic, correctly rounded, so that no platform's `pow` is part of the format.
    """
    with localcontext() as context:
        context.prec = 40
        return np.array(
            [float(Decimal(2) ** ((Decimal(i + 1 - SCALE_ID_OFFSET) - Decimal("16.5")) / 2)) for i in range(63)]
        )


SCALE_THRESHOLDS = _scale_thresholds()


def _scale_variances() -> npt.NDArray[np.float64]:
    """[64]: the (σ/step)² that a scale id stands for, 2^((id − 8 − 16)/2); 0 for id 0, which bounds it from above."""
    with localcontext() as context:
        context.prec = 40
        ids = range(1, 64)
        return np.array([0.0, *(float(Decimal(2) ** ((Decimal(i) - SCALE_ID_OFFSET - 16) / 2)) for i in ids)])


SCALE_VARIANCES = _scale_variances()
