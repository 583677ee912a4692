"""2Q, leaf-first (Johnson and Shasha, VLDB 1994).

Newcomers enter a FIFO window, `WINDOW_SHARE` of the residents. What is used again while it is there moves to an LRU
queue, the main one; what leaves it unused is remembered, by fingerprint, for twice as many evictions as there are
residents, and enters the main queue at once if it comes back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from kvstore.policies.parking import Parking

WINDOW_SHARE = 0.3
REMEMBERED_SHARE = 2.0


class TwoQueue:
    name = "2q"

    def __init__(self) -> None:
        self._parking = Parking()
        self._window: OrderedDict[int, None] = OrderedDict()
        self._main: OrderedDict[int, None] = OrderedDict()
        self._fingerprints: dict[int, int] = {}
        self._in_main: set[int] = set()
        self._remembered: OrderedDict[int, None] = OrderedDict()

    def insert(self, slot: int, fingerprint: int, parent: int, position: int, size: int, now_s: float) -> None:
        self._parking.insert(slot, parent)
        self._fingerprints[slot] = fingerprint
        if self._remembered.pop(fingerprint, 0) is None:
            self._in_main.add(slot)
            self._main[slot] = None
        else:
            self._window[slot] = None

    def touch(self, slots: Sequence[int], now_s: float) -> None:
        for slot in slots:
            if slot in self._main:
                self._main.move_to_end(slot)
            else:
                self._window.pop(slot, None)
                self._parking.unpark(slot)
                self._in_main.add(slot)
                self._main[slot] = None

    def remove(self, slot: int) -> None:
        self._parking.remove(slot)
        fingerprint = self._fingerprints.pop(slot)
        self._window.pop(slot, None)
        self._main.pop(slot, None)
        if slot in self._in_main:
            self._in_main.remove(slot)
            return
        self._remembered[fingerprint] = None
        while len(self._remembered) > REMEMBERED_SHARE * len(self._parking):
            self._remembered.popitem(last=False)

    def victim(self, may_go: Callable[[int], bool]) -> int | None:
        return self._parking.next(self._candidate, may_go)

    def _candidate(self) -> int | None:
        window_slots = len(self._parking) - len(self._in_main)  # those that wait count too
        if self._window and (window_slots > WINDOW_SHARE * len(self._parking) or not self._main):
            return self._window.popitem(last=False)[0]
        return self._main.popitem(last=False)[0] if self._main else None
