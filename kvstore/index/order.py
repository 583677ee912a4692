"""What one tier holds, how much of each object, and which of them goes or shrinks next."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvstore.index.columns import Columns
from kvstore.index.hash_table import Rows
from kvstore.policies.base import Loading, Policy
from kvstore_codec import Quality

MayGo = Callable[[int], bool]
WINDOW = 4096  # rows that are looked at for one to shrink


class TierOrder:
    """`policy` orders whole objects. What shrinks next, down to `floor`, is the least recently used of a window of rows
    that moves on: a second order would cost as much memory again."""

    def __init__(
        self, columns: Columns, tier: int, policy: Policy, floor: Quality | None, is_held: Callable[[int], bool]
    ) -> None:
        self._columns, self._tier, self._is_held = columns, tier, is_held
        self._policy, self._floor = policy, floor
        self._may_shrink_count = self._at = 0
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
        columns = self._columns
        parent_here = parent if parent >= 0 and self.layers[parent] else -1
        length = int(columns["layer_bytes"][row, layers - 1])
        self._policy.insert(row, fingerprint, parent_here, int(columns["depth"][row]), length, now_s)
        self._may_shrink_count += self._may_shrink(row, layers)
        self._retained_until_s = max(self._retained_until_s, float(columns["retain_until_s"][row]))

    def load(self, rows: Rows, now_s: float) -> None:
        """Inserts `rows`, least recently used first, all there is of each."""
        columns = self._columns
        self.layers[rows] = columns["whole_layers"][rows]
        parents = columns["parent"][rows]
        self.children[:] += np.bincount(parents[parents >= 0], minlength=len(self.children)).astype(np.uint32)
        self._may_shrink_count += int(self._may_shrink_all(rows).sum())
        fingerprints = columns["hash"][rows, 0]
        if isinstance(self._policy, Loading):
            self._policy.load(fingerprints, parents)
            return
        lengths = columns["layer_bytes"][rows, self.layers[rows] - 1]
        for at in range(0, len(rows), 1 << 16):
            here = slice(at, at + (1 << 16))
            fields = (rows, fingerprints, parents, columns["depth"][rows], lengths)
            for row, fingerprint, parent, depth, length in zip(
                *(field[here].tolist() for field in fields), strict=True
            ):
                self._policy.insert(row, fingerprint, parent, depth, length, now_s)

    def remove(self, row: int, parent: int) -> None:
        self._policy.remove(row)
        self._may_shrink_count -= self._may_shrink(row, int(self.layers[row]))
        self.layers[row] = 0
        if parent >= 0:
            self.children[parent] -= np.uint32(1)

    def resize(self, row: int, layers: int) -> None:
        """Fewer quality layers of an object are held, or more."""
        self._may_shrink_count += self._may_shrink(row, layers) - self._may_shrink(row, int(self.layers[row]))
        self.layers[row] = layers

    def adopt(self, row: int, child: int) -> None:
        """`child`, so far without a parent, has one."""
        if self.layers[child]:
            self.children[row] += np.uint32(1)

    def touch(self, rows: Rows, now_s: float) -> None:
        here = rows[self.layers[rows] > 0]
        if len(here):
            self._policy.touch(here.tolist(), now_s)

    def victim(self, may_go: MayGo, now_s: float) -> int | None:
        """The leaf that goes next. What a writer asked to retain goes when nothing else may, least priority first."""

        def free(row: int) -> bool:
            return not self.children[row] and not self._is_held(row) and may_go(row)

        if self._retained_until_s <= now_s:
            return self._policy.victim(free)
        until, priority = self._columns["retain_until_s"], self._columns["priority"]
        victim = self._policy.victim(lambda row: until[row] <= now_s and free(row))
        if victim is None:
            for level in np.unique(priority[(until > now_s) & (self.layers > 0)]).tolist():
                victim = self._policy.victim(lambda row: priority[row] <= level and free(row))  # noqa: B023
                if victim is not None:
                    break
        return victim

    def shrinkable(self, may_shrink: MayGo) -> int | None:
        """The object that loses its finest layer next; None where all are down to the floor, or held."""
        if not self._may_shrink_count:
            return None
        last_use, rows = self._columns["last_use"], self._columns.rows
        for _ in range(0, rows + WINDOW, WINDOW):
            window = np.arange(self._at, min(self._at + WINDOW, rows))
            self._at = self._at + WINDOW if self._at + WINDOW < rows else 0
            window = window[self._may_shrink_all(window)]
            for row in window[np.argsort(last_use[window], kind="stable")].tolist():
                if not self._is_held(row) and may_shrink(row):
                    return int(row)
        return None

    def _may_shrink(self, row: int, layers: int) -> bool:
        if self._floor is None or layers < 2:
            return False
        columns = self._columns
        return bool(columns["quality"][row] + columns["whole_layers"][row] - layers < self._floor)

    def _may_shrink_all(self, rows: Rows) -> npt.NDArray[np.bool_]:
        layers, columns = self.layers[rows], self._columns
        if self._floor is None:
            return np.zeros(len(rows), np.bool_)
        finer: npt.NDArray[np.bool_] = columns["quality"][rows] + columns["whole_layers"][rows] - layers < self._floor
        return finer & (layers > 1)
