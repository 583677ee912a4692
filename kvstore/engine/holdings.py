"""What is held where: the index and the tiers it speaks of, changed together.

Only the event loop's thread touches this; blocking reads run in threads and meet the index again when they come
back. An object is written to memory and, behind it, to disk; what is on its way to disk is not evicted from memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import kvstore_codec as codec
from kvstore.engine.disk_queue import DiskQueue, MayGo, anything
from kvstore.engine.outside import FoundObject
from kvstore.engine.room import Room
from kvstore.engine.stage import Staged, bytes_of
from kvstore.errors import TierFailed, TierFull
from kvstore.index.entry import Described, ObjectKey, Retention
from kvstore.index.held import Entry
from kvstore.index.index import Index, NewPolicy
from kvstore.index.leases import Leases
from kvstore.index.loading import load
from kvstore.index.pins import Pins
from kvstore.memory import return_memory, without_collecting
from kvstore.metrics import NodeMetrics
from kvstore.tiers.base import Bytes, Tier
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk_admission import RejectFirst
from kvstore.tiers.host import HostTier, Reserved
from kvstore_codec import Quality

READ_THREADS = 4
READ_ATTEMPTS = 3  # at an object that keeps changing while it is read
DiskWrite = Literal["behind", "through", "demote"]
R = TypeVar("R")


class Holdings:
    """`disk` has not been scanned yet; constructing this does it, and evicts what a smaller capacity has no room for.

    `floor`: quality to which cold objects may shrink under pressure; None: they do not. Raises TierFailed."""

    def __init__(
        self, host: HostTier, disk: DiskTier | None, metrics: NodeMetrics, clock: Callable[[], float], *,
        policy: NewPolicy, floor: Quality | None, disk_write: DiskWrite, admission: RejectFirst | None,
        soft_pin_share: float, hard_pin_share: float,
    ) -> None:  # fmt: skip
        self.host, self.disk = host, disk
        capacity = max(tier.capacity_bytes for tier in self.tiers)
        self.pins = Pins(soft_bytes_max=int(soft_pin_share * capacity), hard_bytes_max=int(hard_pin_share * capacity))
        self.index = Index(
            ("host", "disk"),
            policy,
            floor=floor,
            is_held=lambda row: self.leases.holds(row),
            on_forget=self.pins.forget,
        )
        self.leases = Leases(self.index.columns)
        self._metrics, self._clock = metrics, clock
        self._disk_write, self._admission = disk_write, admission
        if disk is not None:
            self._load(disk)
        self.queue = DiskQueue(disk, self.index, metrics, clock) if disk is not None else None
        demote = self._demote if disk is not None and disk_write == "demote" else None
        self.room = Room(self.index, self.leases, self.pins, host, self.queue, metrics, clock, demote)
        self._readers = ThreadPoolExecutor(READ_THREADS, "kvstore-read")

    @property
    def tiers(self) -> list[Tier]:
        return [self.host] if self.disk is None else [self.host, self.disk]

    async def read(self, entry: Entry, quality: Quality) -> memoryview | None:
        """The object's prefix that reads at `quality`, or as well as is held, from the fastest tier that has it
        intact."""
        for _ in range(READ_ATTEMPTS):
            version = entry.version
            data = await self._read_once(entry, quality)
            if data is not None or not entry.held or entry.version == version:
                return data
        return None

    def read_at_once(self, keys: Sequence[ObjectKey], quality: Quality, bytes_max: float) -> list[memoryview]:
        """`read` of the first keys, all of one namespace and part, up to what memory alone does not answer, and to
        about `bytes_max`: a whole chain for little more than one object."""
        if not keys:
            return []
        index = self.index
        rows = index.prefix(keys[0].namespace_id, [key.chunk_hash for key in keys], keys[0].part)
        lengths, qualities = index.readable(rows, quality, "host")
        found = self.host.read_many(keys, lengths, bytes_max)
        rows = rows[: len(found)]
        index.count_reads(rows)
        self._metrics.count_reads("host", qualities[: len(found)], lengths[: len(found)])
        if self._admission is not None:
            for row in rows.tolist():
                self.used_again(Entry(index, row))
        return found

    async def read_checked(self, entry: Entry, tier: str, length: int) -> memoryview | None:
        """The first `length` bytes from one tier, every checksum compared; None where it cannot be read, or changed
        while it was.

        Raises codec.ObjectError for an object that is damaged or lost, which is then dropped from the tier."""
        held = self.host if tier == "host" else self.disk
        assert held is not None, "the index names a tier that this node has not"
        key, version = entry.key, entry.version
        try:
            return await self.in_thread(lambda: _read_verified(held, key, length))
        except TierFailed as error:
            self._metrics.tier_failures.labels(tier, "read").inc()
            self._metrics.warn_once(f"{tier} read {error.code}", "%s; a miss", error)
            return None
        except codec.ObjectError as error:
            if not entry.held or entry.version != version:
                return None  # replaced, dropped, cut or moved while it was read
            self._metrics.integrity_failures.labels(tier, error.code.value).inc()
            self._metrics.warn_once(
                f"{tier} damage", "%s tier: chunk %s is damaged or lost, and dropped: %s",
                tier, key.chunk_hash.hex(), error,
            )  # fmt: skip
            self.room.drop(entry, tier)
            raise

    def delete(self, entry: Entry) -> None:
        """Removes an object everywhere, a write under way included."""
        key = entry.key
        if self.queue is not None and "disk" not in entry.tiers and self.queue.is_writing(key):
            self.queue.delete(key, entry.length)
        for tier in entry.tiers:
            self.room.drop(entry, tier)

    def place(
        self, key: ObjectKey, described: Described, staged: Staged, may_go: MayGo, *, in_host: bool,
        retention: Retention | None = None, durable: bool = False,
    ) -> tuple[bool, asyncio.Future[bool] | None]:  # fmt: skip
        """Stores a whole object in memory (`in_host`: there is room, or it is there) and, as configured or `durable`,
        queues its write to disk.

        A worse version makes way, unless it is leased or pinned and there is no room in memory: it would be gone until
        the better one is on disk. The result is whether it is in memory, and what tells when and whether it is on
        disk: None where there is no disk or no room on it. Nothing of this key is being written."""
        data: Bytes = bytes_of(staged)
        # On disk a replacement stands beside what it replaces for a moment: that may go first.
        is_below = (held := self.index.get(key)) is not None and "disk" in held.tiers
        wants_disk = not in_host or durable or (self._disk_write != "demote" and (is_below or self._is_admitted(key)))
        to_disk = wants_disk and self.room.on_disk(len(data), lambda entry: entry.key == key or may_go(entry))
        in_host = in_host and self._put_in_host(key, described.parent, staged)
        worse = self.index.get(key)
        if worse is not None and not in_host and self.room.is_promised(worse):
            return False, None
        on_disk = worse.length_in("disk") if worse is not None else 0
        if worse is not None and (in_host or to_disk):
            if in_host:
                self.index.replace(worse, described)  # what held the worse version holds this one
            else:
                self.host.delete(key)
                for tier in worse.tiers:
                    self.index.drop(worse, tier)
            if on_disk and not to_disk and self.queue is not None:
                self.queue.delete(key, on_disk)
        if in_host:
            self.index.add(key, described, "host", described.layers, self._clock(), retention)
            data = self.host.read(key, len(data)) or data  # the same bytes: the caller's need not wait for the disk
        if not to_disk or self.queue is None:
            return in_host, None
        return in_host, self.queue.put(key, described, described.layers, data, on_disk=on_disk, retention=retention)

    def allocate(self, key: ObjectKey, length: int, may_go: MayGo) -> Staged:
        """Memory's own room for an object that is about to arrive, where there is some or some can be made; else a
        buffer."""
        reserved = None
        # What has to be written to disk before it goes makes no room now: the commit waits for that.
        demotes = self._disk_write == "demote"
        if self.host.room_for(length) if demotes else self.room.in_host(key, length, may_go):
            try:
                reserved = self.host.reserve(length)
            except TierFailed as error:
                self._count_host_failure(error)
        return bytearray(length) if reserved is None else reserved

    def persist(self, entry: Entry, may_go: MayGo = anything) -> asyncio.Future[bool] | None:
        """Queues the write of an object that memory alone holds; None where that cannot be."""
        if self.queue is None:
            return None
        key, length = entry.key, entry.length_in("host")
        pending = self.queue.writing(key)
        if pending is not None:
            return pending
        data = self.host.read(key, length)
        if data is None or not self.room.on_disk(length, may_go):
            return None
        return self.queue.put(key, entry.described, entry.layers_in("host"), data, on_disk=entry.length_in("disk"))

    def used_again(self, entry: Entry, may_go: MayGo = anything) -> None:
        """Writes what was not admitted to the disk when it was put, and is worth it by now."""
        behind = self.queue is not None and self._disk_write == "behind"
        if self._admission is None or not behind or entry.tiers != ("host",) or self.room.is_writing(entry.key):
            return
        if self._is_admitted(entry.key):
            self.persist(entry, may_go)

    def take_in(self, key: ObjectKey, found: FoundObject) -> None:
        """Keeps in memory what was read elsewhere, where that costs nothing that was used since."""
        length, index = len(found.data), self.index
        # What is on its way to disk and nowhere else is not in the index yet: it comes there, maybe as another version.
        known = index.row_of(key) is not None or self.room.is_writing(key)
        if found.whole and not known and self.room.in_host(key, length, used_before=index.uses):
            self._hold_in_host(key, found.described, found.described.layers, found.data)

    def is_in_memory(self, key: ObjectKey, quality: Quality) -> bool:
        """Whether a read at `quality` is answered from memory with all that is held at it."""
        entry = self.index.get(key)
        return entry is not None and entry.layers_in("host") >= min(entry.described.layers_for(quality), entry.layers)

    async def in_thread(self, function: Callable[[], R]) -> R:
        # A thread lets go of what it answered a moment after it is here, and memory that somebody sees is not free: so
        # the answer is a box, emptied at once.
        box = await asyncio.get_running_loop().run_in_executor(self._readers, lambda: [function()])
        return box.pop()

    async def wait_for_writes(self) -> None:
        """Until every write and delete queued by now has run."""
        if self.queue is not None:
            await self.queue.wait_for_all()

    async def aclose(self) -> None:
        """Writes out what is queued."""
        if self.queue is not None:
            await self.queue.aclose()
        self._readers.shutdown()
        self.host.close()

    async def _read_once(self, entry: Entry, quality: Quality) -> memoryview | None:
        described = entry.described
        layers = min(described.layers_for(quality), entry.layers)
        length = described.layer_bytes[layers - 1]
        for tier in entry.tiers:
            if entry.layers_in(tier) < layers:
                continue
            data = self.host.read(entry.key, length) if tier == "host" else None
            try:
                if data is None:
                    data = await self.read_checked(entry, tier, length)
            except codec.ObjectError:
                continue
            if data is not None:
                self._metrics.count_read(tier, described.quality_of(layers), length)
                if tier == "host":
                    self.used_again(entry)
                elif entry.held and length == entry.length:
                    self._promote(entry, data)
                return data
            if not entry.held:
                return None
        return None

    def _promote(self, entry: Entry, data: memoryview) -> None:
        # Not in the place of what is more wanted: reading a prompt that memory cannot hold would push out its start.
        key, layers = entry.key, entry.layers
        if entry.layers_in("host") < layers and self.room.in_host(key, len(data), used_before=entry.last_use):
            self._hold_in_host(key, entry.described, layers, data)

    def _hold_in_host(self, key: ObjectKey, described: Described, layers: int, data: Bytes) -> None:
        if self._put_in_host(key, described.parent, data):
            self.index.add(key, described, "host", layers, self._clock())
        elif (entry := self.index.get(key)) is not None:
            self.index.drop(entry, "host")

    def _put_in_host(self, key: ObjectKey, parent: bytes, data: Bytes | Reserved) -> bool:
        """Whether the bytes are in memory now; what was there of the object makes way. The index does not know yet."""
        try:
            self.host.delete(key)
            if isinstance(data, Reserved):
                self.host.adopt(key, data)
            else:
                self.host.put(key, parent, data)
        except (TierFull, TierFailed) as error:  # being read takes room; the machine may have less than was configured
            self._count_host_failure(error)
            return False
        return True

    def _count_host_failure(self, error: TierFull | TierFailed) -> None:
        self._metrics.tier_failures.labels("host", "write").inc()
        self._metrics.warn_once(f"host write {error.code}", "%s; the object is not kept in memory", error)

    def _demote(self, entry: Entry, may_go: MayGo) -> bool:
        wanted = entry.reads > 0 or self._is_admitted(entry.key)
        return wanted and self.persist(entry, may_go) is not None

    def _is_admitted(self, key: ObjectKey) -> bool:
        """Whether what memory alone has is written to disk now that it is used, or about to go."""
        if self._admission is None or self.queue is None:
            return True
        admitted = self._admission.admit(key)
        self._metrics.admissions.labels("written" if admitted else "held_back").inc()
        return admitted

    def _load(self, disk: DiskTier) -> None:
        now_s = self._clock()
        with without_collecting():
            load(self.index, "disk", disk.scan_columns(), now_s)
        return_memory()
        while disk.used_bytes > disk.capacity_bytes:
            entry = self.index.victim("disk", anything, now_s)
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
    if ObjectKey.of(header) != key:
        raise codec.ForeignObject("another object is stored under this key", found=header.chunk_hash.hex()[:16])
    return data
