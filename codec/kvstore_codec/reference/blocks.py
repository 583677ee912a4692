"""Which components are coded at a quality layer, in which blocks of 32, and in which streams (FORMAT.md §3, §4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_codec import tables
from kvstore_codec.reference.rans import LANES

Ints = npt.NDArray[Any]


@dataclass(frozen=True)
class Block:
    """Up to 32 components coded in lockstep over the tokens of one class, from quality layer `level` on.

    `scales`: each lane's scale index at the base step, not clamped.
    """

    components: Ints
    scales: Ints
    level: int

    def value_rows(self) -> Ints:
        """Table rows of VALUES, where the block enters."""
        return np.minimum(self.scales + tables.LEVEL_SHIFT[self.level], tables.SCALES - 1)

    def digit_rows(self, level: int) -> Ints:
        """Table rows of DIGITS for magnitude 0, at a quality layer that refines the block."""
        return 3 * np.minimum(self.scales + tables.LEVEL_SHIFT[level - 1], tables.SCALES - 1)


def blocks(scales: Ints, level: int) -> list[Block]:
    """All blocks that quality layer `level` codes, in order: those of coarser layers, then those that enter."""
    found: list[Block] = []
    for entry in range(level + 1):
        now = scales + tables.LEVEL_SHIFT[entry]
        entering = now >= tables.SCALE_CODED_MIN
        if entry:
            entering &= scales + tables.LEVEL_SHIFT[entry - 1] < tables.SCALE_CODED_MIN
        components = np.flatnonzero(entering)
        components = components[np.argsort(np.minimum(now[components], tables.SCALES - 1), kind="stable")]
        for first in range(0, len(components), LANES):
            lanes = components[first : first + LANES]
            found.append(Block(lanes, scales[lanes], entry))
    return found


def deal(items: Sequence[Block], count: int, index: int) -> Sequence[Block]:
    """Stream `index`'s share of `count`."""
    return items[index * len(items) // count : (index + 1) * len(items) // count]
