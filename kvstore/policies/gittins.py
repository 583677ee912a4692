"""Our policy: the leaf goes whose holding earns the fewest hits per unit of time, as learnt from all uses so far.

What is known of an object makes its class: how often it was used, whether prefixes fork after it (a shared prompt or
document, rather than a conversation), and whether it ended its last request. `Hazard` learns how soon objects of a
class come back, also those that were evicted (`Ghosts` recognise them), and turns that into an index. Nothing is tuned
to a workload: newcomers that hardly ever come back are soon the next to go, those whose time is yet to come stay.

A victim is the lowest of a window of leaves; a window gives several victims, so that ranking it costs little for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.policies.ghosts import Ghost, Ghosts
from kvstore.policies.hazard import Hazard, Indices
from kvstore.policies.leaves import Leaves

#: Uses before the last, in groups: 0, 1, 2, 3, 4 to 7, 8 to 15, 16 to 31, more.
GROUP_OF_USES = np.array([uses if uses < 3 else min(1 + uses.bit_length(), 7) for uses in range(256)], np.int64)
#: What is expected of each before anything was learnt: more uses, the sooner the next.
GROUP_PRIORS = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0)
FORKS_MAX = 2
KINDS = 2 * (FORKS_MAX + 1)
#: The clock counts requests, each as long as a usual one has objects: what is large does not make the rest look older.
REQUEST_TIME = 32
WINDOW = 1024
VICTIMS_SHARE = 1 / 128  # of a window
#: Indices are computed anew after uses of this many objects, or this share of the residents if that is more.
RANK_USES = 1024
RANK_SHARE = 1 / 16


class Gittins:
    name = "gittins"

    def __init__(self) -> None:
        self._hazard = Hazard(GROUP_PRIORS, KINDS)
        self._index = self._hazard.gittins()
        self._ranked_at = 0
        self._ghosts = Ghosts()
        self._leaves = Leaves()
        slots = self._leaves.slots
        self._fingerprints = np.zeros(slots, np.uint64)
        self._used = np.zeros(slots, np.int64)
        self._classes = np.zeros(slots, np.uint8)
        self._uses = np.zeros(slots, np.uint8)
        self._forks = np.zeros(slots, np.uint8)
        self._clock = 0
        self._path: list[int] = []  # of the request that is going on
        self._stored = False  # whether that has inserted any
        self._victims: list[int] = []  # the next last
        self._window_clock = 0

    @property
    def nbytes(self) -> int:
        """Memory of all columns and ghosts."""
        mine = (self._fingerprints, self._used, self._classes, self._uses, self._forks)
        return sum(column.nbytes for column in mine) + self._leaves.nbytes + self._ghosts.nbytes

    def touch(self, slots: Sequence[int], now_s: float) -> None:
        if slots and not self._stored and slots == self._path:
            return  # a request that looks up and then stores or reads is one use
        self._end_request()
        if not slots:
            return
        self._path = list(slots)
        used = np.asarray(self._path)
        self._hazard.end(self._classes[used].astype(np.int64), self._used[used], self._clock)
        self._uses[used] = np.minimum(self._uses[used], 254) + 1
        self._used[used] = self._clock

    def insert(self, slot: int, fingerprint: int, parent: int, position: int, size: int, now_s: float) -> None:
        if parent != (self._path[-1] if self._path else -1):
            self._end_request()
        while slot >= self._leaves.slots:
            self._grow()
        self._leaves.insert(slot, parent)
        ghost = self._ghosts.take(fingerprint)
        if ghost is None:
            self._uses[slot] = self._forks[slot] = 0
            if parent in self._leaves and self._forks[parent] < FORKS_MAX:
                self._forks[parent] += 1
        else:
            self._hazard.end(np.array([ghost.class_]), np.array([ghost.used]), self._clock)
            self._uses[slot], self._forks[slot] = min(ghost.uses + 1, 255), ghost.forks
        self._fingerprints[slot] = fingerprint
        self._used[slot] = self._clock
        self._path.append(slot)
        self._stored = True

    def load(self, fingerprints: NDArray[np.uint64], parents: NDArray[np.int32]) -> None:
        """All are taken for newcomers, used one after the other before time began: nothing is learnt from them."""
        count = len(fingerprints)
        children = self._leaves.load(parents)
        self._resize()
        self._fingerprints[:count] = fingerprints
        self._used[:count] = np.arange(count) - count
        self._forks[:count] = np.minimum(children, FORKS_MAX)
        self._classes[:count] = self._classes_of(np.arange(count), (children > 0).astype(np.int64))

    def remove(self, slot: int) -> None:
        if self._used[slot] == self._clock:
            self._end_request()  # it may be on the path
        if self._victims and self._victims[-1] == slot:
            self._victims.pop()
            self._follow(int(self._leaves.parents[slot]), slot)
        self._leaves.remove(slot)
        ghost = Ghost(int(self._used[slot]), int(self._classes[slot]), int(self._uses[slot]), int(self._forks[slot]))
        self._ghosts.add(int(self._fingerprints[slot]), ghost)

    def victim(self, may_go: Callable[[int], bool]) -> int | None:
        self._leaves.release(may_go)
        found = self._lowest(may_go)
        if found is None and self._leaves.release(may_go, now=True):
            found = self._lowest(may_go)
        return found

    def _follow(self, parent: int, slot: int) -> None:
        """Of one class and used at the same time, a victim's parent has the same index, so it is next."""
        if parent >= 0 and self._classes[parent] == self._classes[slot] and self._used[parent] == self._used[slot]:
            self._victims.append(parent)

    def _lowest(self, may_go: Callable[[int], bool]) -> int | None:
        share = VICTIMS_SHARE
        while True:
            while self._victims:
                slot = self._victims.pop()
                if slot not in self._leaves or not self._leaves.is_leaf(slot) or self._used[slot] > self._window_clock:
                    continue  # it went, or was used, since it was drawn
                if may_go(slot):
                    self._victims.append(slot)
                    return slot
                self._leaves.hold(slot)
            if not self._draw(share):
                return None
            share = min(2 * share, 1.0)  # where many may not go, for leases, a few at a time would take long

    def _draw(self, share: float) -> bool:
        """Ranks a window of leaves; that share of it is next. Returns False where there are none."""
        window = self._leaves.window(WINDOW)
        if not len(window):
            return False
        if self._clock - self._ranked_at >= max(RANK_USES, RANK_SHARE * self._leaves.residents):
            self._index = self._hazard.gittins()
            self._ranked_at = self._clock
        ranks = self._hazard.rank(self._index, self._classes[window], self._clock - self._used[window])
        lowest = np.argsort(ranks, kind="stable")[: max(1, int(len(window) * share))]
        self._victims = window[lowest[::-1]].tolist()
        self._window_clock = self._clock
        return True

    def _end_request(self) -> None:
        """Its objects begin a life each, now that it is known where the request ended."""
        path, self._path, self._stored = self._path, [], False
        if not path:
            return
        inner = np.ones(len(path), np.int64)
        inner[-1] = 0
        slots = np.asarray(path)
        classes = self._classes_of(slots, inner)
        self._classes[slots] = classes
        self._hazard.begin(classes)
        self._clock += REQUEST_TIME
        self._hazard.pass_time(self._clock, self._leaves.residents)

    def _classes_of(self, slots: NDArray[np.int64], inner: NDArray[np.int64]) -> Indices:
        return (GROUP_OF_USES[self._uses[slots]] * (FORKS_MAX + 1) + self._forks[slots]) * 2 + inner

    def _grow(self) -> None:
        self._leaves.grow()
        self._resize()

    def _resize(self) -> None:
        added = self._leaves.slots - len(self._used)
        self._fingerprints = np.append(self._fingerprints, np.zeros(added, np.uint64))
        self._used = np.append(self._used, np.zeros(added, np.int64))
        self._classes = np.append(self._classes, np.zeros(added, np.uint8))
        self._uses = np.append(self._uses, np.zeros(added, np.uint8))
        self._forks = np.append(self._forks, np.zeros(added, np.uint8))
        while self._ghosts.capacity < self._leaves.slots:
            self._ghosts.grow()
