"""The tier that several nodes share (Redis), asked from threads so that the event loop never waits for it.

What is there no index knows, so it is asked, and its answers are misses where it does not answer in time: what this
node holds itself is not to wait for it. Whole objects are checked before anybody gets them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import kvstore_codec as codec
from kvstore.config import NodeConfig
from kvstore.engine.outside import Chain, FoundChunk, FoundObject, Keep, PutObject
from kvstore.errors import TierFailed, TierFull
from kvstore.index.entry import Described, ObjectKey
from kvstore.metrics import NodeMetrics
from kvstore.tiers.base import Bytes, StoredObject
from kvstore.tiers.redis import OBJECT_BYTES_MAX, READ_BYTES_MAX, RedisTier
from kvstore.tiers.redis_open import open_redis
from kvstore.tiers.redis_server import FailureKind
from kvstore_client.circuit import State
from kvstore_codec import Quality

READ_THREADS = WRITE_THREADS = 4  # apart, so that questions do not wait behind what is being written
BATCH_OBJECTS = 16  # described and read together
PENDING_BYTES_MAX = 128 << 20  # on their way; beyond it a write is dropped: the next put of the object writes it
PROBE_S = 5.0
PATIENCE = 2  # timeouts: a lookup and a fetch of one get wait for Redis, and their caller's deadline is near
R = TypeVar("R")


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
    """A Place. `writes`: whether what is put here goes there too; `waits`: and is waited for. `patience_s`: longest
    wait for an answer."""

    def __init__(
        self, tier: RedisTier, metrics: NodeMetrics, *, writes: bool, waits: bool, patience_s: float
    ) -> None:  # fmt: skip
        self.tier, self.waits = tier, waits
        self._metrics, self._writes, self._patience_s = metrics, writes, patience_s
        self._readers = ThreadPoolExecutor(READ_THREADS, "kvstore-redis-read")
        self._writers = ThreadPoolExecutor(WRITE_THREADS, "kvstore-redis-write")
        self._pending_bytes = 0
        self._under_way: dict[asyncio.Future[bool], ObjectKey] = {}
        self._watch: asyncio.Task[None] | None = None

    @property
    def pending_bytes(self) -> int:
        """Of objects on their way."""
        return self._pending_bytes

    def start(self) -> None:
        self._watch = asyncio.get_running_loop().create_task(self._probe())

    async def find(self, chain: Chain, lease_ms: int) -> list[FoundChunk]:
        nothing: list[StoredObject] = []
        stored = await self._in_time(lambda: self.tier.find(chain.namespace_id, chain.hashes, chain.part), nothing)
        return [
            FoundChunk(each.tokens, each.quality, each.provenance, each.length, self.tier.name) for each in stored
        ]  # fmt: skip

    async def read(self, chain: Chain, quality: Quality, keep: Keep) -> AsyncGenerator[FoundObject, None]:
        """As many as fit in one answer."""
        keys = [chain.key(at) for at in range(min(len(chain), BATCH_OBJECTS))]
        nothing: list[FoundObject] = []
        for key, found in zip(keys, await self._in_time(lambda: self._read(keys, quality), nothing), strict=False):
            keep(key, found)
            yield found

    def write(self, put: PutObject) -> asyncio.Future[bool] | None:
        """None also where it is too large for there, or too much is on its way."""
        key, data = put.key, put.data
        if not self._writes:
            return None
        if len(data) > OBJECT_BYTES_MAX:
            self._metrics.shared_failures.labels("large").inc()
            self._metrics.warn_once("redis large", "redis takes no object of %d bytes: it stays here", len(data))
            return None
        if self._pending_bytes + len(data) > PENDING_BYTES_MAX:
            self._metrics.tier_failures.labels("redis", "queue").inc()
            self._metrics.warn_once("redis queue", "redis is slower than puts are: some objects do not go there")
            return None
        self._pending_bytes += len(data)
        task = asyncio.ensure_future(self._put(key, put.parent, put.quality, data))
        self._under_way[task] = key
        task.add_done_callback(lambda task: self._under_way.pop(task))
        return task

    async def delete(self, keys: Sequence[ObjectKey]) -> None:
        doomed = frozenset(keys)
        await self._arrived(lambda key: key in doomed)
        await self._quietly(lambda: self.tier.delete_many(keys))

    async def purge(self, namespace_id: bytes) -> None:
        await self._arrived(lambda key: key.namespace_id == namespace_id)
        await self._quietly(lambda: self.tier.purge(namespace_id))

    async def aclose(self) -> None:
        """Waits for what is on its way, which takes a bounded time."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        await self._arrived(lambda _: True)
        for threads in (self._readers, self._writers):
            await asyncio.to_thread(threads.shutdown)
        self.tier.close()

    async def _arrived(self, concerns: Callable[[ObjectKey], bool]) -> None:
        """Until the writes that are on their way now have ended: what is deleted after them stays away."""
        writes = [task for task, key in self._under_way.items() if concerns(key)]
        if writes:
            await asyncio.wait(writes)

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
            await asyncio.get_running_loop().run_in_executor(self._writers, change)
            return True
        return False

    async def _probe(self) -> None:
        while True:
            await asyncio.get_running_loop().run_in_executor(self._readers, self.tier.probe)
            await asyncio.sleep(PROBE_S)

    async def _in_time(self, question: Callable[[], R], otherwise: R) -> R:
        """The answer, or `otherwise` where it takes too long."""
        asked = asyncio.get_running_loop().run_in_executor(self._readers, question)
        try:
            if (await asyncio.wait([asked], timeout=self._patience_s))[0]:
                return asked.result()
        finally:
            asked.cancel()  # what nobody waits for is not begun
        self._metrics.shared_failures.labels("late").inc()
        self._metrics.warn_once("redis late", "redis answers too slowly: a miss")
        return otherwise

    def _read(self, keys: Sequence[ObjectKey], quality: Quality) -> list[FoundObject]:
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
        found: list[FoundObject] = []
        bodies = self.tier.read_many([(stored.key, length) for stored, _, length in wanted]) if wanted else []
        for (stored, described, length), data in zip(wanted, bodies, strict=True):
            if data is None or not self._intact(stored, data):
                break
            self._metrics.count_read("redis", described.quality_of(described.layer_bytes.index(length) + 1), length)
            found.append(FoundObject(described, data, whole=length == described.length))
        return found

    def _intact(self, stored: StoredObject, data: memoryview) -> bool:
        """It may have been replaced since it was described: then it is a miss, and no damage."""
        try:
            header = codec.verify(data).header
        except codec.ObjectError as error:
            if self.tier.describe([stored.key]) != [stored]:
                return False
            self._metrics.integrity_failures.labels("redis", error.code.value).inc()
            self._metrics.warn_once("redis damage", "redis: chunk %s: %s", stored.key.chunk_hash.hex(), error)
            with contextlib.suppress(TierFailed):  # counted; whoever reads it next tries again
                self.tier.delete(stored.key)
            return False
        return ObjectKey.of(header) == stored.key


def open_shared(config: NodeConfig, metrics: NodeMetrics) -> Shared | None:
    """None where no Redis is configured. Raises ConfigError."""
    redis = open_redis(config, SharedEvents(metrics))
    if redis is None:
        return None
    return Shared(
        redis, metrics, writes=config.redis_write != "off", waits=config.redis_write == "through",
        patience_s=PATIENCE * config.redis_timeout_ms / 1000,
    )  # fmt: skip


def described_of(stored: StoredObject) -> Described:
    return Described(
        stored.parent, stored.first_position, stored.tokens, Quality(stored.quality), Quality(stored.provenance),
        stored.layer_bytes,
    )  # fmt: skip
