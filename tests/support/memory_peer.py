"""Nodes upstream that are dicts, and what they hold."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import kv_objects as kv
from tier_objects import LAYOUT, key_of

import kvstore_codec as codec
from kvstore.engine.outside import Chain, FoundChunk, FoundObject, PutObject, Sent
from kvstore.engine.upstream import Upstream
from kvstore.index.entry import ObjectKey
from kvstore.metrics import NodeMetrics
from kvstore_client.circuit import State
from kvstore_client.errors import KvClientError
from kvstore_codec import Quality

HIGH = kv.chunks(LAYOUT, 20, seed=1, quality="high")
CHAIN = Chain.of(LAYOUT.namespace_id, [chunk.hash for chunk in HIGH], 0, b"")


@dataclass
class MemoryPeer:
    """A node upstream that is a dict. Its calls wait for `open` and raise `error`."""

    address: str
    blobs: dict[bytes, bytes] = field(default_factory=dict)
    state: State = "closed"
    error: KvClientError | None = None
    calls: list[tuple[str, int]] = field(default_factory=list)
    held_up: asyncio.Event | None = None

    def start(self) -> None:
        self.calls.append(("start", 0))

    async def lookup(self, chain: Chain, lease_ms: int, timeout_s: float) -> list[FoundChunk]:
        await self._called("lookup", len(chain))
        known = [chunk_hash in self.blobs for chunk_hash in chain.hashes]
        count = known.index(False) if False in known else len(known)
        return [FoundChunk(16, 0, 0, 1, "upstream")] * count

    async def fetch(self, chain: Chain, quality: Quality) -> AsyncGenerator[memoryview, None]:
        await self._called("fetch", len(chain))
        for chunk_hash in chain.hashes:
            if chunk_hash not in self.blobs:
                return
            yield codec.truncate(self.blobs[chunk_hash], quality)

    async def put(self, objects: Sequence[PutObject]) -> list[Sent]:
        await self._called("put", len(objects))
        outcomes: list[Sent] = ["have" if put.key.chunk_hash in self.blobs else "stored" for put in objects]
        self.blobs.update({put.key.chunk_hash: bytes(put.data) for put in objects})
        return outcomes

    async def delete(self, namespace_id: bytes, hashes: Sequence[bytes], part: int) -> None:
        await self._called("delete", len(hashes))
        self.blobs = {key: blob for key, blob in self.blobs.items() if hashes and key not in hashes}

    async def aclose(self) -> None:
        self.calls.append(("aclose", 0))

    async def _called(self, call: str, count: int) -> None:
        self.calls.append((call, count))
        if self.held_up is not None:
            await self.held_up.wait()
        if self.error is not None:
            raise self.error


class Kept(dict[ObjectKey, FoundObject]):
    def keep(self, key: ObjectKey, found: FoundObject) -> None:
        self[key] = found


def holding(address: str = "a:1", count: int = 20) -> MemoryPeer:
    return MemoryPeer(address, {chunk.hash: chunk.blob for chunk in HIGH[:count]})


def put_object(at: int, chunks: Sequence[kv.StoredChunk] = HIGH) -> PutObject:
    chunk = chunks[at]
    return PutObject(LAYOUT, key_of(chunk), chunk.ref.parent, chunks[0].hash, chunk.quality, chunk.blob)


async def read(place: Upstream, chain: Chain = CHAIN, quality: Quality = Quality.RAW, kept: Kept | None = None) -> int:
    """How many objects came; each is right."""
    count = 0
    async for found in place.read(chain, quality, (Kept() if kept is None else kept).keep):
        assert bytes(found.data) == bytes(codec.truncate(HIGH[count].blob, quality))
        count += 1
    return count


def calls(peer: MemoryPeer) -> Counter[str]:
    return Counter(call for call, _ in peer.calls)


async def settle() -> None:
    """Lets everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


def told(metrics: NodeMetrics) -> Counter[str]:
    return Counter(metrics.snapshot())
