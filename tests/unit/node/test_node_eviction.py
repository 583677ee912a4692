"""What leaves a real host and disk tier when room is needed, and what leases keep there."""

from __future__ import annotations

from pathlib import Path

import kv_objects as kv
import pytest
from engine_node import (
    config,
    found,
    opened,
    outcomes,
    put,
    read,
    tiers_of,
)
from fake_clock import FakeClock
from tier_objects import LAYOUT

from kvstore.engine.model import Offer
from kvstore.tiers.allocator import aligned

A, B, C = (kv.chunks(LAYOUT, 4, seed=seed) for seed in (1, 2, 3))
SIZE = len(A[0].blob)
PLACE = aligned(SIZE)  # in memory
COST = -(-SIZE // 4096) * 4096 + 256


async def test_memory_evicts_leaves_first_and_the_least_recently_used_prompt_first(tmp_path: Path) -> None:
    async with opened(config(None, host=8 * PLACE)) as node:
        await put(node, A)
        await put(node, B)
        assert found(node, A) == ["host"] * 4  # A is used after B
        await put(node, C[:3])
        assert [tiers_of(node, chunk) for chunk in B] == [("host",), (), (), ()]
        assert found(node, A) == ["host"] * 4
        await put(node, C[3:])
        assert [tiers_of(node, chunk) for chunk in B] == [()] * 4
        assert node.stat().counters["evictions.host.capacity"] == 4


async def test_the_disk_evicts_in_the_same_order(tmp_path: Path) -> None:
    async with opened(config(tmp_path, host=0, disk=8 * COST)) as node:
        await put(node, A)
        await put(node, B)
        assert found(node, A) == ["disk"] * 4
        await put(node, C[:3])
        assert found(node, B) == ["disk"]
        assert found(node, A) == ["disk"] * 4
        assert found(node, C) == ["disk"] * 3


async def test_what_leaves_memory_is_still_on_disk_and_comes_back_when_it_is_used(tmp_path: Path) -> None:
    async with opened(config(tmp_path, host=4 * PLACE)) as node:
        await put(node, A, durable=True)
        await put(node, B, durable=True)
        assert found(node, A) == ["disk"] * 4
        for chunk in A:
            assert await read(node, chunk) == chunk.blob
        assert found(node, A) == ["host"] * 4
        assert node.stat().counters["reads.disk"] == 4
        assert [await read(node, chunk) for chunk in A] == [chunk.blob for chunk in A]
        assert node.stat().counters["reads.host"] == 4


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("disk", [False, True])
async def test_a_prompt_larger_than_memory_keeps_its_start_there(tmp_path: Path, disk: bool, durable: bool) -> None:
    prompt = kv.chunks(LAYOUT, 10, seed=4)
    async with opened(config(tmp_path if disk else None, host=4 * PLACE)) as node:
        results = await put(node, prompt, durable=durable)
        assert outcomes(results) == ["stored"] * (10 if disk else 4) + ["rejected"] * (0 if disk else 6)
        for _ in range(2):
            assert found(node, prompt) == ["host"] * 4 + ["disk"] * (6 if disk else 0)
            for chunk in prompt if disk else ():
                assert await read(node, chunk) == chunk.blob


@pytest.mark.parametrize("durable", [False, True])
async def test_a_prompt_larger_than_the_disk_keeps_its_start_there(tmp_path: Path, durable: bool) -> None:
    prompt = kv.chunks(LAYOUT, 10, seed=4)
    settings = config(tmp_path, host=8 * PLACE, disk=4 * COST)
    async with opened(settings) as node:
        results = await put(node, prompt, durable=durable)
        assert outcomes(results) == ["stored"] * 8 + ["rejected"] * 2
        if durable:
            assert [result.durable for result in results] == [True] * 4 + [False] * 6
    async with opened(settings) as node:
        assert found(node, prompt) == ["disk"] * 4


async def test_a_smaller_capacity_evicts_at_the_next_start(tmp_path: Path) -> None:
    async with opened(config(tmp_path)) as node:
        await put(node, A, durable=True)
        await put(node, B, durable=True)
    async with opened(config(tmp_path, disk=5 * COST + 1)) as node:
        assert node.stat().objects == 5
        assert len(found(node, A)) + len(found(node, B)) == 5, "what is left are prefixes"
        assert node.stat().counters["evictions.disk.capacity"] == 3
    async with opened(config(tmp_path, disk=COST)) as node:
        assert node.stat().objects == 1


@pytest.mark.parametrize("circle", [1, 2])
async def test_chunks_that_claim_to_be_each_others_parents_can_go(tmp_path: Path, circle: int) -> None:
    chunks = A[:circle]
    settings = config(tmp_path, host=circle * PLACE, disk=circle * COST)
    async with opened(settings) as node:
        offers = [
            Offer(chunk.hash, chunks[number - 1].hash, SIZE, chunk.quality) for number, chunk in enumerate(chunks)
        ]
        stage = node.offer(LAYOUT.namespace_id, LAYOUT.canonical_bytes, 0, offers)
        for number, chunk in enumerate(chunks):
            stage.write(number, 0, chunk.blob)
        assert outcomes(await node.commit(stage, durable=True)) == ["stored"] * circle
        assert outcomes(await put(node, B[:circle], durable=True)) == ["stored"] * circle
        assert [tiers_of(node, chunk) for chunk in B[:circle]] == [("host", "disk")] * circle


async def test_evict_takes_what_is_asked_and_counts_it(tmp_path: Path) -> None:
    async with opened(config(tmp_path)) as node:
        await put(node, A, durable=True)
        await put(node, B, durable=True)
        assert await node.operations.evict("host", 1, None) == (1, PLACE)
        assert found(node, A) == ["host"] * 3 + ["disk"]
        assert await node.operations.evict("host", 2 * PLACE + 1, None) == (3, 3 * PLACE)
        assert await node.operations.evict("host", 0, None) == (4, 4 * PLACE)
        assert await node.operations.evict("disk", 0, [A[0].hash, bytes(32)]) == (1, COST)
        assert found(node, A) == []
        assert await node.operations.evict(None, 0, None) == (7, 7 * COST)
        assert node.stat().objects == 0


# Leases


async def test_leased_objects_survive_any_pressure_until_the_lease_ends(tmp_path: Path) -> None:
    clock = FakeClock()
    async with opened(config(tmp_path, host=4 * PLACE, disk=4 * COST), clock) as node:
        await put(node, A, durable=True)
        assert found(node, A[:2], lease_ms=5000) == ["host"] * 2
        clock.now_s += 4.999
        await put(node, B)
        assert [tiers_of(node, chunk) for chunk in A[:2]] == [("host", "disk")] * 2
        assert await node.operations.evict(None, 0, None)
        assert await node.operations.evict(None, 0, [chunk.hash for chunk in A]) == (0, 0)
        assert [await read(node, chunk) for chunk in A[:2]] == [chunk.blob for chunk in A[:2]]
        clock.now_s += 0.001
        assert [entry.leased for entry in (await node.operations.list_objects(None, b"", 10, ""))[0]] == [False] * 2
        assert outcomes(await put(node, B)) == ["stored"] * 4
        assert found(node, A) == []


async def test_a_put_that_leases_leave_no_room_for_is_rejected(tmp_path: Path) -> None:
    async with opened(config(tmp_path, host=4 * PLACE, disk=4 * COST)) as node:
        await put(node, A)
        found(node, A, lease_ms=1000)
        results = await put(node, B[:1], durable=True)
        assert outcomes(results) == ["rejected"]
        assert "leased" in results[0].reason
        assert [await read(node, chunk) for chunk in A] == [chunk.blob for chunk in A]


async def test_a_lease_is_no_longer_than_configured() -> None:
    clock = FakeClock()
    async with opened(config(None, lease_ms_max=2000), clock) as node:
        await put(node, A)
        hit = node.lookup(LAYOUT.namespace_id, [chunk.hash for chunk in A], 0, 10**9)
        assert (bool(hit.lease_id), hit.lease_ms, node.stat().leases) == (True, 2000, 1)
        clock.now_s += 2
        assert node.stat().leases == 0
        assert node.lookup(LAYOUT.namespace_id, [bytes(32)], 0, 1000).lease_id == b""
