"""The tier that several nodes share (Redis), asked from threads so that the event loop never waits for it.

What is there no index knows, so it is asked, and its answers are misses where it does not answer in time. Whole objects
are checked before anybody gets them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import kvstore_codec as codec
from kvstore.errors import TierFailed, TierFull
from kvstore.index.entry import Described, ObjectKey
from kvstore.metrics import NodeMetrics
from kvstore.tiers.base import Bytes, StoredObject
from kvstore.tiers.circuit import State
from kvstore.tiers.redis import READ_BYTES_MAX, RedisTier
from kvstore.tiers.redis_server import FailureKind
from kvstore_codec import Quality

THREADS = 4
BATCH_OBJECTS = 16  # described and read together
PENDING_BYTES_MAX = 128 << 20  # on their way; beyond it a write is dropped: the next put of the object writes it
PROBE_S = 5.0
R = TypeVar("R")


class SharedObject(NamedTuple):
    """An object, or its prefix that reads at the quality asked for. `whole`: it is all that is stored."""

    described: Described
    data: memoryview
    whole: bool


class SharedEvents:
    """Counts what the tier tells, from whatever thread."""

    def __init__(self, metrics: NodeMetrics) -> None:
        self._metrics = metrics

    def failed(self, operation: str, kind: FailureKind, problem: str) -> None:
        self._metrics.tier_failures.labels("redis", operation).inc()
        self._metrics.shared_failures.labels(kind).inc()
        if kind != "open":  # the circuit said so when it opened
            self._metrics.warn_once(f"redis {kind}", "redis: %s; a miss", problem)

    def damaged(self, reason: str) -> None:
        self._metrics.integrity_failures.labels("redis", reason).inc()
        self._metrics.warn_once(f"redis damage {reason}", "redis: a value is no object of its key (%s)", reason)

    def circuit(self, server: str, state: State) -> None:
        self._metrics.circuit_changes.labels(server, state).inc()  # the tier logs it


class Shared:
    """`writes`: whether what is put here goes there too. `start` begins to watch it, `aclose` ends that."""

    def __init__(self, tier: RedisTier, metrics: NodeMetrics, *, writes: bool) -> None:
        self.tier = tier
        self._metrics, self._writes = metrics, writes
        self._threads = ThreadPoolExecutor(THREADS, "kvstore-redis")
        self._pending_bytes = 0
        self._tasks: set[asyncio.Future[bool]] = set()
        self._watch: asyncio.Task[None] | None = None

    @property
    def pending_bytes(self) -> int:
        """Of objects on their way."""
        return self._pending_bytes

    def start(self) -> None:
        self._watch = asyncio.get_running_loop().create_task(self._probe())

    async def find(self, namespace_id: bytes, hashes: Sequence[bytes], part: int) -> list[StoredObject]:
        """The longest stored prefix of a chain."""
        return await self._in_thread(lambda: self.tier.find(namespace_id, hashes, part)) if hashes else []

    async def read(self, keys: Sequence[ObjectKey], quality: Quality) -> list[SharedObject]:
        """The first of these objects, in order, up to the first that is not there, is damaged, or does not fit in one
        answer."""
        return await self._in_thread(lambda: self._read(keys[:BATCH_OBJECTS], quality))

    def write(self, key: ObjectKey, parent: bytes, quality: Quality, data: Bytes) -> asyncio.Future[bool] | None:
        """Sends an object there; the result is whether it arrived. None where too much is on its way."""
        if not self._writes:
            return None
        if self._pending_bytes + len(data) > PENDING_BYTES_MAX:
            self._metrics.tier_failures.labels("redis", "queue").inc()
            self._metrics.warn_once("redis queue", "redis is slower than puts are: some objects do not go there")
            return None
        self._pending_bytes += len(data)
        task = asyncio.ensure_future(self._put(key, parent, quality, data))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def delete(self, keys: Sequence[ObjectKey]) -> None:
        await self._quietly(lambda: self.tier.delete_many(keys))

    async def purge(self, namespace_id: bytes) -> None:
        await self._quietly(lambda: self.tier.purge(namespace_id))

    async def aclose(self) -> None:
        """Waits for what is on its way, which takes a bounded time."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        if self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.to_thread(self._threads.shutdown)
        self.tier.close()

    async def _put(self, key: ObjectKey, parent: bytes, quality: Quality, data: Bytes) -> bool:
        def put() -> None:
            (held,) = self.tier.describe([key])
            if held is None or held.quality > quality:  # another node may have stored a better version
                self.tier.put(key, parent, data)

        try:
            return await self._quietly(put)
        finally:
            self._pending_bytes -= len(data)

    async def _quietly(self, change: Callable[[], object]) -> bool:
        """Whether it was done; the tier has counted it where not."""
        with contextlib.suppress(TierFull, TierFailed):
            await self._in_thread(change)
            return True
        return False

    async def _probe(self) -> None:
        while True:
            await self._in_thread(self.tier.probe)
            await asyncio.sleep(PROBE_S)

    async def _in_thread(self, function: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    def _read(self, keys: Sequence[ObjectKey], quality: Quality) -> list[SharedObject]:
        wanted: list[tuple[StoredObject, Described, int]] = []
        room = READ_BYTES_MAX
        for stored in self.tier.describe(keys):
            if stored is None:
                break
            described = described_of(stored)
            length = described.layer_bytes[described.layers_for(quality) - 1]
            room -= length
            if room < 0:
                break
            wanted.append((stored, described, length))
        found: list[SharedObject] = []
        bodies = self.tier.read_many([(stored.key, length) for stored, _, length in wanted]) if wanted else []
        for (stored, described, length), data in zip(wanted, bodies, strict=True):
            if data is None or not self._intact(stored, data):
                break
            self._metrics.count_read("redis", described.quality_of(described.layer_bytes.index(length) + 1), length)
            found.append(SharedObject(described, data, whole=length == described.length))
        return found

    def _intact(self, stored: StoredObject, data: memoryview) -> bool:
        """It may have been replaced since it was described: then it is a miss, or as good."""
        try:
            header = codec.verify(data).header
        except codec.ObjectError as error:
            self._metrics.integrity_failures.labels("redis", error.code.value).inc()
            self._metrics.warn_once("redis damage", "redis: chunk %s: %s", stored.key.chunk_hash.hex(), error)
            with contextlib.suppress(TierFailed):  # counted; whoever reads it next tries again
                self.tier.delete(stored.key)
            return False
        return ObjectKey(header.namespace_id, header.chunk_hash, header.part) == stored.key


def described_of(stored: StoredObject) -> Described:
    return Described(
        stored.parent, stored.first_position, stored.tokens, Quality(stored.quality), Quality(stored.provenance),
        stored.layer_bytes,
    )  # fmt: skip
