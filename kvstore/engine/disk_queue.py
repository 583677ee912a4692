"""Writes and deletes of the disk tier, in order, off the event loop; and what the disk will hold after them.

One thread mutates the disk, first in first out, so a delete that follows a put of the same key is a delete. Writes that
wait behind each other go together, so that they share a sync. Room is planned when a write is queued: by the time it
runs, everything queued before it has run, so the tier's capacity holds at every instant.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from kvstore.errors import TierFailed, TierFull
from kvstore.index.entry import Described, ObjectKey, Retention
from kvstore.index.held import Entry
from kvstore.index.index import Index
from kvstore.metrics import NodeMetrics
from kvstore.tiers.base import Bytes
from kvstore.tiers.disk import DiskTier, NewObject

PENDING_BYTES_MAX = 256 << 20  # queued writes; beyond it a put waits
TOGETHER_BYTES_MAX = 32 << 20  # of writes that share a sync: the first of them waits for the last

MayGo = Callable[[Entry], bool]


def anything(_: Entry) -> bool:
    return True


@dataclass(eq=False)
class Write:
    """A queued write of an object's first `layers` quality layers; `done` tells whether they are on disk and still
    wanted."""

    key: ObjectKey
    data: Bytes
    described: Described
    layers: int
    retention: Retention | None
    cost: int
    replaces: int  # bytes of the file it replaces
    done: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(eq=False)
class Change:
    """Anything else that is queued."""

    function: Callable[[], None]
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class DiskQueue:
    def __init__(self, disk: DiskTier, index: Index, metrics: NodeMetrics, clock: Callable[[], float]) -> None:
        self._disk, self._index, self._metrics, self._clock = disk, index, metrics, clock
        self._thread = ThreadPoolExecutor(1, "kvstore-disk-write")
        self._writes: dict[ObjectKey, Write] = {}
        self._queued: deque[Write | Change] = deque()
        self._running: asyncio.Task[None] | None = None
        self._planned_bytes = disk.used_bytes
        self._pending_bytes = 0
        self._refused = False  # the disk has not always done what was planned

    @property
    def planned_bytes(self) -> int:
        """What the tier holds once everything queued has run."""
        return self._planned_bytes

    @property
    def pending_bytes(self) -> int:
        """Of objects whose write is queued."""
        return self._pending_bytes

    def lacks_room_for(self, length: int) -> bool:
        return self._planned_bytes + self._disk.cost_bytes(length) > self._disk.capacity_bytes

    def is_writing(self, key: ObjectKey) -> bool:
        return key in self._writes

    def writing(self, key: ObjectKey) -> asyncio.Future[bool] | None:
        write = self._writes.get(key)
        return write.done if write is not None else None

    async def wait_for_one(self) -> bool:
        """Until a queued write has run; False if there is none."""
        if not self._writes:
            return False
        await asyncio.wait([write.done for write in self._writes.values()], return_when=asyncio.FIRST_COMPLETED)
        return True

    async def wait_for_room_in_queue(self) -> None:
        while self._pending_bytes > PENDING_BYTES_MAX and await self.wait_for_one():
            pass

    async def wait_for_all(self) -> None:
        """Until everything queued by now has run."""
        if self._running is not None:
            await asyncio.shield(self.start(_nothing))

    async def flush(self) -> None:
        while self._running is not None:
            await asyncio.wait([self._running])

    def put(
        self, key: ObjectKey, described: Described, layers: int, data: Bytes, *, on_disk: int,
        retention: Retention | None = None,
    ) -> asyncio.Future[bool]:  # fmt: skip
        """Queues a write for which there is room. `on_disk`: length of what the disk holds under this key, or 0.

        The result is whether the object is on disk; the index knows before the result is set.
        """
        cost = self._disk.cost_bytes(len(data))
        write = Write(key, data, described, layers, retention, cost, self._disk.cost_bytes(on_disk) if on_disk else 0)
        self._writes[key] = write
        self._planned_bytes += cost
        self._pending_bytes += len(data)
        self._queue(write)
        return write.done

    def delete(self, key: ObjectKey, length: int) -> None:
        """Queues the removal of an object or of the write that would make it. `length`: of it, on disk or not."""
        self._planned_bytes -= self._disk.cost_bytes(length)
        write = self._writes.pop(key, None)
        if write is not None:
            self._planned_bytes -= write.replaces
        self._queue_quietly("delete", lambda: self._disk.delete(key))

    def truncate(self, key: ObjectKey, length: int, to_length: int) -> None:
        """Queues the cut of an object of `length` bytes to its first `to_length`."""
        self._planned_bytes += self._disk.cost_bytes(to_length) - self._disk.cost_bytes(length)
        self._queue_quietly("truncate", lambda: self._disk.truncate(key, to_length))

    def start(self, function: Callable[[], None]) -> asyncio.Future[None]:
        """Queues something else that must come in order with the writes; who waits for it sees what it raised."""
        change = Change(function)
        self._queue(change)
        return change.done

    async def aclose(self) -> None:
        await self.flush()
        self._thread.shutdown()
        self._disk.close()

    def _queue(self, operation: Write | Change) -> None:
        self._queued.append(operation)
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run_queued())

    def _queue_quietly(self, operation: str, change: Callable[[], bool]) -> None:
        def counted() -> None:
            try:
                change()
            except TierFailed as error:
                self._refused = True
                self._metrics.tier_failures.labels("disk", operation).inc()
                self._metrics.warn_once(f"disk {operation}", "%s; its room stays taken until it goes", error)

        self.start(counted)

    async def _run_queued(self) -> None:
        try:
            while self._queued:
                first = self._queued.popleft()
                if isinstance(first, Change):
                    await self._run_change(first)
                else:
                    await self._run_writes([first, *self._others_together(first)])
        finally:  # a write that dies of something unforeseen does not leave the rest waiting
            self._running = asyncio.get_running_loop().create_task(self._run_queued()) if self._queued else None
        if self._refused:  # what could not be removed takes room, until it is written over
            self._planned_bytes = self._disk.used_bytes

    async def _run_change(self, change: Change) -> None:
        ran = asyncio.get_running_loop().run_in_executor(self._thread, change.function)
        await asyncio.wait([ran])
        error = ran.exception()
        if error is None:
            change.done.set_result(None)
        else:
            change.done.set_exception(error)
            change.done.exception()  # if nobody waits for it, it is no news

    def _others_together(self, first: Write) -> Iterator[Write]:
        """Takes the writes that wait right behind the first, each key once."""
        keys, size = {first.key}, len(first.data)
        while self._queued and isinstance(following := self._queued[0], Write):
            size += len(following.data)
            if following.key in keys or size > TOGETHER_BYTES_MAX:
                return
            keys.add(following.key)
            self._queued.popleft()
            yield following

    async def _run_writes(self, writes: Sequence[Write]) -> None:
        stored = False
        objects = [NewObject(write.key, write.described.parent, write.data) for write in writes]

        def put_together() -> None:
            try:
                self._disk.put_many(objects)
            finally:  # the thread forgets what it ran a moment after it is done: till then memory would be lent to it
                objects.clear()

        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, put_together)
            stored = True
        except (TierFull, TierFailed) as error:
            self._refused = True
            self._metrics.tier_failures.labels("disk", "write").inc(len(writes))
            self._metrics.warn_once(f"disk write {error.code}", "%s; objects stay in memory", error)
        finally:  # whatever happened, those who wait are told
            for write in writes:
                self._ran(write, stored=stored)

    def _ran(self, write: Write, *, stored: bool) -> None:
        self._pending_bytes -= len(write.data)
        wanted = self._writes.get(write.key) is write
        if wanted:
            del self._writes[write.key]
            if stored:
                self._planned_bytes -= write.replaces
                self._index.add(write.key, write.described, "disk", write.layers, self._clock(), write.retention)
            else:
                self._planned_bytes -= write.cost
                if write.replaces:  # an older version is still there, and nobody knows of it any more
                    self._planned_bytes -= write.replaces
                    self._queue_quietly("delete", lambda: self._disk.delete(write.key))
        write.done.set_result(stored and wanted)


def _nothing() -> None:
    """What `wait_for_all` queues."""
