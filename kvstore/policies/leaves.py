"""The residents of a tier as a tree: who has children, and the set of leaves, from which windows are drawn.

Columns of numbers, a row a slot: a million residents are a few dozen megabytes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

SLOTS_FIRST = 1024
GROWTH = 1.25
#: A prime that steps through the leaves, so that a window is a mixture of old and new, short and long.
STRIDE = 1_000_003
#: Leaves that may not go are asked about again after this share of the residents was removed.
HELD_RETRY_SHARE = 0.05


class Leaves:
    """`parents[slot]`: slot of the parent, or -1."""

    def __init__(self) -> None:
        self.parents = np.zeros(SLOTS_FIRST, np.int32)
        self._children = np.full(SLOTS_FIRST, -1, np.int32)  # -1: not a resident
        self._leaf_at = np.full(SLOTS_FIRST, -1, np.int32)  # where in _leaves, or -1
        self._leaves = np.zeros(SLOTS_FIRST, np.int32)
        self._leaf_count = 0
        self._held: list[int] = []  # leaves that may not go now; may name slots that are no longer that
        self._removals_since_retry = 0
        self._at = 0
        self.residents = 0

    @property
    def slots(self) -> int:
        """Slots are below this."""
        return len(self.parents)

    @property
    def nbytes(self) -> int:
        return self.parents.nbytes + self._children.nbytes + self._leaf_at.nbytes + self._leaves.nbytes

    def __contains__(self, slot: int) -> bool:
        return 0 <= slot < self.slots and self._children[slot] >= 0

    def is_leaf(self, slot: int) -> bool:
        return bool(self._leaf_at[slot] >= 0)

    def insert(self, slot: int, parent: int) -> None:
        """`slot` is below `slots`. A parent that is not a resident counts as none."""
        parent = parent if parent in self else -1
        self.parents[slot] = parent
        self._children[slot] = 0
        if parent >= 0:
            self._children[parent] += 1
            self._leave(parent)
        self._enter(slot)
        self.residents += 1

    def load(self, parents: NDArray[np.int32]) -> NDArray[np.int64]:
        """Slots 0, 1, 2 …, none of which is a resident yet; the number of children of each."""
        count = len(parents)
        while count > self.slots:
            self.grow()
        self.parents[:count] = parents
        children = np.bincount(parents[parents >= 0], minlength=count)
        self._children[:count] = children
        leaves = np.flatnonzero(children == 0)
        self._leaves[: len(leaves)] = leaves
        self._leaf_at[leaves] = np.arange(len(leaves))
        self._leaf_count = len(leaves)
        self.residents = count
        return children

    def remove(self, slot: int) -> None:
        if self._children[slot]:  # gone before its children, as damage does: another will take its slot
            self.parents[(self.parents == slot) & (self._children >= 0)] = -1
        self._leave(slot)
        self._children[slot] = -1
        self.residents -= 1
        self._removals_since_retry += 1
        parent = int(self.parents[slot])
        if parent >= 0 and self._children[parent] > 0:
            self._children[parent] -= 1
            if not self._children[parent]:
                self._enter(parent)

    def hold(self, slot: int) -> None:
        """A leaf that may not go: it is drawn again later."""
        self._leave(slot)
        self._held.append(slot)

    def release(self, may_go: Callable[[int], bool], *, now: bool = False) -> bool:
        """Those held that may go are drawn again, `now` or if it is time. Returns whether any is."""
        if not self._held or not (now or self._removals_since_retry > HELD_RETRY_SHARE * self.residents):
            return False
        held, self._held = self._held, []
        for slot in held:
            if self._children[slot] == 0:
                if may_go(slot):
                    self._enter(slot)
                elif self._leaf_at[slot] < 0:
                    self._held.append(slot)
        self._removals_since_retry = 0
        return len(self._held) < len(held)

    def window(self, size: int) -> NDArray[np.int32]:
        """The next `size` leaves, or all if there are fewer."""
        count = self._leaf_count
        if count <= size:
            return self._leaves[:count].copy()
        steps = self._at + np.arange(size, dtype=np.int64)
        self._at = (self._at + size) % count
        return self._leaves[steps * STRIDE % count]

    def grow(self) -> None:
        added = int(self.slots * (GROWTH - 1))
        self.parents = np.append(self.parents, np.zeros(added, np.int32))
        self._leaves = np.append(self._leaves, np.zeros(added, np.int32))
        self._children = np.append(self._children, np.full(added, -1, np.int32))
        self._leaf_at = np.append(self._leaf_at, np.full(added, -1, np.int32))

    def _enter(self, slot: int) -> None:
        if self._leaf_at[slot] < 0:
            self._leaves[self._leaf_count] = slot
            self._leaf_at[slot] = self._leaf_count
            self._leaf_count += 1

    def _leave(self, slot: int) -> None:
        at = int(self._leaf_at[slot])
        if at >= 0:
            self._leaf_count -= 1
            last = int(self._leaves[self._leaf_count])
            self._leaves[at] = last
            self._leaf_at[last] = at
            self._leaf_at[slot] = -1
