"""How objects move between tiers and what they lose on the way: degraded before evicted, demoted, promoted, kept."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kv_objects as kv
import pytest
from engine_node import config, filled, found, opened, outcomes, put, read, tiers_of
from fake_clock import FakeClock
from tier_objects import LAYOUT, key_of

import kvstore_codec as codec
from kvstore.engine.node import Node
from kvstore.index.held import Entry
from kvstore.tiers.allocator import aligned
from kvstore_codec import Quality

A, B = (kv.chunks(LAYOUT, 4, seed=seed, quality="high") for seed in (1, 2))
E, F, G, H = (kv.chunks(LAYOUT, 4, seed=seed) for seed in (1, 2, 3, 4))  # raw: all as large as each other
PLACE = aligned(len(E[0].blob))
LAYER_BYTES = [codec.parse_header(chunk.blob).layer_bytes for chunk in (*A, *B)]
WHOLE = max(aligned(ends[2]) for ends in LAYER_BYTES)  # in memory
BLOCK = 4096
BIG_LAYOUT = kv.small_layout("big", layers=8, head_dim=64)  # layers of more than a block, so that cuts free blocks
BIG, OTHER = (kv.chunks(BIG_LAYOUT, 4, seed=seed, quality="high") for seed in (1, 2))
BIG_COST = max(-(-len(chunk.blob) // BLOCK) * BLOCK + 256 for chunk in (*BIG, *OTHER))
ALL_MAY_BE_PINNED: dict[str, Any] = {"soft_pin_share": 1.0, "hard_pin_share": 1.0}


def qualities(node: Node, chunks: Sequence[kv.StoredChunk], layout: codec.KVLayout = LAYOUT) -> list[Quality]:
    """What a lookup tells."""
    hit = node.lookup(layout.namespace_id, [chunk.hash for chunk in chunks], 0, 0)
    return [Quality(quality) for quality in hit.qualities]


def cut(chunk: kv.StoredChunk, quality: Quality) -> bytes:
    header = codec.parse_header(chunk.blob)
    return chunk.blob[: next(end for end in header.layer_bytes if header.quality_at(end) == quality)]


async def reads(node: Node, chunks: Sequence[kv.StoredChunk], layout: codec.KVLayout = LAYOUT) -> list[bytes | None]:
    return [await read(node, chunk, layout) for chunk in chunks]


def degraded(node: Node, tier: str) -> dict[str, int]:
    prefix = f"degradations.{tier}."
    return {
        name.removeprefix(prefix).removesuffix(".capacity"): count
        for name, count in node.stat().counters.items()
        if name.startswith(prefix)
    }


# Degraded before evicted


@pytest.mark.parametrize("floor", ["medium", "low"])
async def test_under_pressure_objects_shrink_to_the_floor_and_only_then_go(floor: str) -> None:
    least = Quality.parse(floor)
    async with opened(config(None, host=8 * WHOLE, degrade_floor=floor)) as node:
        for prompt in (A, B):
            assert outcomes(await put(node, prompt)) == ["stored"] * 4
        assert degraded(node, "host") == {}
        while len(found(node, [*A[:1]])) and not node.stat().counters.get("evictions.host.capacity"):
            before = node.stat().objects
            more = kv.chunks(LAYOUT, 1, seed=100 + before, quality="high")
            assert outcomes(await put(node, more)) == ["stored"]
        held = [entry for entry in node._holdings.index if entry.key not in [key_of(chunk) for chunk in more]]
        assert {entry.quality for entry in held} == {least}, "nothing goes while anything can shrink"
        assert len(held) >= 8
        assert set(degraded(node, "host")) == ({"medium"} if floor == "medium" else {"medium", "low"})


async def test_what_shrank_is_told_and_read_as_it_is(tmp_path: Path) -> None:
    async with opened(config(None, host=4 * WHOLE, degrade_floor="low")) as node:
        await put(node, A)
        await put(node, kv.chunks(LAYOUT, 1, seed=9, quality="raw"))
        told = qualities(node, A)
        assert min(told) >= Quality.HIGH
        assert max(told) > Quality.HIGH
        assert await reads(node, A) == [cut(chunk, quality) for chunk, quality in zip(A, told, strict=True)]
        hit = node.lookup(LAYOUT.namespace_id, [chunk.hash for chunk in A], 0, 0)
        assert list(hit.stored_bytes) == [len(cut(chunk, quality)) for chunk, quality in zip(A, told, strict=True)]


async def test_with_no_floor_objects_go_whole() -> None:
    async with opened(config(None, host=8 * PLACE, degrade_floor="none")) as node:
        for prompt in (E, F, G):
            await put(node, prompt)
        assert degraded(node, "host") == {}
        assert node.stat().counters["evictions.host.capacity"] == 4
        assert await reads(node, [*F, *G]) == [chunk.blob for chunk in (*F, *G)]
        assert found(node, E) == []


async def test_a_better_version_than_is_left_is_taken_again() -> None:
    async with opened(config(None, host=4 * WHOLE, degrade_floor="low")) as node:
        await put(node, A)
        await put(node, kv.chunks(LAYOUT, 1, seed=9, quality="raw"))
        shrunk = [quality > Quality.HIGH for quality in qualities(node, A)]
        await node.operations.evict("host", 0, [kv.chunks(LAYOUT, 1, seed=9, quality="raw")[0].hash])
        stage = filled(node, A)
        assert stage.verdicts == ["send" if lost else "have" for lost in shrunk]
        results = await node.commit(stage, durable=False)
        assert outcomes(results) == ["stored" if lost else "have" for lost in shrunk]
        assert await reads(node, A) == [chunk.blob for chunk in A]


async def test_the_disk_shrinks_before_it_evicts_and_so_it_is_after_a_restart(tmp_path: Path) -> None:
    settings = config(tmp_path, host=0, disk=6 * BIG_COST, degrade_floor="low")
    async with opened(settings) as node:
        for prompt in (BIG, OTHER):
            assert outcomes(await put(node, prompt, BIG_LAYOUT)) == ["stored"] * 4
        told = [*qualities(node, BIG, BIG_LAYOUT), *qualities(node, OTHER, BIG_LAYOUT)]
        assert len(told) == 8, "nothing went"
        assert sum(degraded(node, "disk").values()) > 0
        assert max(told) > Quality.HIGH
    async with opened(settings) as node:
        again = [*qualities(node, BIG, BIG_LAYOUT), *qualities(node, OTHER, BIG_LAYOUT)]
        assert again == told
        assert await reads(node, [*BIG, *OTHER], BIG_LAYOUT) == [
            cut(chunk, quality) for chunk, quality in zip((*BIG, *OTHER), told, strict=True)
        ]


async def test_where_the_disk_has_it_all_memory_lets_go_rather_than_shrink(tmp_path: Path) -> None:
    async with opened(config(tmp_path, host=4 * WHOLE, degrade_floor="low")) as node:
        await put(node, A, durable=True)
        await put(node, B, durable=True)
        assert degraded(node, "host") == {}
        assert found(node, A) == ["disk"] * 4
        assert await reads(node, [*A, *B]) == [chunk.blob for chunk in (*A, *B)]


# What is held


async def test_leased_objects_neither_shrink_nor_go(tmp_path: Path) -> None:
    clock = FakeClock()
    async with opened(config(None, host=4 * WHOLE, degrade_floor="low"), clock) as node:
        await put(node, A)
        hit = node.lookup(LAYOUT.namespace_id, [chunk.hash for chunk in A], 0, 1000)
        for _ in range(5):
            clock.now_s += 0.9
            assert node.renew(hit.lease_id, 1000) == 1000
            assert outcomes(await put(node, B)) == ["rejected"] * 4
            assert await reads(node, A) == [chunk.blob for chunk in A]
        clock.now_s += 1.0
        assert node.renew(hit.lease_id, 1000) == 0, "too late"
        assert outcomes(await put(node, B)) == ["stored"] * 4
        assert qualities(node, A) != [Quality.HIGH] * 4
        assert {name for name in node.stat().counters if name.startswith("lease_events")} == {
            "lease_events.taken", "lease_events.renewed", "lease_events.late",
        }  # fmt: skip


@pytest.mark.parametrize("by", ["lease", "pin"])
async def test_a_better_version_that_only_the_disk_has_room_for_waits_until_nothing_holds_the_worse(
    tmp_path: Path, by: str
) -> None:
    clock = FakeClock()
    low = kv.chunks(LAYOUT, 1, seed=1, quality="low")
    async with opened(config(tmp_path, host=aligned(len(low[0].blob)), **ALL_MAY_BE_PINNED), clock) as node:
        await put(node, low, durable=True)
        if by == "lease":
            assert found(node, low, lease_ms=1000) == ["host"]
        else:
            assert node.operations.pin([low[0].hash], 1) == (1, 0)
        better = asyncio.ensure_future(put(node, E[:1]))
        while not better.done():
            assert await read(node, low[0]) == low[0].blob, "it is there all the time"
            await asyncio.sleep(0)
        assert outcomes(better.result()) == ["rejected"]
        clock.now_s += 1
        assert outcomes(await put(node, E[:1])) == ["stored"]
        assert await read(node, E[0]) == E[0].blob


async def test_a_lease_that_is_let_go_holds_nothing() -> None:
    async with opened(config(None, host=4 * WHOLE, degrade_floor="none")) as node:
        await put(node, A)
        hit = node.lookup(LAYOUT.namespace_id, [chunk.hash for chunk in A], 0, 60_000)
        assert outcomes(await put(node, B)) == ["rejected"] * 4
        assert node.renew(hit.lease_id, 0) == 0
        assert node.stat().leases == 0
        assert outcomes(await put(node, B)) == ["stored"] * 4


@pytest.mark.parametrize("seconds", [5, 0], ids=["soft", "hard"])
async def test_pinned_objects_neither_shrink_nor_go_until_the_pin_ends(seconds: int) -> None:
    clock = FakeClock()
    async with opened(config(None, host=4 * WHOLE, degrade_floor="low", **ALL_MAY_BE_PINNED), clock) as node:
        await put(node, A)
        assert node.operations.pin([chunk.hash for chunk in A], seconds) == (4, 0)
        clock.now_s += 4.9
        assert outcomes(await put(node, B)) == ["rejected"] * 4
        assert await node.operations.evict(None, 0, None) == (0, 0)
        assert await reads(node, A) == [chunk.blob for chunk in A]
        clock.now_s += 0.2
        if not seconds:
            assert outcomes(await put(node, B)) == ["rejected"] * 4
            assert node.operations.unpin([chunk.hash for chunk in A]) == 4
        assert outcomes(await put(node, B)) == ["stored"] * 4
        assert qualities(node, A) != [Quality.HIGH] * 4


async def test_a_pinned_object_does_not_shrink_below_a_copy_that_may_go(tmp_path: Path) -> None:
    size = aligned(max(len(chunk.blob) for chunk in (*BIG, *OTHER)))
    settings = config(tmp_path, host=2 * size, disk=2 * BIG_COST, degrade_floor="low", **ALL_MAY_BE_PINNED)
    async with opened(settings) as node:
        await put(node, BIG[:1], BIG_LAYOUT, durable=True)
        assert node.operations.pin([BIG[0].hash], 0) == (1, 0)
        for seed in range(10, 14):
            if seed < 12:  # it is still in memory when the disk is full
                node.lookup(BIG_LAYOUT.namespace_id, [BIG[0].hash], 0, 0)
            await put(node, kv.chunks(BIG_LAYOUT, 1, seed=seed, quality="high"), BIG_LAYOUT, durable=True)
        assert await read(node, BIG[0], BIG_LAYOUT) == BIG[0].blob
    async with opened(settings) as node:
        assert await read(node, BIG[0], BIG_LAYOUT) == BIG[0].blob, "also from disk alone"


async def test_hard_pins_survive_a_restart_and_soft_ones_do_not(tmp_path: Path) -> None:
    settings = config(tmp_path, host=0, disk=5 * BIG_COST, degrade_floor="low", **ALL_MAY_BE_PINNED)
    async with opened(settings) as node:
        await put(node, BIG, BIG_LAYOUT)
        assert node.operations.pin([chunk.hash for chunk in BIG[:2]], 0) == (2, 0)
        assert node.operations.pin([chunk.hash for chunk in BIG[2:]], 1000) == (2, 0)
    async with opened(settings) as node:
        assert node.stat().pinned_bytes == sum(len(chunk.blob) for chunk in BIG[:2])
        for seed in range(10, 16):
            assert outcomes(await put(node, kv.chunks(BIG_LAYOUT, 1, seed=seed), BIG_LAYOUT)) == ["stored"]
        assert await reads(node, BIG[:2], BIG_LAYOUT) == [chunk.blob for chunk in BIG[:2]]
        assert len(qualities(node, BIG, BIG_LAYOUT)) == 2, "those without a pin went"
        assert node.operations.unpin(None) == 2
    async with opened(settings) as node:
        assert node.stat().pinned_bytes == 0


async def test_what_a_writer_asks_to_retain_goes_last_for_a_while() -> None:
    clock = FakeClock()
    async with opened(config(None, host=8 * PLACE, degrade_floor="none"), clock) as node:
        await node.commit(filled(node, E), durable=False, retain=(50, 100.0))
        await put(node, F)
        await put(node, G)
        assert (found(node, E), found(node, F)) == (["host"] * 4, []), "the later used went first"
        assert found(node, G) == ["host"] * 4  # the last that is used
        clock.now_s += 100
        await put(node, H)
        assert (found(node, E), len(found(node, G))) == ([], 4)


# Down and up


def writes_of(node: Node) -> int:
    disk = node._holdings.disk
    assert disk is not None
    return disk.objects


async def test_through_is_on_disk_before_the_answer(tmp_path: Path) -> None:
    settings = config(tmp_path, disk_write="through")
    async with opened(settings) as node:
        assert [result.durable for result in await put(node, A)] == [True] * 4
        assert [tiers_of(node, chunk) for chunk in A] == [("host", "disk")] * 4


async def test_demote_writes_nothing_until_memory_has_no_room_and_loses_nothing(tmp_path: Path) -> None:
    settings = config(tmp_path, host=8 * PLACE, disk_write="demote", degrade_floor="none")
    async with opened(settings) as node:
        for prompt in (E, F):
            assert [result.durable for result in await put(node, prompt)] == [False] * 4
        assert writes_of(node) == 0
        assert outcomes(await put(node, G)) == ["stored"] * 4
        assert outcomes(await put(node, H)) == ["stored"] * 4
        everything = (*E, *F, *G, *H)
        assert all(tiers_of(node, chunk) for chunk in everything)
        assert 8 <= writes_of(node) < 16
        assert await reads(node, everything) == [chunk.blob for chunk in everything]
        assert not any(name.startswith("evictions.disk") for name in node.stat().counters)


async def test_demote_still_writes_what_must_be_durable(tmp_path: Path) -> None:
    settings = config(tmp_path, disk_write="demote")
    async with opened(settings) as node:
        await put(node, A)
        assert [result.durable for result in await put(node, B, durable=True)] == [True] * 4
        assert [result.durable for result in await put(node, A, durable=True)] == [True] * 4, "also what was there"
        assert writes_of(node) == 8


@pytest.mark.parametrize("disk_write", ["behind", "through", "demote"])
async def test_a_hit_on_disk_comes_up_and_stays_below(tmp_path: Path, disk_write: str) -> None:
    async with opened(config(tmp_path, host=4 * WHOLE, disk_write=disk_write, degrade_floor="none")) as node:
        for prompt in (A, B):
            await put(node, prompt, durable=True)
        assert found(node, A) == ["disk"] * 4
        assert await read(node, A[0], quality=Quality.LOW) == cut(A[0], Quality.LOW)
        assert tiers_of(node, A[0]) == ("disk",), "a prefix does not"
        assert await reads(node, A) == [chunk.blob for chunk in A]
        assert [tiers_of(node, chunk) for chunk in A] == [("host", "disk")] * 4
        assert [tiers_of(node, chunk) for chunk in B] == [("disk",)] * 4


def admissions(node: Node) -> dict[str, int]:
    prefix = "disk_admissions."
    return {name.removeprefix(prefix): n for name, n in node.stat().counters.items() if name.startswith(prefix)}


async def test_what_is_used_once_is_not_written_to_disk(tmp_path: Path) -> None:
    async with opened(config(tmp_path, disk_admission="second-use")) as node:
        for prompt in (A, B, G):
            await put(node, prompt)
        await node._holdings.wait_for_writes()
        assert (writes_of(node), admissions(node)) == (0, {"held_back": 12})

        assert await reads(node, A) == [chunk.blob for chunk in A]  # the second use
        assert outcomes(await put(node, B)) == ["have"] * 4
        await node._holdings.wait_for_writes()
        assert [tiers_of(node, chunk) for chunk in (*A, *B)] == [("host", "disk")] * 8
        assert [tiers_of(node, chunk) for chunk in G] == [("host",)] * 4
        assert admissions(node) == {"held_back": 12, "written": 8}

        assert await reads(node, A) == [chunk.blob for chunk in A]
        assert admissions(node) == {"held_back": 12, "written": 8}, "what is on disk is asked about no more"


async def test_the_filter_lets_pass_what_is_durable_and_what_memory_has_no_room_for(tmp_path: Path) -> None:
    settings = config(tmp_path, host=2 * WHOLE, disk_admission="second-use", degrade_floor="none")
    async with opened(settings) as node:
        assert [result.durable for result in await put(node, A, durable=True)] == [True] * 4
        assert outcomes(await put(node, B)) == ["stored"] * 4
        await node._holdings.wait_for_writes()
        assert all(tiers_of(node, chunk) for chunk in B), "a put is not lost, however small the memory"
        assert writes_of(node) > 4


async def test_a_better_version_of_what_is_on_disk_goes_there_too(tmp_path: Path) -> None:
    low = kv.chunks(LAYOUT, 1, seed=77, quality="low")
    high = kv.chunks(LAYOUT, 1, seed=77, quality="high")
    async with opened(config(tmp_path, disk_admission="second-use")) as node:
        await put(node, low, durable=True)
        await put(node, high)
        await node._holdings.wait_for_writes()
        assert tiers_of(node, high[0]) == ("host", "disk")
        assert await read(node, high[0]) == high[0].blob


async def test_with_demote_the_filter_keeps_from_disk_what_was_never_read(tmp_path: Path) -> None:
    settings = config(
        tmp_path, host=8 * PLACE, disk_write="demote", degrade_floor="none", disk_admission="second-use"
    )  # fmt: skip
    async with opened(settings) as node:
        await put(node, E)
        assert await reads(node, E) == [chunk.blob for chunk in E]
        for prompt in (F, G, H):
            assert outcomes(await put(node, prompt)) == ["stored"] * 4
        await node._holdings.wait_for_writes()
        assert [tiers_of(node, chunk) for chunk in E] == [("disk",)] * 4
        assert writes_of(node) == 4
        assert admissions(node)["held_back"] >= 4


async def test_verify_does_not_call_damaged_what_goes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(config(tmp_path)) as node:
        await put(node, A, durable=True)
        holdings = node._holdings
        real = holdings.read_checked

        async def read_and_drop(entry: Entry, tier: str, length: int) -> memoryview | None:
            data = await real(entry, tier, length)
            holdings.room.drop(entry, "disk")
            return data

        monkeypatch.setattr(holdings, "read_checked", read_and_drop)
        progress = [each async for each in node.operations.verify(None, None)]
        assert [each.problem for each in progress] == [None] * 4
        assert not any(name.startswith("integrity_failures") for name in node.stat().counters)


async def test_what_makes_room_for_a_hit_does_not_take_its_place_on_disk(tmp_path: Path) -> None:
    cost = -(-PLACE // BLOCK) * BLOCK + 256
    async with opened(config(tmp_path, host=PLACE, disk=cost, disk_write="demote", degrade_floor="none")) as node:
        await put(node, E[:1], durable=True)
        await node.operations.evict("host", 0, None)
        await put(node, F[:1])
        assert (tiers_of(node, E[0]), tiers_of(node, F[0])) == (("disk",), ("host",))
        assert found(node, E[:1]) == ["disk"]
        assert await read(node, E[0]) == E[0].blob
        assert "disk" in tiers_of(node, E[0])
