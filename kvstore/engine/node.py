"""The node: every operation on stored objects, without the network.

One event loop owns it. What its methods return is what the protocol answers (`service/wire.py`); an object that is
damaged, gone or unreadable is a miss, counted in `metrics.py`.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import AsyncIterator, Callable, Sequence

from prometheus_client import CollectorRegistry

import kvstore_codec as codec
from kvstore import __version__
from kvstore.config import NodeConfig
from kvstore.engine.commit import commit
from kvstore.engine.holdings import Holdings
from kvstore.engine.model import (
    ChunkStatus,
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
from kvstore.engine.stage import Stage
from kvstore.errors import DiskUnusable, InvalidRequest
from kvstore.index.entry import Entry, ObjectKey
from kvstore.metrics import NodeMetrics
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.host import HostTier
from kvstore_codec import KVLayout, Quality

__all__ = [
    "ChunkStatus", "LookupResult", "Node", "NodeStat", "ObjectEntry", "ObjectKey", "Offer", "Outcome", "Result",
    "Stage", "TierStat", "Verdict", "VerifyProgress",
]  # fmt: skip


class Node:
    """Made by `open`, ended by `aclose`."""

    def __init__(
        self, config: NodeConfig, holdings: Holdings, namespaces: Namespaces, metrics: NodeMetrics,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._config, self._holdings, self._namespaces = config, holdings, namespaces
        self._metrics, self._clock = metrics, clock
        self._started_s = clock()
        self._staged_objects = self._staged_bytes = 0

    @classmethod
    async def open(
        cls, config: NodeConfig, *, clock: Callable[[], float] = time.monotonic,
        registry: CollectorRegistry | None = None,
    ) -> Node:  # fmt: skip
        """A node with what its disk holds. Raises DiskUnusable, TierFailed."""
        registry = CollectorRegistry() if registry is None else registry
        metrics = NodeMetrics(registry)
        holdings, namespaces = await asyncio.to_thread(_open_tiers, config, metrics, clock)
        node = cls(config, holdings, namespaces, metrics, clock)
        metrics.watch(registry, holdings.tiers, lambda: node._staged_bytes)
        return node

    def lookup(self, namespace_id: bytes, hashes: Sequence[bytes], part: int, lease_ms: int) -> LookupResult:
        """The longest stored prefix of a chain, used now; leased for at most the configured time."""
        now_s = self._clock()
        found = self._holdings.index.prefix(namespace_id, hashes, part)
        self._holdings.index.touch(found, now_s)
        self._metrics.lookup_chunks.labels("hit").inc(len(found))
        self._metrics.lookup_chunks.labels("miss").inc(len(hashes) - len(found))
        lease_ms = min(lease_ms, self._config.lease_ms_max)
        lease_id = self._holdings.leases.take((entry.key for entry in found), now_s, lease_ms / 1000)
        return LookupResult([_chunk_status(entry) for entry in found], lease_id, lease_ms if lease_id else 0)

    async def read(self, key: ObjectKey, quality: Quality) -> memoryview | None:
        """The object, or its prefix that reads at `quality` where it holds better; None is a miss."""
        entry = self._holdings.index.get(key)
        if entry is None:
            self._metrics.reads.labels("none").inc()
            return None
        entry.reads += 1
        return await self._holdings.read(entry, entry.header.length_for(quality))

    def offer(self, namespace_id: bytes, layout_bytes: bytes, part: int, objects: Sequence[Offer]) -> Stage:
        """Decides what a writer should send and reserves room for it. Raises InvalidRequest."""
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
        stage = Stage(layout, part, objects, verdicts, self._release)
        self._staged_objects += stage.reserved_objects
        self._staged_bytes += stage.reserved_bytes
        return stage

    async def commit(self, stage: Stage, *, durable: bool) -> list[Result]:
        """Checks and stores what arrived, one result an offer, and frees the stage. An object is visible as soon as
        it is stored, also where the commit is cancelled later.

        `durable`: results say so only for objects that are on disk, synced."""
        results = await commit(stage, self._holdings, self._metrics, self._remember, durable=durable)
        chain = [ObjectKey(stage.layout.namespace_id, offer.hash, stage.part) for offer in stage.offers]
        self._holdings.index.touch([entry for entry in map(self._holdings.index.get, chain) if entry], self._clock())
        return results

    def abort(self, stage: Stage) -> None:
        """Frees a stage; nothing for one that is committed or aborted."""
        stage.close()

    async def delete(self, namespace_id: bytes, hashes: Sequence[bytes] | None, part: int) -> tuple[int, int]:
        """(objects, bytes) removed everywhere; the whole namespace, all its parts, without `hashes`."""
        index = self._holdings.index
        if hashes is None:
            doomed = [entry for entry in index if entry.key.namespace_id == namespace_id]
        else:
            keys = [ObjectKey(namespace_id, chunk_hash, part) for chunk_hash in hashes]
            doomed = [entry for entry in map(index.get, keys) if entry is not None]
        for entry in doomed:
            self._holdings.delete(entry)
        if hashes is None:
            self._forget(namespace_id)
        await self._holdings.wait_for_writes()
        return len(doomed), sum(entry.length for entry in doomed)

    def list_objects(
        self, namespace_id: bytes | None, hash_prefix: bytes, limit: int, page_token: str
    ) -> tuple[list[ObjectEntry], str]:
        """A page of objects in the order of their keys, and the token of the next ("": no more).

        Raises InvalidRequest for a token that is none."""
        after = _key_of_token(page_token) if page_token else None
        self._holdings.leases.expire(self._clock())
        chosen = (
            entry
            for entry in self._holdings.index
            if (namespace_id is None or entry.key.namespace_id == namespace_id)
            and entry.key.chunk_hash.startswith(hash_prefix)
            and (after is None or entry.key > after)
        )
        page = heapq.nsmallest(limit + 1, chosen, key=_entry_key)
        token = _token_of_key(page[limit - 1].key) if len(page) > limit else ""
        return [self._object_entry(entry) for entry in page[:limit]], token

    async def verify(self, namespace_id: bytes | None, hashes: Sequence[bytes] | None) -> AsyncIterator[VerifyProgress]:
        """Reads every copy of the chosen objects again; a damaged copy is dropped and reported."""
        chosen = self._chosen(namespace_id, hashes)
        for checked, key in enumerate(chosen, 1):
            entry = self._holdings.index.get(key)
            problem = await self._problem(entry) if entry is not None else None
            yield VerifyProgress(checked, len(chosen), key.chunk_hash if problem else None, problem)

    async def evict(self, tier: str | None, wanted: int, hashes: Sequence[bytes] | None) -> tuple[int, int]:
        """(objects, bytes) evicted: the named chunks, or at least `wanted` bytes (0: all) in the usual order.

        Leased objects stay. `tier` None: from every tier."""
        holdings = self._holdings
        await holdings.wait_for_writes()  # what is on its way to disk is not evicted from memory
        evicted: set[ObjectKey] = set()
        freed = 0
        for held in (each for each in holdings.tiers if tier in (None, each.name)):
            if hashes is not None:
                named = map(holdings.index.get, self._chosen(None, hashes))
                going = iter([entry for entry in named if entry is not None and holdings.may_evict(entry, held.name)])
            else:
                going = iter(lambda: None if 0 < wanted <= freed else holdings.victim(held.name), None)  # noqa: B023
            for entry in going:
                freed += held.cost_bytes(entry.length)
                evicted.add(entry.key)
                holdings.evict(entry, held.name, "admin")
        await holdings.wait_for_writes()
        return len(evicted), freed

    def stat(self) -> NodeStat:
        holdings = self._holdings
        holdings.leases.expire(self._clock())
        return NodeStat(
            version=__version__,
            node_id=self._config.node_name,
            uptime_seconds=self._clock() - self._started_s,
            objects=len(holdings.index),
            namespaces=len(self._namespaces),
            leases=len(holdings.leases),
            staged_objects=self._staged_objects,
            staged_bytes=self._staged_bytes,
            tiers=[TierStat(tier.name, tier.objects, tier.used_bytes, tier.capacity_bytes) for tier in holdings.tiers],
            counters=self._metrics.snapshot(),
        )

    async def aclose(self) -> None:
        """Finishes the writes to disk that are queued and lets the tiers go."""
        await self._holdings.aclose()

    def _object_bytes_max(self, layout: KVLayout, part: int) -> int:
        raw_bytes = layout.chunk_tokens * layout.part_layout(part).bytes_per_token
        capacity = max(tier.capacity_bytes for tier in self._holdings.tiers)
        return min(self._config.object_bytes_max, codec.object_bytes_max(raw_bytes), capacity)

    def _release(self, objects: int, size: int) -> None:
        self._staged_objects -= objects
        self._staged_bytes -= size

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

    def _chosen(self, namespace_id: bytes | None, hashes: Sequence[bytes] | None) -> list[ObjectKey]:
        wanted = None if hashes is None else set(hashes)
        return [
            entry.key
            for entry in self._holdings.index
            if (namespace_id is None or entry.key.namespace_id == namespace_id)
            and (wanted is None or entry.key.chunk_hash in wanted)
        ]

    async def _problem(self, entry: Entry) -> str | None:
        problem = None
        for tier in entry.tiers:
            try:
                await self._holdings.read_checked(entry, tier, entry.length)
            except codec.ObjectError as error:
                problem = f"{tier}: {error}"
        return problem

    def _object_entry(self, entry: Entry) -> ObjectEntry:
        layout = self._namespaces.get(entry.key.namespace_id)
        return ObjectEntry(
            key=entry.key,
            parent=entry.parent,
            tokens=entry.header.tokens,
            first_position=entry.header.first_position,
            quality=entry.quality,
            provenance=entry.header.provenance,
            length=entry.length,
            tiers=entry.tiers,
            idle_seconds=max(0.0, self._clock() - entry.last_use_s),
            reads=entry.reads,
            leased=self._holdings.leases.holds(entry.key),
            model=layout.model if layout is not None else "",
            revision=layout.revision if layout is not None else "",
        )


def _open_tiers(
    config: NodeConfig, metrics: NodeMetrics, clock: Callable[[], float]
) -> tuple[Holdings, Namespaces]:  # fmt: skip
    host = HostTier(config.host_capacity)
    if config.disk_path is None:
        return Holdings(host, None, metrics, clock), Namespaces(None)
    disk = DiskTier(config.disk_path, config.disk_capacity)
    try:
        return Holdings(host, disk, metrics, clock), Namespaces(config.disk_path / "namespaces")
    except OSError as error:
        disk.close()
        raise DiskUnusable(f"disk_path {config.disk_path} cannot be used: {error.strerror}") from error
    except BaseException:
        disk.close()
        raise


def _chunk_status(entry: Entry) -> ChunkStatus:
    return ChunkStatus(
        entry.key, entry.header.tokens, entry.quality, entry.header.provenance, entry.length, entry.tiers[0]
    )


def _entry_key(entry: Entry) -> ObjectKey:
    return entry.key


def _token_of_key(key: ObjectKey) -> str:
    return f"{key.namespace_id.hex()}{key.chunk_hash.hex()}{key.part:04x}"


def _key_of_token(token: str) -> ObjectKey:
    try:
        raw = bytes.fromhex(token)
    except ValueError:
        raw = b""
    if len(raw) != 66:
        raise InvalidRequest("page_token is not one that this node gave")
    return ObjectKey(raw[:32], raw[32:64], int.from_bytes(raw[64:], "big"))
