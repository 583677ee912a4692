"""Making room in a tier: what shrinks, what moves down, what goes.

Under pressure cold objects first lose their finest quality layers, down to the configured floor; then leaves go, in the
policy's order. What memory alone holds moves to disk before it goes, where the node is told to write only then
(`disk_write = "demote"`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from kvstore.engine.disk_queue import DiskQueue, MayGo, anything
from kvstore.index.entry import ObjectKey
from kvstore.index.held import Entry
from kvstore.index.index import Index
from kvstore.index.leases import Leases
from kvstore.index.pins import Pins
from kvstore.metrics import NodeMetrics
from kvstore.tiers.host import HostTier


class Room:
    """`demote`: starts the write of an object to disk, for which others may go; False where that cannot be. None:
    nothing moves down."""

    def __init__(
        self, index: Index, leases: Leases, pins: Pins, host: HostTier, queue: DiskQueue | None, metrics: NodeMetrics,
        clock: Callable[[], float], demote: Callable[[Entry, MayGo], bool] | None,
    ) -> None:  # fmt: skip
        self._index, self._leases, self._pins = index, leases, pins
        self._host, self._queue = host, queue
        self._metrics, self._clock, self._demote = metrics, clock, demote

    def in_host(self, key: ObjectKey, length: int, may_go: MayGo = anything, *, used_before: float = math.inf) -> bool:
        """Makes room for an object, which replaces what is held under its key, by what `may_go` and was last used
        before the use `used_before`.

        False where nothing (more) may go, or what goes is on its way to disk: worth another try after a write."""
        if length > self._host.capacity_bytes:
            return False

        def may_leave(entry: Entry) -> bool:
            return is_another(entry) and entry.last_use < used_before and may_go(entry)

        def is_another(entry: Entry) -> bool:
            return entry.key != key

        moving = 0
        while moving < length and not self._host.room_for(length - moving, replacing=key):
            # Only where there is no disk: what that has, too, may as well go from memory altogether.
            if self._queue is None and self._shrink("host", may_leave):
                continue
            entry = self.victim("host", may_leave)
            if entry is None:
                return False
            if self._demote is not None and entry.tiers == ("host",) and self._demote(entry, is_another):
                moving += entry.length_in("host")  # it can go when it is on disk
            else:
                self.evict(entry, "host", "capacity")
        return not moving

    def on_disk(self, length: int, may_go: MayGo = anything) -> bool:
        """Makes room for an object of `length` bytes; False where nothing (more) may go."""
        if self._queue is None:
            return False
        while self._queue.lacks_room_for(length):
            if self._shrink("disk", may_go):
                continue
            entry = self.victim("disk", may_go)
            if entry is None:
                return False
            self.evict(entry, "disk", "capacity")
        return True

    def victim(self, tier: str, may_go: MayGo = anything) -> Entry | None:
        """What goes next from a tier."""
        self.expire()
        return self._index.victim(tier, lambda entry: may_go(entry) and not self._keeps(entry, tier), self._clock())

    def may_evict(self, entry: Entry, tier: str) -> bool:
        """Whether it may go, in whatever order."""
        self.expire()
        return tier in entry.tiers and not self._leases.holds(entry.row) and not self._keeps(entry, tier)

    def evict(self, entry: Entry, tier: str, reason: str) -> None:
        self.drop(entry, tier)
        self._metrics.evictions.labels(tier, reason).inc()

    def drop(self, entry: Entry, tier: str) -> None:
        """Removes an object from one tier; on disk it goes in order with the writes."""
        length = entry.length_in(tier)
        if not length:
            return
        key = entry.key
        self._index.drop(entry, tier)
        if tier == "host":
            self._host.delete(key)
        elif self._queue is not None:
            self._queue.delete(key, length)

    def is_promised(self, entry: Entry) -> bool:
        """A lease or a pin holds it."""
        self.expire()
        return self._leases.holds(entry.row) or self._pins.holds(entry.row)

    def is_writing(self, key: ObjectKey) -> bool:
        return self._queue is not None and self._queue.is_writing(key)

    def _keeps(self, entry: Entry, tier: str) -> bool:
        """Reasons of the engine's to keep a copy as it is: it is on its way to disk; or its object is pinned, and only
        memory's copy may go, where the disk has as much of it."""
        if tier == "host" and self.is_writing(entry.key):
            return True
        if not self._pins.holds(entry.row):
            return False
        return tier == "disk" or entry.layers_in("disk") < entry.layers_in("host")

    def _shrink(self, tier: str, may_shrink: MayGo) -> bool:
        """Takes the finest quality layer of a cold object; False where none may lose one."""
        self.expire()
        entry = self._index.shrinkable(tier, lambda entry: not self._keeps(entry, tier) and may_shrink(entry))
        if entry is None:
            return False
        key, described, layers = entry.key, entry.described, entry.layers_in(tier) - 1
        if tier == "host":
            self._host.truncate(key, described.layer_bytes[layers - 1])
        elif self._queue is not None:
            self._queue.truncate(key, described.layer_bytes[layers], described.layer_bytes[layers - 1])
        self._index.shrink(entry, tier, layers)
        self._metrics.degradations.labels(tier, described.quality_of(layers).label, "capacity").inc()
        return True

    def expire(self) -> None:
        """Lets go of what leases and pins hold no longer."""
        now_s = self._clock()
        self._leases.expire(now_s)
        self._pins.expire(now_s)
