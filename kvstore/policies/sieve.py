"""SIEVE, leaf-first (Zhang et al., NSDI 2024).

One queue in the order of arrival. A hand moves from the oldest to the newest: what was used since it last passed loses
its mark and stays where it is, anything else goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvstore.policies.parking import Parking


class Sieve:
    name = "sieve"

    def __init__(self) -> None:
        self._parking = Parking()
        # The hand is between the two: ahead of it the newer, behind it those that it spared, both in order of arrival.
        self._ahead: dict[int, None] = {}
        self._behind: dict[int, None] = {}
        self._used: set[int] = set()

    def insert(self, slot: int, fingerprint: int, parent: int, position: int, size: int, now_s: float) -> None:
        self._parking.insert(slot, parent)
        self._ahead[slot] = None

    def touch(self, slots: Sequence[int], now_s: float) -> None:
        self._used.update(slots)
        for slot in slots:
            if self._parking.unpark(slot):
                self._behind[slot] = None  # the hand had passed it

    def remove(self, slot: int) -> None:
        self._parking.remove(slot)
        self._used.discard(slot)
        self._ahead.pop(slot, None)
        self._behind.pop(slot, None)

    def victim(self, may_go: Callable[[int], bool]) -> int | None:
        return self._parking.next(self._candidate, may_go)

    def _candidate(self) -> int | None:
        for _ in range(2):
            while self._ahead:
                slot = next(iter(self._ahead))
                del self._ahead[slot]
                if slot not in self._used:
                    return slot
                self._used.remove(slot)
                self._behind[slot] = None
            self._ahead, self._behind = self._behind, self._ahead
        return None
