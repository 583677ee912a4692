"""What one tier holds, how much of each object, and which of them goes or shrinks next."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvstore.index.columns import Columns
from kvstore.index.hash_table import Rows
from kvstore.policies.base import Policy
from kvstore_codec import Quality

MayGo = Callable[[int], bool]


class TierOrder:
    """`going` orders all objects; `shrinking` those that have a quality layer to lose before they are down to
    `floor`."""

    def __init__(
        self, columns: Columns, tier: int, going: Policy, shrinking: Policy, floor: Quality | None,
        is_held: Callable[[int], bool],
    ) -> None:  # fmt: skip
        self._columns, self._tier, self._is_held = columns, tier, is_held
        self._going, self._shrinking, self._floor = going, shrinking, floor
        self._retained_until_s = 0.0  # beyond it no writer's hint is in force

    @property
    def layers(self) -> npt.NDArray[np.uint8]:
        """Quality layers held, by row."""
        return self._columns.layers[self._tier]

    @property
    def children(self) -> npt.NDArray[np.uint32]:
        """Children held, by row; the parent itself need not be."""
        return self._columns.children[self._tier]

    def insert(self, row: int, parent: int, layers: int, fingerprint: int, now_s: float) -> None:
        self.layers[row] = layers
        if parent >= 0:
            self.children[parent] += np.uint32(1)
        parent_here = parent if parent >= 0 and self.layers[parent] else -1
        self._going.insert(row, fingerprint, parent_here, *self._place(row), now_s)
        if self._may_shrink(row, layers):
            self._shrinking.insert(row, fingerprint, -1, *self._place(row), now_s)
        self._retained_until_s = max(self._retained_until_s, float(self._columns["retain_until_s"][row]))

    def load(self, rows: Rows, now_s: float) -> None:
        """Inserts `rows`, least recently used first, all there is of each."""
        columns = self._columns
        self.layers[rows] = columns["whole_layers"][rows]
        parents = columns["parent"][rows]
        self.children[:] += np.bincount(parents[parents >= 0], minlength=len(self.children)).astype(np.uint32)
        lengths = columns["layer_bytes"][rows, self.layers[rows] - 1]
        fingerprints = columns["hash"][rows, 0]
        for at in range(0, len(rows), 1 << 16):
            here = slice(at, at + (1 << 16))
            fields = (rows, fingerprints, parents, columns["depth"][rows], lengths)
            for row, fingerprint, parent, depth, length in zip(
                *(field[here].tolist() for field in fields), strict=True
            ):
                self._going.insert(row, fingerprint, parent, depth, length, now_s)
                if self._floor is not None and self._may_shrink(row, int(self.layers[row])):
                    self._shrinking.insert(row, fingerprint, -1, depth, length, now_s)

    def remove(self, row: int, parent: int) -> None:
        self._going.remove(row)
        if self._may_shrink(row, int(self.layers[row])):
            self._shrinking.remove(row)
        self.layers[row] = 0
        if parent >= 0:
            self.children[parent] -= np.uint32(1)

    def resize(self, row: int, layers: int, fingerprint: int, now_s: float) -> None:
        """Fewer quality layers of an object are held, or more."""
        before, after = self._may_shrink(row, int(self.layers[row])), self._may_shrink(row, layers)
        self.layers[row] = layers
        if before and not after:
            self._shrinking.remove(row)
        elif after and not before:
            self._shrinking.insert(row, fingerprint, -1, *self._place(row), now_s)

    def adopt(self, row: int, child: int) -> None:
        """`child`, so far without a parent, has one."""
        if self.layers[child]:
            self.children[row] += np.uint32(1)

    def touch(self, rows: Rows, now_s: float) -> None:
        layers = self.layers[rows]
        here = rows[layers > 0]
        if len(here):
            self._going.touch(here.tolist(), now_s)
        if self._floor is not None:
            columns = self._columns
            finer = columns["quality"][rows] + columns["whole_layers"][rows] - layers < self._floor
            shrinking = rows[(layers > 1) & finer]
            if len(shrinking):
                self._shrinking.touch(shrinking.tolist(), now_s)

    def victim(self, may_go: MayGo, now_s: float) -> int | None:
        """The leaf that goes next. What a writer asked to retain goes when nothing else may, least priority first."""

        def free(row: int) -> bool:
            return not self.children[row] and not self._is_held(row) and may_go(row)

        if self._retained_until_s <= now_s:
            return self._going.victim(free)
        until, priority = self._columns["retain_until_s"], self._columns["priority"]
        victim = self._going.victim(lambda row: until[row] <= now_s and free(row))
        if victim is None:
            for level in np.unique(priority[(until > now_s) & (self.layers > 0)]).tolist():
                victim = self._going.victim(lambda row: priority[row] <= level and free(row))  # noqa: B023
                if victim is not None:
                    break
        return victim

    def shrinkable(self, may_shrink: MayGo) -> int | None:
        """The object that loses its finest layer next; None where all are down to the floor, or held."""
        return self._shrinking.victim(lambda row: not self._is_held(row) and may_shrink(row))

    def _place(self, row: int) -> tuple[int, int]:
        """(chunks before it in its chain, bytes)"""
        columns = self._columns
        return int(columns["depth"][row]), int(columns["layer_bytes"][row, self.layers[row] - 1])

    def _may_shrink(self, row: int, layers: int) -> bool:
        if self._floor is None or layers < 2:
            return False
        columns = self._columns
        return bool(columns["quality"][row] + columns["whole_layers"][row] - layers < self._floor)
