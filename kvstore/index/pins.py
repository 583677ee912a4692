"""Pins: what an operator or a writer wants kept.

A *soft* pin decays: it runs out after its time, and where all of them together hold more than their budget, those with
the least time left go first. A *hard* pin stays until it is taken back, and is refused beyond its budget. Pins hold the
last copy of an object, in whatever tier that is; copies above it may go.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass


@dataclass(frozen=True)
class Pin:
    """`until_s` None: a hard one."""

    size: int
    until_s: float | None


class Pins:
    """Budgets in bytes. `forget` is to be called when an object is gone, before another takes its row."""

    def __init__(self, *, soft_bytes_max: int, hard_bytes_max: int) -> None:
        self._bytes_max = {False: soft_bytes_max, True: hard_bytes_max}
        self._bytes = {False: 0, True: 0}
        self._pins: dict[int, Pin] = {}
        self._expiries: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def soft_bytes(self) -> int:
        return self._bytes[False]

    @property
    def hard_bytes(self) -> int:
        return self._bytes[True]

    def holds(self, row: int) -> bool:
        return row in self._pins

    def rows(self) -> list[int]:
        return list(self._pins)

    def hard_rows(self) -> list[int]:
        return [row for row, pin in self._pins.items() if pin.until_s is None]

    def pin(self, row: int, size: int, until_s: float | None, now_s: float) -> bool:
        """Pins an object of `size` bytes until `until_s` (None: until it is taken back); False beyond the budget.

        A hard pin is not softened, and no pin is shortened."""
        self.expire(now_s)
        hard = until_s is None
        before = self._pins.get(row)
        if before is not None and (before.until_s is None or (until_s is not None and until_s <= before.until_s)):
            return True
        if size > self._bytes_max[hard] or (hard and self._bytes[True] + size > self._bytes_max[True]):
            return False
        self.forget(row)
        self._pins[row] = Pin(size, until_s)
        self._bytes[hard] += size
        if until_s is not None:
            heapq.heappush(self._expiries, (until_s, row))
            while self._bytes[False] > self._bytes_max[False]:
                self._lapse_next()
        return row in self._pins

    def forget(self, row: int) -> bool:
        """Whether it was pinned."""
        pin = self._pins.pop(row, None)
        if pin is None:
            return False
        self._bytes[pin.until_s is None] -= pin.size
        return True

    def expire(self, now_s: float) -> None:
        while self._expiries and self._expiries[0][0] <= now_s:
            self._lapse_next()

    def _lapse_next(self) -> None:
        until_s, row = heapq.heappop(self._expiries)
        pin = self._pins.get(row)
        if pin is not None and pin.until_s == until_s:  # else it was renewed, hardened or taken back
            self.forget(row)
