"""S3-FIFO, leaf-first (Yang et al., SOSP 2023).

Newcomers enter a small FIFO, a tenth of the residents. What was used there goes on to the main FIFO; the rest goes, and
is remembered, by fingerprint, for as many evictions as the main FIFO is long, to enter the main FIFO if it comes back.
The main FIFO gives what was used another round for each use, at most three.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from kvstore.policies.parking import Parking

SMALL_SHARE = 0.1
USES_MAX = 3


class S3Fifo:
    name = "s3-fifo"

    def __init__(self) -> None:
        self._parking = Parking()
        self._small: OrderedDict[int, None] = OrderedDict()
        self._main: OrderedDict[int, None] = OrderedDict()
        self._in_main: set[int] = set()
        self._uses: dict[int, int] = {}
        self._fingerprints: dict[int, int] = {}
        self._remembered: OrderedDict[int, None] = OrderedDict()

    def insert(self, slot: int, fingerprint: int, parent: int, position: int, size: int, now_s: float) -> None:
        self._parking.insert(slot, parent)
        self._fingerprints[slot] = fingerprint
        self._uses[slot] = 0
        if self._remembered.pop(fingerprint, 0) is None:
            self._in_main.add(slot)
            self._main[slot] = None
        else:
            self._small[slot] = None

    def touch(self, slots: Sequence[int], now_s: float) -> None:
        for slot in slots:
            if self._parking.unpark(slot):  # it was to go, and is used: as if the queue had found it used
                self._in_main.add(slot)
                self._main[slot] = None
            else:
                self._uses[slot] = min(self._uses[slot] + 1, USES_MAX)

    def remove(self, slot: int) -> None:
        self._parking.remove(slot)
        fingerprint = self._fingerprints.pop(slot)
        del self._uses[slot]
        self._small.pop(slot, None)
        self._main.pop(slot, None)
        if slot in self._in_main:
            self._in_main.remove(slot)
            return
        self._remembered[fingerprint] = None
        while len(self._remembered) > max(len(self._in_main), (1 - SMALL_SHARE) * len(self._parking)):
            self._remembered.popitem(last=False)

    def victim(self, may_go: Callable[[int], bool]) -> int | None:
        return self._parking.next(self._candidate, may_go)

    def _candidate(self) -> int | None:
        while self._small or self._main:
            small_slots = len(self._parking) - len(self._in_main)  # those that wait count too
            if self._small and (small_slots > SMALL_SHARE * len(self._parking) or not self._main):
                slot = self._small.popitem(last=False)[0]
                if not self._uses[slot]:
                    return slot
                self._uses[slot] = 0
                self._in_main.add(slot)
            else:
                slot = self._main.popitem(last=False)[0]
                if not self._uses[slot]:
                    return slot
                self._uses[slot] -= 1
            self._main[slot] = None
        return None
