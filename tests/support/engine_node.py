"""A node's engine without its network: put and read as the service does, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import kv_objects as kv
from disk_places import Place, place_of, taken_bytes
from fake_clock import FakeClock
from tier_objects import LAYOUT, key_of

import kvstore_codec as codec
from kvstore.config import NodeConfig
from kvstore.engine.model import Offer, Result
from kvstore.engine.node import Node
from kvstore.engine.stage import Stage
from kvstore.tiers.disk_index import SLOT_BYTES

ROOMY = 64 << 20


def config(
    folder: Path | None, *, host: int = ROOMY, disk: int = ROOMY, lease_ms_max: int = 60_000, policy: str = "lru",
    **more: Any,
) -> NodeConfig:  # fmt: skip
    """`folder` None: no disk. `policy`: one whose order a test can foretell."""
    path = None if folder is None else folder / "disk"
    return NodeConfig.model_validate({
        "host_capacity": host, "disk_path": path, "disk_capacity": disk, "lease_ms_max": lease_ms_max,
        "eviction_policy": policy, **more,
    })  # fmt: skip


@asynccontextmanager
async def opened(settings: NodeConfig, clock: FakeClock | None = None) -> AsyncIterator[Node]:
    """A node; at the end, its books are compared with what is there."""
    node = await Node.open(settings, clock=clock or FakeClock())
    try:
        yield node
        await check_books(node, settings)
    finally:
        await node.aclose()


async def check_books(node: Node, settings: NodeConfig) -> None:
    """When nothing is under way: index, tiers, plans, files and reservations all say the same."""
    holdings = node._holdings
    if holdings.queue is not None:
        await holdings.queue.flush()
    for tier in holdings.tiers:
        held = [entry for entry in holdings.index if tier.name in entry.tiers]
        assert tier.objects == len(held)
        lengths = [entry.length_in(tier.name) for entry in held]
        assert tier.used_bytes == sum(map(tier.cost_bytes, lengths)) <= tier.capacity_bytes
    assert all(entry.tiers for entry in holdings.index)
    stat = node.stat()
    assert (stat.staged_objects, stat.staged_bytes) == (0, 0)
    if holdings.queue is not None and holdings.disk is not None and settings.disk_path is not None:
        assert holdings.queue.planned_bytes == holdings.disk.used_bytes
        assert (holdings.queue._pending_bytes, holdings.queue._writes) == (0, {})
        slots = holdings.disk.objects * SLOT_BYTES
        assert taken_bytes(settings.disk_path) + slots == holdings.disk.used_bytes


def offer(node: Node, chunks: Sequence[kv.StoredChunk], layout: codec.KVLayout = LAYOUT) -> Stage:
    offers = [Offer(chunk.hash, chunk.ref.parent, len(chunk.blob), chunk.quality) for chunk in chunks]
    return node.offer(layout.namespace_id, layout.canonical_bytes, 0, offers)


def filled(node: Node, chunks: Sequence[kv.StoredChunk], layout: codec.KVLayout = LAYOUT) -> Stage:
    """A stage with all that the node asked for."""
    stage = offer(node, chunks, layout)
    for index, (verdict, chunk) in enumerate(zip(stage.verdicts, chunks, strict=True)):
        if verdict == "send":
            stage.write(index, 0, chunk.blob)
    return stage


async def put(
    node: Node, chunks: Sequence[kv.StoredChunk], layout: codec.KVLayout = LAYOUT, *, durable: bool = False
) -> list[Result]:
    return await node.commit(filled(node, chunks, layout), durable=durable)


async def read(
    node: Node, chunk: kv.StoredChunk, layout: codec.KVLayout = LAYOUT, quality: codec.Quality = codec.Quality.RAW
) -> bytes | None:
    data = await node.read(key_of(chunk, layout), quality)
    return None if data is None else bytes(data)


def found(node: Node, chunks: Sequence[kv.StoredChunk], *, lease_ms: int = 0) -> list[str]:
    """The tier of each chunk of the stored prefix."""
    hit = node.lookup(LAYOUT.namespace_id, [chunk.hash for chunk in chunks], 0, lease_ms)
    return list(hit.tiers)


def tiers_of(node: Node, chunk: kv.StoredChunk) -> tuple[str, ...]:
    """Where a chunk is held, without using it."""
    entry = node._holdings.index.get(key_of(chunk))
    return () if entry is None else entry.tiers


def place_on_disk(settings: NodeConfig, chunk: kv.StoredChunk) -> Place:
    assert settings.disk_path is not None
    return place_of(settings.disk_path, key_of(chunk))


def outcomes(results: Sequence[Result]) -> list[str]:
    return [result.outcome for result in results]
