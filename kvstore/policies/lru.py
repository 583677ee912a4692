"""LRU, leaf-first: the leaf whose last use is the longest ago goes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from kvstore.policies.parking import Parking


class Lru:
    name = "lru"

    def __init__(self) -> None:
        self._parking = Parking()
        self._queue: OrderedDict[int, None] = OrderedDict()

    def insert(self, slot: int, fingerprint: int, parent: int, position: int, size: int, now_s: float) -> None:
        self._parking.insert(slot, parent)
        self._queue[slot] = None

    def touch(self, slots: Sequence[int], now_s: float) -> None:
        queue, parking = self._queue, self._parking
        for slot in slots:
            if slot in queue:
                queue.move_to_end(slot)
            elif parking.unpark(slot):
                queue[slot] = None

    def remove(self, slot: int) -> None:
        self._parking.remove(slot)
        self._queue.pop(slot, None)

    def victim(self, may_go: Callable[[int], bool]) -> int | None:
        return self._parking.next(self._candidate, may_go)

    def _candidate(self) -> int | None:
        return self._queue.popitem(last=False)[0] if self._queue else None
