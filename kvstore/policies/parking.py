"""Leaf-first for policies that order objects one by one: who is a leaf, and where refused candidates wait.

A queue's next object is often inside a chain, and so may not go before the chunks after it. Looking at it again for
every victim would cost a scan each time. So it waits: for its last child, after which it is the next to go, or, if a
lease holds it, for a share of the evictions to pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

#: Held leaves are asked about again after this share of the residents was evicted, so that asking costs little.
HELD_RETRY_SHARE = 0.05


class Parking:
    """Residents' parents and children, and the candidates that wait. `due` are those that waited and may go now."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}
        self._children: dict[int, int] = {}
        self._waiting: set[int] = set()
        self._due: deque[int] = deque()
        self._held: list[int] = []
        self._evictions_since_retry = 0

    def __len__(self) -> int:
        return len(self._parents)

    def __contains__(self, slot: int) -> bool:
        return slot in self._parents

    def insert(self, slot: int, parent: int) -> None:
        """A parent that is not a resident counts as none."""
        if parent not in self._parents:
            parent = -1
        self._parents[slot] = parent
        self._children[slot] = 0
        if parent >= 0:
            self._children[parent] += 1

    def remove(self, slot: int) -> None:
        self._waiting.discard(slot)
        parent = self._parents.pop(slot)
        if self._children.pop(slot):  # gone before its children, as damage does: another will take its slot
            self._parents.update({child: -1 for child, above in self._parents.items() if above == slot})
        self._evictions_since_retry += 1
        if parent in self._children:
            self._children[parent] -= 1
            if parent in self._waiting and not self._children[parent]:
                self._due.appendleft(parent)

    def unpark(self, slot: int) -> bool:
        """It was used: it no longer waits. Returns whether it did."""
        if slot in self._waiting:
            self._waiting.remove(slot)
            return True
        return False

    def next(self, candidate: Callable[[], int | None], may_go: Callable[[int], bool]) -> int | None:
        """The next that may go: of those due, then of what `candidate` takes out of its queue until it has none.

        The one returned waits here too, until it is removed or used.
        """
        if self._held and self._evictions_since_retry > HELD_RETRY_SHARE * len(self):
            self._retry_held()
        found = self._next(candidate, may_go)
        if found is None and self._held:
            self._retry_held()
            found = self._next(candidate, may_go)
        if found is not None:
            self._due.appendleft(found)
        return found

    def _retry_held(self) -> None:
        self._due.extendleft(reversed(self._held))
        self._held.clear()
        self._evictions_since_retry = 0

    def _next(self, candidate: Callable[[], int | None], may_go: Callable[[int], bool]) -> int | None:
        while True:
            if self._due:
                slot = self._due.popleft()
                if slot not in self._waiting or self._children[slot]:
                    continue
            else:
                taken = candidate()
                if taken is None:
                    return None
                slot = taken
                self._waiting.add(slot)
                if self._children[slot]:
                    continue
            if may_go(slot):
                return slot
            self._held.append(slot)
