"""The node against a plain dict: any mix of operations at once, in any small capacity, across restarts.

A read returns exactly what was last stored, or a prefix of it that is down to the floor at most, or nothing; both
capacities hold; the books balance whenever it is idle.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import kv_objects as kv
import pytest
from engine_node import (
    check_books,
    config,
    filled,
    offer,
    opened,
    put,
    read,
)
from fake_clock import FakeClock
from hypothesis import given, settings
from tier_objects import LAYOUT, key_of

import kvstore_codec as codec
from kvstore.config import NodeConfig
from kvstore.engine.node import Node

FAST_DISK = "/dev/shm" if Path("/dev/shm").is_dir() else None  # thousands of syncs, and nothing here loses power
PROMPTS, CHUNKS = 4, 5
QUALITIES = ("low", "high", "raw")
STORED = {
    (quality, prompt): kv.chunks(LAYOUT, CHUNKS, seed=100 + prompt, quality=quality)
    for quality in QUALITIES
    for prompt in range(PROMPTS)
}
EVERYTHING = [chunk for prompt in range(PROMPTS) for chunk in STORED["raw", prompt]]
SIZE = len(EVERYTHING[0].blob)
BLOCK = 4096
FLOOR = codec.Quality.MEDIUM

prompts = st.integers(0, PROMPTS - 1)
counts = st.integers(1, CHUNKS)
operations = st.one_of(
    st.tuples(st.just("put"), prompts, counts, st.sampled_from(QUALITIES), st.booleans()),
    st.tuples(st.just("put"), prompts, counts, st.sampled_from(QUALITIES), st.booleans()),
    st.tuples(st.just("hint"), prompts, counts, st.sampled_from(QUALITIES), st.sampled_from([(0, 1.0), (9, 3.0)])),
    st.tuples(st.just("cancel"), prompts, counts, st.sampled_from(QUALITIES), st.integers(0, 8)),
    st.tuples(st.just("abort"), prompts, counts, st.sampled_from(QUALITIES)),
    st.tuples(st.just("read"), prompts, counts),
    st.tuples(st.just("lookup"), prompts, st.sampled_from([0, 1000])),
    st.tuples(st.just("delete"), prompts, counts),
    st.tuples(st.just("evict"), st.sampled_from(["host", "disk", None]), st.integers(0, 4 * SIZE)),
    st.tuples(st.just("purge")),
    st.tuples(st.just("pin"), prompts, counts, st.sampled_from([0, 1, 3])),
    st.tuples(st.just("unpin")),
    st.tuples(st.just("renew"), st.sampled_from([0, 500])),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 2.0])),
)
batches = st.lists(st.one_of(st.just("reopen"), st.lists(operations, min_size=1, max_size=6)), max_size=14)


@dataclass
class Model:
    """What each chunk may read as: `at_rest` now, or also what the batch under way puts there."""

    at_rest: dict[bytes, bytes] = field(default_factory=dict)
    under_way: dict[bytes, set[bytes]] = field(default_factory=dict)

    def allows(self, chunk: kv.StoredChunk, data: bytes | None) -> bool:
        legal = {self.at_rest.get(chunk.hash), *self.under_way.get(chunk.hash, ())}
        return data is None or any(whole is not None and is_cut_of(data, whole) for whole in legal)


def is_cut_of(data: bytes, whole: bytes) -> bool:
    """`data` is `whole`, or what is left of it when it lost quality layers, not below the floor."""
    if data == whole:
        return True
    header = codec.parse_header(whole)
    ends = [end for end in header.layer_bytes if header.quality_at(end) <= FLOOR]
    return len(data) in ends and whole.startswith(data)


async def act(node: Node, clock: FakeClock, model: Model, operation: Any) -> None:
    what, *rest = operation
    if what in ("put", "hint", "cancel", "abort"):
        prompt, count, quality, detail = (*rest, None)[:4]
        chunks = STORED[quality, prompt][:count]
        if what == "put":
            results = await put(node, chunks, durable=detail)
            assert all(result.reason for result in results if result.outcome == "rejected")
        elif what == "hint":
            await node.commit(filled(node, chunks), durable=False, retain=detail)
        elif what == "abort":
            node.abort(offer(node, chunks))
        else:
            await cancelled(node, chunks, turns=detail)
    elif what == "read":
        for chunk in STORED["raw", rest[0]][: rest[1]]:
            assert model.allows(chunk, await read(node, chunk))
    elif what == "lookup":
        hashes = [chunk.hash for chunk in STORED["raw", rest[0]]]
        assert {"host", "disk"}.issuperset(node.lookup(LAYOUT.namespace_id, hashes, 0, rest[1]).tiers)
    elif what == "delete":
        await node.delete(LAYOUT.namespace_id, [chunk.hash for chunk in STORED["raw", rest[0]][rest[1] - 1 :]], 0)
    elif what == "evict":
        await node.operations.evict(rest[0], rest[1], None)
    elif what == "pin":
        node.operations.pin([chunk.hash for chunk in STORED["raw", rest[0]][: rest[1]]], rest[2])
    elif what == "unpin":
        node.operations.unpin(None)
    elif what == "renew":
        for lease_id in list(node._holdings.leases._leases):
            node.renew(lease_id, rest[0])
    elif what == "purge":
        await node.delete(LAYOUT.namespace_id, None, 0)
    else:
        clock.now_s += rest[0]


async def cancelled(node: Node, chunks: list[kv.StoredChunk], *, turns: int) -> None:
    stage = filled(node, chunks)
    task = asyncio.ensure_future(node.commit(stage, durable=True))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    node.abort(stage)  # as the service does: the commit may not even have begun


async def run(layout: NodeConfig, todo: list[Any]) -> None:
    clock = FakeClock()
    model = Model()
    while True:
        async with opened(layout, clock) as node:
            await settle(node, model, EVERYTHING)
            while todo and todo[0] != "reopen":
                batch = todo.pop(0)
                for operation in batch:
                    if operation[0] in ("put", "hint", "cancel"):
                        for chunk in STORED[operation[3], operation[1]][: operation[2]]:
                            model.under_way.setdefault(chunk.hash, set()).add(chunk.blob)
                work: list[Coroutine[Any, Any, None]] = [act(node, clock, model, each) for each in batch]
                await asyncio.gather(*work)
                await check_books(node, layout)
                await settle(node, model, EVERYTHING)
            counters = node.stat().counters
            assert not [name for name in counters if name.startswith(("tier_failures", "integrity_failures"))], counters
        if not todo:
            return
        todo.pop(0)
        if layout.disk_path is None:
            model.at_rest.clear()


async def settle(node: Node, model: Model, chunks: list[kv.StoredChunk]) -> None:
    """With nothing under way: what is held reads exactly as it may, and what is not held stays away."""
    for chunk in chunks:
        data = await read(node, chunk)
        assert (data is None) == (node._holdings.index.get(key_of(chunk)) is None)
        assert model.allows(chunk, data)
        model.at_rest.pop(chunk.hash, None)
        if data is not None:
            model.at_rest[chunk.hash] = data
            assert codec.verify(data).header.chunk_hash == chunk.hash
    model.under_way.clear()


@pytest.mark.slow
@given(
    host=st.sampled_from([0, SIZE - 1, SIZE, 3 * SIZE, 5 * SIZE + 100, 64 << 20]),
    disk=st.sampled_from([None, BLOCK, 2 * BLOCK, 6 * BLOCK, 11 * BLOCK + 5, 64 << 20]),
    policy=st.sampled_from(["gittins", "lru"]),
    disk_write=st.sampled_from(["behind", "demote"]),
    todo=batches,
)
@settings(max_examples=120, deadline=None)
def test_any_mix_of_operations_against_a_dict(
    host: int, disk: int | None, policy: str, disk_write: str, todo: list[Any]
) -> None:
    if not host and disk is None:
        return  # a node that could hold nothing: the configuration refuses it
    with tempfile.TemporaryDirectory(dir=FAST_DISK) as folder:
        settings_of = config(
            Path(folder) if disk is not None else None, host=host, disk=disk or 0, policy=policy, disk_write=disk_write
        )
        asyncio.run(run(settings_of, list(todo)))
