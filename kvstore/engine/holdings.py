"""What is held where: the index and the tiers it speaks of, changed together.

Only the event loop's thread touches this; blocking reads run in threads and meet the index again when they come
back. An object is written to memory and, behind it, to disk; what is on its way to disk is not evicted from memory.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import kvstore_codec as codec
from kvstore.engine.disk_queue import DiskQueue, MayGo, anything
from kvstore.errors import TierFailed
from kvstore.index.entry import Entry, ObjectKey
from kvstore.index.index import Index
from kvstore.index.leases import Leases
from kvstore.metrics import NodeMetrics
from kvstore.tiers.base import Bytes, Tier
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.host import HostTier
from kvstore_codec import ObjectHeader

READ_THREADS = 4
Reason = Literal["capacity", "admin"]
R = TypeVar("R")


class Holdings:
    """`disk` has not been scanned yet; constructing this does it, and evicts what a smaller capacity has no room for.

    Raises TierFailed."""

    def __init__(self, host: HostTier, disk: DiskTier | None, metrics: NodeMetrics, clock: Callable[[], float]) -> None:
        self.leases = Leases()
        self.index = Index(("host", "disk"), self.leases.holds)
        self.host, self.disk = host, disk
        self._metrics, self._clock = metrics, clock
        if disk is not None:
            self._load(disk)
        self.queue = DiskQueue(disk, self.index, metrics, clock) if disk is not None else None
        self._readers = ThreadPoolExecutor(READ_THREADS, "kvstore-read")

    @property
    def tiers(self) -> list[Tier]:
        return [self.host] if self.disk is None else [self.host, self.disk]

    async def read(self, entry: Entry, length: int) -> memoryview | None:
        """The first `length` bytes (the end of a quality layer) from the fastest tier that has them intact."""
        for tier in entry.tiers:
            data = self.host.read(entry.key, length) if tier == "host" else None
            try:
                if data is None:
                    data = await self.read_checked(entry, tier, length)
            except codec.ObjectError:
                continue
            if data is not None:
                self._metrics.reads.labels(tier).inc()
                self._metrics.read_bytes.labels(tier).inc(length)
                if tier != "host" and length == entry.length:
                    self._promote(entry, data)
                return data
        self._metrics.reads.labels("none").inc()
        return None

    async def read_checked(self, entry: Entry, tier: str, length: int) -> memoryview | None:
        """The same from one tier, every checksum compared; None where it is not there or cannot be read.

        Raises codec.ObjectError for an object that is damaged or lost, which is then dropped from the tier."""
        held = self.host if tier == "host" else self.disk
        assert held is not None, "the index names a tier that this node has not"
        tiers = entry.tiers  # a new tuple whenever the object moves: the same one means that it did not
        try:
            return await self.in_thread(lambda: _read_verified(held, entry.key, length))
        except TierFailed as error:
            self._metrics.tier_failures.labels(tier, "read").inc()
            self._metrics.warn_once(f"{tier} read {error.code}", "%s; a miss", error)
            return None
        except codec.ObjectError as error:
            if self.index.get(entry.key) is not entry or entry.tiers is not tiers:
                return None  # replaced, dropped or moved while it was read
            self._metrics.integrity_failures.labels(tier, error.code.value).inc()
            self._metrics.warn_once(
                f"{tier} damage",
                "%s tier: chunk %s is damaged or lost, and dropped: %s",
                tier,
                entry.key.chunk_hash.hex(),
                error,
            )
            self.drop(entry, tier)
            raise

    def room_in_host(
        self, key: ObjectKey, length: int, may_go: MayGo = anything, *, used_before: float = math.inf
    ) -> bool:
        """Makes room for an object, which replaces what is held under its key, by evicting what `may_go` and was last
        used before the tick `used_before`; False where nothing (more) may go."""
        held = self.index.get(key)
        room = self.host.capacity_bytes + (held.length if held is not None and "host" in held.tiers else 0)
        if length > self.host.capacity_bytes:
            return False
        while self.host.used_bytes + length > room:
            entry = self.victim("host", may_go)
            if entry is None or entry.key == key or entry.last_use >= used_before:
                return False
            self.evict(entry, "host", "capacity")
        return True

    def room_on_disk(self, length: int, may_go: MayGo = anything) -> bool:
        """The same for the disk."""
        self.leases.expire(self._clock())
        return self.queue is not None and self.queue.room_for(
            length, may_go, lambda _: self._metrics.evictions.labels("disk", "capacity").inc()
        )

    def victim(self, tier: str, may_go: MayGo = anything) -> Entry | None:
        """What goes next from a tier."""
        self.leases.expire(self._clock())
        return self.index.victim(
            tier, lambda entry: may_go(entry) and (tier != "host" or not self._is_writing(entry.key))
        )

    def may_evict(self, entry: Entry, tier: str) -> bool:
        """Whether it may go, in whatever order."""
        self.leases.expire(self._clock())
        unsaved = tier == "host" and self._is_writing(entry.key)
        return tier in entry.tiers and not unsaved and not self.leases.holds(entry.key)

    def evict(self, entry: Entry, tier: str, reason: Reason) -> None:
        self.drop(entry, tier)
        self._metrics.evictions.labels(tier, reason).inc()

    def drop(self, entry: Entry, tier: str) -> None:
        """Removes an object from one tier; its file goes in order with the writes."""
        if tier == "host":
            self.host.delete(entry.key)
            self.index.drop(entry, tier)
        elif self.queue is not None:
            self.queue.evict(entry)

    def delete(self, entry: Entry) -> None:
        """Removes an object everywhere, a write under way included."""
        if self.queue is not None and "disk" not in entry.tiers and self.queue.is_writing(entry.key):
            self.queue.delete(entry.key, entry.length)
        for tier in entry.tiers:
            self.drop(entry, tier)

    def place(
        self, key: ObjectKey, parent: bytes, header: ObjectHeader, data: Bytes, may_go: MayGo, *, in_host: bool
    ) -> asyncio.Future[bool] | None:
        """Stores an object in memory (`in_host`: there is room) and queues its write to disk.

        A worse version makes way. The result tells when and whether it is on disk; None where there is no disk or
        no room on it. Nothing of this key is being written."""
        # On disk a replacement stands beside what it replaces for a moment: that may go first.
        to_disk = self.room_on_disk(len(data), lambda entry: entry.key == key or may_go(entry))
        worse = self.index.get(key)
        on_disk = worse.length if worse is not None and "disk" in worse.tiers else 0
        if worse is not None and (in_host or to_disk):
            self.host.delete(key)
            for tier in worse.tiers:
                self.index.drop(worse, tier)
            if on_disk and not to_disk and self.queue is not None:
                self.queue.delete(key, on_disk)
        if in_host:
            self.host.put(key, parent, data)
            self.index.add(key, parent, header, "host", self._clock())
        return self.queue.put(key, parent, header, data, on_disk) if to_disk and self.queue is not None else None

    def persist(self, entry: Entry, may_go: MayGo) -> asyncio.Future[bool] | None:
        """Queues the write of an object that memory alone holds; None where that cannot be."""
        if self.queue is None:
            return None
        pending = self.queue.writing(entry.key)
        if pending is not None:
            return pending
        data = self.host.read(entry.key, entry.length)
        if data is None or not self.room_on_disk(entry.length, may_go):
            return None
        return self.queue.put(entry.key, entry.parent, entry.header, data, 0)

    async def in_thread(self, function: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._readers, function)

    async def wait_for_writes(self) -> None:
        """Until every write and delete queued by now has run."""
        if self.queue is not None:
            await self.queue.wait_for_all()

    async def aclose(self) -> None:
        """Writes out what is queued."""
        if self.queue is not None:
            await self.queue.aclose()
        self._readers.shutdown()

    def _is_writing(self, key: ObjectKey) -> bool:
        return self.queue is not None and self.queue.is_writing(key)

    def _promote(self, entry: Entry, data: memoryview) -> None:
        current = self.index.get(entry.key) is entry and "host" not in entry.tiers
        # Not in the place of what is more wanted: reading a prompt that memory cannot hold would push out its start.
        if current and self.room_in_host(entry.key, entry.length, used_before=entry.last_use):
            self.host.put(entry.key, entry.parent, data)
            self.index.add(entry.key, entry.parent, entry.header, "host", self._clock())

    def _load(self, disk: DiskTier) -> None:
        for stored in disk.scan():
            self.index.add(stored.key, stored.parent, stored.header, "disk", self._clock())
        while disk.used_bytes > disk.capacity_bytes:
            entry = self.index.victim("disk")
            assert entry is not None, "nothing is leased yet, so something is a leaf"
            disk.delete(entry.key)
            self.index.drop(entry, "disk")
            self._metrics.evictions.labels("disk", "capacity").inc()


def _read_verified(tier: Tier, key: ObjectKey, length: int) -> memoryview:
    data = tier.read(key, length)
    if data is None:
        raise codec.DamagedObject(
            "the object is gone or cut short", code=codec.ErrorCode.TRUNCATED, expected_bytes=length
        )
    header = codec.verify(data).header
    if ObjectKey(header.namespace_id, header.chunk_hash, header.part) != key:
        raise codec.ForeignObject("another object is stored under this key", found=header.chunk_hash.hex()[:16])
    return data
