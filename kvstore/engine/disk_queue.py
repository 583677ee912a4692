"""Writes and deletes of the disk tier, in order, off the event loop; and what the disk will hold after them.

One thread mutates the disk, first in first out, so a delete that follows a put of the same key is a delete. Room is
planned when a write is queued: by the time it runs, everything queued before it has run, so the tier's capacity
holds at every instant.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kvstore.errors import TierFailed, TierFull
from kvstore.index.entry import Entry, ObjectKey
from kvstore.index.index import Index
from kvstore.metrics import NodeMetrics
from kvstore.tiers.base import Bytes
from kvstore.tiers.disk import DiskTier
from kvstore_codec import ObjectHeader

PENDING_BYTES_MAX = 256 << 20  # queued writes; beyond it a put waits

R = TypeVar("R")
MayGo = Callable[[Entry], bool]


def anything(_: Entry) -> bool:
    return True


@dataclass(eq=False)
class Write:
    """A queued write; `done` tells whether the object is on disk and still wanted."""

    parent: bytes
    header: ObjectHeader
    cost: int
    replaces: int  # bytes of the file it replaces
    done: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class DiskQueue:
    def __init__(self, disk: DiskTier, index: Index, metrics: NodeMetrics, clock: Callable[[], float]) -> None:
        self._disk, self._index, self._metrics, self._clock = disk, index, metrics, clock
        self._thread = ThreadPoolExecutor(1, "kvstore-disk-write")
        self._writes: dict[ObjectKey, Write] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._planned_bytes = disk.used_bytes
        self._pending_bytes = 0
        self._refused = False  # the disk has not always done what was planned

    @property
    def planned_bytes(self) -> int:
        """What the tier holds once everything queued has run."""
        return self._planned_bytes

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
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    async def flush(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)

    def put(
        self, key: ObjectKey, parent: bytes, header: ObjectHeader, data: Bytes, on_disk: int
    ) -> asyncio.Future[bool]:
        """Queues a write for which there is room (see `room_for`). `on_disk`: length of a file of this key, or 0.

        The result is whether the object is on disk; the index knows before the result is set.
        """
        cost = self._disk.cost_bytes(len(data))
        write = Write(parent, header, cost, self._disk.cost_bytes(on_disk) if on_disk else 0)
        self._writes[key] = write
        self._planned_bytes += cost
        self._pending_bytes += len(data)
        self._start(self._run_put(key, write, data))
        return write.done

    def delete(self, key: ObjectKey, length: int) -> None:
        """Queues the removal of a file or of the write that would make it. `length`: of the object, on disk or not."""
        self._planned_bytes -= self._disk.cost_bytes(length)
        write = self._writes.pop(key, None)
        if write is not None:
            self._planned_bytes -= write.replaces
        self._start(self._run_delete(key))

    def room_for(self, length: int, may_go: MayGo, on_evict: Callable[[Entry], None]) -> bool:
        """Makes room for an object by evicting leaves; False where none may go."""
        cost = self._disk.cost_bytes(length)
        while self._planned_bytes + cost > self._disk.capacity_bytes:
            entry = self._index.victim("disk", may_go) if cost <= self._disk.capacity_bytes else None
            if entry is None:
                return False
            self.evict(entry)
            on_evict(entry)
        return True

    def evict(self, entry: Entry) -> None:
        self._index.drop(entry, "disk")
        self.delete(entry.key, entry.length)

    async def run(self, function: Callable[[], R]) -> R:
        """Something else that must come in order with the writes."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def start(self, function: Callable[[], None]) -> None:
        """The same, not waited for; its errors are its own business."""
        self._start(self.run(function))

    async def aclose(self) -> None:
        await self.flush()
        self._thread.shutdown()
        self._disk.close()

    async def _run_put(self, key: ObjectKey, write: Write, data: Bytes) -> None:
        stored = False
        try:
            await self.run(lambda: self._disk.put(key, write.parent, data))
            stored = True
        except (TierFull, TierFailed) as error:
            self._refused = True
            self._metrics.tier_failures.labels("disk", "write").inc()
            self._metrics.warn_once(f"disk write {error.code}", "%s; objects stay in memory", error)
        finally:  # whatever happened, those who wait are told
            self._ran_put(key, write, len(data), stored=stored)

    def _ran_put(self, key: ObjectKey, write: Write, length: int, *, stored: bool) -> None:
        self._pending_bytes -= length
        wanted = self._writes.get(key) is write
        if wanted:
            del self._writes[key]
            if stored:
                self._planned_bytes -= write.replaces
                self._index.add(key, write.parent, write.header, "disk", self._clock())
            else:
                self._planned_bytes -= write.cost
                if write.replaces:  # an older file is still there, and nobody knows of it any more
                    self._planned_bytes -= write.replaces
                    self._start(self._run_delete(key))
        write.done.set_result(stored and wanted)

    async def _run_delete(self, key: ObjectKey) -> None:
        try:
            await self.run(lambda: self._disk.delete(key))
        except TierFailed as error:
            self._refused = True
            self._metrics.tier_failures.labels("disk", "delete").inc()
            self._metrics.warn_once("disk delete", "%s; the file stays until it can be removed", error)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._refused and not self._tasks:  # a file that could not be removed takes room, until it is written over
            self._planned_bytes = self._disk.used_bytes
