"""The node: every operation on stored objects, without the network.

One event loop owns it. What its methods return is what the protocol answers (`service/wire.py`); an object that is
damaged, gone or unreadable is a miss, counted in `metrics.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager

import numpy as np
from prometheus_client import CollectorRegistry

import kvstore_codec as codec
from kvstore import __version__
from kvstore.config import NodeConfig
from kvstore.engine.commit import Commit
from kvstore.engine.holdings import Holdings
from kvstore.engine.live import LiveWrites
from kvstore.engine.model import (
    LookupResult,
    NodeStat,
    ObjectEntry,
    Offer,
    Outcome,
    Result,
    TierStat,
    Verdict,
    VerifyProgress,
)  # fmt: skip
from kvstore.engine.namespaces import Namespaces
from kvstore.engine.opening import open_tiers
from kvstore.engine.operations import Operations
from kvstore.engine.outside import UNKNOWN, Chain, FoundObject, Outside, Place
from kvstore.engine.pin_file import PinFile
from kvstore.engine.prefetch import Prefetches
from kvstore.engine.shared import open_shared
from kvstore.engine.stage import Stage, Staged
from kvstore.engine.upstream_open import open_upstream
from kvstore.errors import InvalidRequest
from kvstore.index.entry import ObjectKey, Retention
from kvstore.metrics import NodeMetrics
from kvstore.tiers.host import Reserved
from kvstore_codec import KVLayout, Quality

__all__ = [
    "LookupResult", "Node", "NodeStat", "ObjectEntry", "ObjectKey", "Offer", "Outcome", "Result",
    "Stage", "TierStat", "Verdict", "VerifyProgress",
]  # fmt: skip

RESULT_OF_TIER = {"redis": "shared", "upstream": "upstream"}  # of lookups, as metrics name it
READ_OUTSIDE_MAX = 64  # objects asked for at a time


class Node:
    """Made by `open`, ended by `aclose`."""

    def __init__(
        self, config: NodeConfig, holdings: Holdings, namespaces: Namespaces, pin_file: PinFile | None,
        metrics: NodeMetrics, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._config, self._holdings, self._namespaces = config, holdings, namespaces
        self._upstream = open_upstream(config, metrics, holdings, namespaces, self._on_disk)
        self._shared = open_shared(config, metrics)
        places: list[Place | None] = [self._upstream, self._shared]
        self._outside = Outside([place for place in places if place is not None])
        self._prefetches = Prefetches(self._read_raw, metrics)
        self._metrics, self._clock = metrics, clock
        self.operations = Operations(holdings, namespaces, pin_file, self._on_disk, metrics, clock)
        self._started_s = clock()
        self._staged_objects = self._staged_bytes = self._deletes = 0
        self.live = LiveWrites(self._reserve_live, self._release_live, self._is_stored, metrics)

    @classmethod
    async def open(
        cls, config: NodeConfig, *, clock: Callable[[], float] = time.monotonic,
        registry: CollectorRegistry | None = None,
    ) -> Node:  # fmt: skip
        """A node with what its disk holds. Raises DiskUnusable, TierFailed."""
        registry = CollectorRegistry() if registry is None else registry
        metrics = NodeMetrics(registry)
        opened = await asyncio.to_thread(open_tiers, config, metrics, clock)
        node, holdings = cls(config, *opened, metrics, clock), opened[0]
        tiers = holdings.tiers
        node._outside.start()
        if node._shared is not None:
            tiers.append(node._shared.tier)
        metrics.watch(registry, tiers, node._gauges())
        return node

    def lookup(self, namespace_id: bytes, hashes: Sequence[bytes], part: int, lease_ms: int) -> LookupResult:
        """The longest stored prefix of a chain, used now; leased for at most the configured time."""
        began_s = time.perf_counter()
        now_s, index = self._clock(), self._holdings.index
        found = index.prefix(namespace_id, hashes, part)
        self._metrics.lookup_chunks.labels("hit").inc(len(found))
        self._metrics.lookup_chunks.labels("miss").inc(len(hashes) - len(found))
        if not len(found):
            return LookupResult()
        self._metrics.reuse.observe(now_s - index.columns["last_use_s"][found])
        index.touch(found, now_s)
        lease_ms = min(lease_ms, self._config.lease_ms_max)
        lease_id = self._holdings.leases.take(found, now_s, lease_ms / 1000)
        if lease_id:
            self._metrics.leases.labels("taken").inc()
        result = LookupResult(*index.state(found), lease_id, lease_ms if lease_id else 0)
        self._metrics.seconds.labels("lookup").observe(time.perf_counter() - began_s)
        return result

    async def find(
        self, namespace_id: bytes, hashes: Sequence[bytes], part: int, lease_ms: int, first_chunk: bytes = b""
    ) -> LookupResult:  # fmt: skip
        """`lookup`, and where what is held here ends, what is elsewhere of the rest.

        `first_chunk`: hash of the prompt's first chunk; empty: it is the first of `hashes`."""
        found = self.lookup(namespace_id, hashes, part, lease_ms)
        if len(found) == len(hashes):
            return found
        chain = Chain.of(namespace_id, hashes, part, first_chunk).after(len(found))
        more = await self._outside.find(chain, min(lease_ms, self._config.lease_ms_max))
        for each in more:
            self._metrics.lookup_chunks.labels(RESULT_OF_TIER[each.tier]).inc()
        return LookupResult(
            [*found.tokens, *(each.tokens for each in more)], [*found.qualities, *(each.quality for each in more)],
            [*found.provenances, *(each.provenance for each in more)],
            [*found.stored_bytes, *(each.stored_bytes for each in more)],
            [*found.tiers, *(each.tier for each in more)], found.lease_id, found.lease_ms,
        )  # fmt: skip

    def renew(self, lease_id: bytes, lease_ms: int) -> int:
        """Milliseconds from now for which the lease holds on; 0: it is no more, as after `lease_ms` 0."""
        leases, lease_ms = self._holdings.leases, min(lease_ms, self._config.lease_ms_max)
        if lease_ms:
            renewed = leases.renew(lease_id, self._clock(), lease_ms / 1000)
            self._metrics.leases.labels("renewed" if renewed else "late").inc()
            return lease_ms if renewed else 0
        if leases.release(lease_id):
            self._metrics.leases.labels("released").inc()
        return 0

    async def read(self, key: ObjectKey, quality: Quality) -> memoryview | None:
        """The object, or its prefix that reads at `quality` where it holds better; None is a miss."""
        entry = self._holdings.index.get(key)
        if entry is None:
            self._metrics.reads.labels("none").inc()
            return None
        entry.count_read()
        with self._metrics.seconds.labels("read").time():
            data = await self._holdings.read(entry, quality)
        if data is None:
            self._metrics.reads.labels("none").inc()
        return data

    def read_at_once(self, keys: Sequence[ObjectKey], quality: Quality, bytes_max: float) -> list[memoryview]:
        """`read` of the first keys, of one namespace and part, up to what memory does not hold, and to about
        `bytes_max`."""
        with self._metrics.seconds.labels("read").time():
            return self._holdings.read_at_once(keys, quality, bytes_max)

    async def read_chain(
        self, keys: Sequence[ObjectKey], quality: Quality, first_chunk: bytes = b"", start: int = 0
    ) -> AsyncGenerator[memoryview, None]:  # fmt: skip
        """`read` of each from key `start` on, in order, up to the first miss; what is not held here comes from
        elsewhere. `first_chunk`: as of `find`."""
        at = start
        while at < len(keys):
            data = await self.read(keys[at], quality)
            if data is not None:
                at += 1
                yield data
                continue
            missed_at = at
            async with aclosing(self._read_outside(keys, at, quality, first_chunk)) as objects:
                async for found in objects:
                    at += 1
                    yield found.data
            if at == missed_at:
                return

    def _read_outside(
        self, keys: Sequence[ObjectKey], at: int, quality: Quality, first_chunk: bytes
    ) -> AsyncGenerator[FoundObject, None]:
        """Of the keys from `at` on, up to the first that is held here: that of `at` was, and is not any more."""
        index, deletes = self._holdings.index, self._deletes

        def keep(key: ObjectKey, found: FoundObject) -> None:
            if deletes == self._deletes:  # else it may be what was deleted meanwhile
                self._holdings.take_in(key, found)

        absent = itertools.takewhile(lambda key: index.row_of(key) is None, keys[at + 1 : at + READ_OUTSIDE_MAX])
        hashes = (keys[at].chunk_hash, *(key.chunk_hash for key in absent))
        before = keys[at - 1].chunk_hash if at else UNKNOWN
        first_chunk = first_chunk or keys[0].chunk_hash
        chain = Chain(keys[at].namespace_id, hashes, keys[at].part, first_chunk, before)
        return self._outside.read(chain, quality, keep)

    def _read_raw(
        self, keys: Sequence[ObjectKey], first_chunk: bytes, start: int
    ) -> AsyncGenerator[memoryview, None]:  # fmt: skip
        return self.read_chain(keys, Quality.RAW, first_chunk, start)

    def prefetch(
        self, namespace_id: bytes, hashes: Sequence[bytes], part: int, quality: Quality, first_chunk: bytes = b""
    ) -> tuple[int, int]:
        """(chunks that memory holds at `quality`, or as well as they are held at all; chunks that are looked for now).

        What memory lacks is brought there whole, from disk or elsewhere, in the background, where that costs nothing
        that was used since."""
        keys = [ObjectKey(namespace_id, chunk_hash, part) for chunk_hash in hashes]
        in_memory = [self._holdings.is_in_memory(key, quality) for key in keys]
        held = sum(in_memory)
        if held == len(keys) or not self._prefetches.start(keys, in_memory.index(False), first_chunk):
            return held, 0
        return held, len(keys) - held

    @contextmanager
    def shared_memory(self) -> Iterator[tuple[int, int]]:
        """(descriptor, bytes) of the memory that holds objects, to be mapped by another process, which cannot write."""
        host = self._holdings.host
        descriptor = os.open(f"/proc/self/fd/{host.fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor, host.space_bytes
        finally:
            os.close(descriptor)

    def place_of(self, data: memoryview) -> int | None:
        """Where in that memory something is that `read` gave, for as long as somebody holds it; None: elsewhere."""
        return self._holdings.host.place_of(data)

    def offer(
        self, namespace_id: bytes, layout_bytes: bytes, part: int, objects: Sequence[Offer], first_chunk: bytes = b""
    ) -> Stage:
        """Decides what a writer should send and reserves room for it. `first_chunk`: as of `find`.

        Raises InvalidRequest."""
        layout = self._namespaces.check(namespace_id, layout_bytes)
        if part >= layout.partition.parts:
            raise InvalidRequest("the layout has no such part", part=part, parts=layout.partition.parts)
        bytes_max = self._object_bytes_max(layout, part)
        verdicts: list[Verdict] = []
        staged = self._staged_bytes
        for offered in objects:
            held = self._holdings.index.get(ObjectKey(namespace_id, offered.hash, part))
            if held is not None and held.at_least(offered.quality):
                verdicts.append("have")
            elif offered.object_bytes > bytes_max or staged + offered.object_bytes > self._config.staged_bytes_max:
                verdicts.append("refused")
            else:
                verdicts.append("send")
                staged += offered.object_bytes
        stage = Stage(layout, part, objects, verdicts, self._allocate, self._release, first_chunk)
        self._staged_objects += stage.reserved_objects
        self._staged_bytes += stage.reserved_bytes
        return stage

    async def commit(
        self, stage: Stage, *, durable: bool, retain: tuple[int, float] | None = None
    ) -> list[Result]:  # fmt: skip
        """Checks and stores what arrived, one result an offer, and frees the stage. An object is visible as soon as
        it is stored, also where the commit is cancelled later.

        `durable`: results say so only for objects that are on disk, synced. `retain`: (priority, seconds), a hint."""
        retention = Retention(retain[0], self._clock() + retain[1]) if retain is not None else None
        durable = durable or self._config.disk_write == "through"
        with self._metrics.seconds.labels("commit").time():
            results = await Commit(
                stage, self._holdings, self._outside, self._metrics, self._remember, durable=durable,
                retention=retention,
            ).run()  # fmt: skip
        index = self._holdings.index
        rows = [row for row in map(index.row_of, stage.keys) if row is not None]
        index.touch(np.array(rows, np.int64), self._clock())
        self.live.wake()
        return results

    def abort(self, stage: Stage) -> None:
        """Frees a stage; nothing for one that is committed or aborted."""
        stage.close()

    async def delete(self, namespace_id: bytes, hashes: Sequence[bytes] | None, part: int) -> tuple[int, int]:
        """(objects, bytes) removed everywhere; the whole namespace, all its parts, without `hashes`. Raises
        UpstreamAway where they may come back from there."""
        keys = None if hashes is None else [ObjectKey(namespace_id, chunk_hash, part) for chunk_hash in hashes]
        removed = self._delete_here(namespace_id, keys)
        if keys is None:
            self._forget(namespace_id)
        await (self._outside.purge(namespace_id) if keys is None else self._outside.delete(keys))
        self._delete_here(namespace_id, keys)  # again: what was read from there until it was deleted there
        await self._holdings.wait_for_writes()
        return removed

    def _delete_here(self, namespace_id: bytes, keys: Sequence[ObjectKey] | None) -> tuple[int, int]:
        self._deletes += 1
        index = self._holdings.index
        doomed = [entry for entry in map(index.get, index.keys(namespace_id) if keys is None else keys) if entry]
        freed = sum(entry.length for entry in doomed)
        for entry in doomed:
            self._holdings.delete(entry)
        return len(doomed), freed

    def stat(self) -> NodeStat:
        holdings = self._holdings
        holdings.leases.expire(self._clock())
        tiers = [*holdings.tiers, *([self._shared.tier] if self._shared is not None else [])]
        return NodeStat(
            version=__version__,
            node_id=self._config.node_name,
            uptime_seconds=self._clock() - self._started_s,
            objects=len(holdings.index),
            namespaces=len(self._namespaces),
            leases=len(holdings.leases),
            staged_objects=self._staged_objects,
            staged_bytes=self._staged_bytes,
            pinned_bytes=holdings.pins.soft_bytes + holdings.pins.hard_bytes,
            tiers=[TierStat(tier.name, tier.objects, tier.used_bytes, tier.capacity_bytes) for tier in tiers],
            counters=self._metrics.snapshot(),
            upstreams=self._upstream.states() if self._upstream is not None else [],
            unix_seconds=time.time(),
        )

    async def aclose(self) -> None:
        """Finishes the writes that are queued and lets the tiers go."""
        await self._prefetches.aclose()
        await self._outside.aclose()
        await self._holdings.aclose()

    def _gauges(self) -> dict[str, tuple[str, Callable[[], float]]]:
        holdings = self._holdings
        return {
            "staged_bytes": ("Bytes reserved by puts and live writes in flight.", lambda: self._staged_bytes),
            "live_writers": ("Live writes that are open.", lambda: len(self.live)),
            "live_held_bytes": ("Of the staged bytes, those of live writes.", lambda: self.live.held_bytes),
            "disk_queue_bytes": (
                "Bytes on their way to disk.", lambda: holdings.queue.pending_bytes if holdings.queue else 0
            ),
            "redis_queue_bytes": (
                "Bytes on their way to Redis.", lambda: self._shared.pending_bytes if self._shared else 0
            ),
            "upstream_queue_bytes": (
                "Bytes on their way upstream.", lambda: self._upstream.pending_bytes if self._upstream else 0
            ),
            "upstream_owed_objects": (
                "Objects to go upstream when it is back.", lambda: self._upstream.owed_objects if self._upstream else 0
            ),
            "upstream_owed_deletes": (
                "Deletes to be told upstream.", lambda: self._upstream.owed_deletes if self._upstream else 0
            ),
            "prefetches": ("Hints that are being followed.", lambda: len(self._prefetches)),
            "leases": ("Leases held.", lambda: len(holdings.leases)),
            "soft_pinned_bytes": ("Bytes of objects pinned for a while.", lambda: holdings.pins.soft_bytes),
            "hard_pinned_bytes": ("Bytes of objects pinned for good.", lambda: holdings.pins.hard_bytes),
            "index_bytes": ("Bytes of the index's columns.", lambda: holdings.index.columns.nbytes),
        }  # fmt: skip

    def _object_bytes_max(self, layout: KVLayout, part: int) -> int:
        raw_bytes = layout.chunk_tokens * layout.part_layout(part).bytes_per_token
        capacity = max(tier.capacity_bytes for tier in self._holdings.tiers)
        return min(self._config.object_bytes_max, codec.object_bytes_max(raw_bytes), capacity)

    def _allocate(self, stage: Stage, index: int) -> Staged:
        return self._holdings.allocate(stage.keys[index], stage.offers[index].object_bytes, stage.may_go)

    def _release(self, stage: Stage, unused: Sequence[Staged]) -> None:
        self._staged_objects -= stage.reserved_objects
        self._staged_bytes -= stage.reserved_bytes
        for staged in unused:
            if isinstance(staged, Reserved):
                self._holdings.host.release(staged)

    def _reserve_live(self, size: int) -> bool:
        """Whether there is room in flight for so many bytes more of live writes, which are then taken: half of it stays
        for puts, those at the end of the same writes among them."""
        room = self._config.staged_bytes_max
        if self.live.held_bytes + size > room // 2 or self._staged_bytes + size > room:
            return False
        self._staged_bytes += size
        return True

    def _release_live(self, size: int) -> None:
        self._staged_bytes -= size

    def _is_stored(self, key: ObjectKey, floor: Quality) -> bool:
        entry = self._holdings.index.get(key)
        return entry is not None and entry.at_least(floor) and entry.described.provenance <= floor

    def _remember(self, layout: KVLayout) -> None:
        """Keeps a layout; on disk in order before the objects that follow."""
        if self._namespaces.remember(layout):
            self._on_disk(
                lambda: self._namespaces.save(layout), "a layout cannot be saved: %s; lists show no model for it"
            )

    def _forget(self, namespace_id: bytes) -> None:
        if self._namespaces.forget(namespace_id):
            self._on_disk(
                lambda: self._namespaces.erase(namespace_id), "a layout cannot be removed: %s; it stays known"
            )

    def _on_disk(self, change: Callable[[], None], problem: str) -> None:
        """Queues a change of the layouts kept there; `problem` is logged where the disk refuses it."""

        def counted() -> None:
            try:
                change()
            except OSError as error:
                self._metrics.tier_failures.labels("disk", "namespace").inc()
                self._metrics.warn_once(problem, problem, error)

        if self._holdings.queue is not None:
            self._holdings.queue.start(counted)
