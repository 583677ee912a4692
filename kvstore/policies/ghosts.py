"""What a policy remembers of objects that went, by fingerprint: 19 bytes each, in sets of four; the oldest go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WAYS = 4
SETS_FIRST = 1 << 14  # enough for a small tier to learn from what it cannot hold; 1.2 MiB


@dataclass(frozen=True)
class Ghost:
    """`used`: when it was used last. `class_`, `uses` and `forks` are as they were."""

    used: int
    class_: int
    uses: int
    forks: int


class Ghosts:
    def __init__(self) -> None:
        self._keys = np.zeros((SETS_FIRST, WAYS), np.uint64)
        self._used = np.full((SETS_FIRST, WAYS), -1, np.int64)  # -1: free
        self._notes = np.zeros((SETS_FIRST, WAYS, 3), np.uint8)

    @property
    def capacity(self) -> int:
        return self._keys.size

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._used.nbytes + self._notes.nbytes

    def add(self, fingerprint: int, ghost: Ghost) -> None:
        place = fingerprint & (len(self._keys) - 1)
        used = self._used[place].tolist()
        way = used.index(min(used))
        self._keys[place, way] = fingerprint
        self._used[place, way] = ghost.used
        self._notes[place, way] = ghost.class_, ghost.uses, ghost.forks

    def take(self, fingerprint: int) -> Ghost | None:
        """What was remembered, and no longer is."""
        place = fingerprint & (len(self._keys) - 1)
        keys = self._keys[place].tolist()
        if fingerprint not in keys:
            return None
        way = keys.index(fingerprint)
        used = int(self._used[place, way])
        if used < 0:
            return None
        self._used[place, way] = -1
        self._keys[place, way] = 0
        return Ghost(used, *self._notes[place, way].tolist())

    def grow(self) -> None:
        """Twice as many sets. The next bit of a fingerprint says in which of two sets an object is now."""
        upper = (self._keys & np.uint64(len(self._keys))).astype(bool)
        lower_used, upper_used = np.where(upper, -1, self._used), np.where(upper, self._used, -1)
        self._used = np.concatenate([lower_used, upper_used])
        self._keys = np.concatenate([self._keys, self._keys])
        self._keys[self._used < 0] = 0
        self._notes = np.concatenate([self._notes, self._notes])
