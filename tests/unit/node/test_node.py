"""The engine's operations on a real host and disk tier."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import kv_objects as kv
import pytest
from engine_node import (
    ROOMY,
    check_books,
    config,
    filled,
    found,
    offer,
    opened,
    outcomes,
    place_on_disk,
    put,
    read,
    tiers_of,
)  # fmt: skip
from tier_objects import LAYOUT, key_of

import kvstore_codec as codec
from kvstore.engine.node import Node
from kvstore.errors import InvalidRequest
from kvstore.tiers.allocator import aligned

A, B, C = (kv.chunks(LAYOUT, 4, seed=seed) for seed in (1, 2, 3))
SIZE = len(A[0].blob)
BY_QUALITY = {quality: kv.chunks(LAYOUT, 4, seed=1, quality=quality) for quality in ("low", "medium", "high", "raw")}
OTHER = kv.small_layout("other-model")


# Quality


@pytest.mark.parametrize(("first", "better"), [("low", "medium"), ("medium", "high"), ("high", "raw")])
async def test_a_better_version_replaces_a_worse_one_everywhere(tmp_path: Path, first: str, better: str) -> None:
    settings = config(tmp_path)
    worse_chunks, better_chunks = BY_QUALITY[first], BY_QUALITY[better]
    async with opened(settings) as node:
        await put(node, worse_chunks, durable=True)
        assert outcomes(await put(node, better_chunks, durable=True)) == ["stored"] * 4
        assert [await read(node, chunk) for chunk in better_chunks] == [chunk.blob for chunk in better_chunks]
        assert offer(node, worse_chunks).verdicts == ["have"] * 4
        assert outcomes(await put(node, worse_chunks, durable=True)) == ["have"] * 4
        assert node.stat().objects == 4
    async with opened(settings) as node:
        assert [await read(node, chunk) for chunk in better_chunks] == [chunk.blob for chunk in better_chunks]
        low = codec.Quality.LOW
        if better != "raw":
            assert [await read(node, chunk, quality=low) for chunk in better_chunks] == [
                bytes(codec.truncate(chunk.blob, low)) for chunk in better_chunks
            ]


async def test_a_better_version_replaces_one_found_on_disk_at_the_start(tmp_path: Path) -> None:
    settings = config(tmp_path, host=0)
    async with opened(settings) as node:
        await put(node, BY_QUALITY["low"])
    async with opened(settings) as node:
        assert outcomes(await put(node, BY_QUALITY["high"])) == ["stored"] * 4
        assert found(node, BY_QUALITY["high"]) == ["disk"] * 4
    async with opened(settings) as node:
        hit = node.lookup(LAYOUT.namespace_id, [chunk.hash for chunk in A], 0, 0)
        assert hit.qualities == [codec.Quality.HIGH] * 4


@pytest.mark.parametrize("leased", [False, True])
async def test_a_better_version_fits_where_the_worse_one_was(leased: bool) -> None:
    low, raw = BY_QUALITY["low"][0], BY_QUALITY["raw"][0]
    async with opened(config(None, host=aligned(len(raw.blob)))) as node:
        await put(node, [low])
        found(node, [low], lease_ms=1000 if leased else 0)
        assert outcomes(await put(node, [raw])) == ["stored"]
        assert await read(node, raw) == raw.blob


async def test_a_better_version_without_room_leaves_the_worse_one() -> None:
    low, raw = BY_QUALITY["low"][0], BY_QUALITY["raw"][0]
    async with opened(config(None, host=2 * SIZE - 1)) as node:
        await put(node, [low])
        await put(node, B[:1])
        found(node, B[:1], lease_ms=1000)
        assert outcomes(await put(node, [raw])) == ["rejected"]
        assert await read(node, low) == low.blob


async def test_the_quality_of_the_prefix_is_kept(tmp_path: Path) -> None:
    ref = A[0].ref
    kv_values = codec.empty(LAYOUT, ref.tokens)
    kv_values[...] = 1
    blob = codec.encode(kv_values, LAYOUT, quality="lossless", provenance="medium", chunk_hash=ref.hash)
    chunk = kv.StoredChunk(ref, bytes(blob), codec.Quality.LOSSLESS)
    settings = config(tmp_path)
    for turn in range(2):
        async with opened(settings) as node:
            if turn == 0:
                await put(node, [chunk], durable=True)
            hit = node.lookup(LAYOUT.namespace_id, [ref.hash], 0, 0)
            assert (hit.qualities, hit.provenances) == ([codec.Quality.LOSSLESS], [codec.Quality.MEDIUM])
            assert (await node.operations.list_objects(None, b"", 1, ""))[0][0].provenance == codec.Quality.MEDIUM


# Two-phase puts


async def test_nothing_is_visible_before_its_commit_and_an_abort_frees_it(tmp_path: Path) -> None:
    async with opened(config(tmp_path)) as node:
        stage = filled(node, A)
        assert found(node, A) == []
        assert (node.stat().staged_objects, node.stat().staged_bytes) == (4, 4 * SIZE)
        node.abort(stage)
        node.abort(stage)
        assert (node.stat().staged_objects, node.stat().staged_bytes) == (0, 0)
        assert outcomes(await put(node, A)) == ["stored"] * 4


async def test_the_same_object_committed_by_many_is_stored_once(tmp_path: Path) -> None:
    async with opened(config(tmp_path)) as node:
        stages = [filled(node, A) for _ in range(5)]
        results = await asyncio.gather(*(node.commit(stage, durable=True) for stage in stages))
        for chunk in range(4):
            assert sorted(result[chunk].outcome for result in results) == ["have"] * 4 + ["stored"]
        assert all(each.durable for result in results for each in result)
        assert node.stat().counters["puts.stored"] == 4
        assert node.stat().counters["stored_bytes"] == 4 * SIZE


async def test_versions_committed_at_once_end_with_the_best(tmp_path: Path) -> None:
    for host in (ROOMY, 0):
        async with opened(config(tmp_path / str(host), host=host)) as node:
            stages = [filled(node, BY_QUALITY[quality]) for quality in ("medium", "raw", "low", "high") * 2]
            await asyncio.gather(*(node.commit(stage, durable=index % 2 == 0) for index, stage in enumerate(stages)))
            for chunk in BY_QUALITY["raw"]:
                assert await read(node, chunk) == chunk.blob
            assert node.stat().objects == 4


@pytest.mark.parametrize("turns", range(1, 13, 2))
@pytest.mark.parametrize("host", [ROOMY, 2 * SIZE, 0])
async def test_a_cancelled_commit_leaves_nothing_staged(tmp_path: Path, host: int, turns: int) -> None:
    """Cancelled after `turns` short pauses: before, between and during the writes."""
    settings = config(tmp_path, host=host)
    async with opened(settings) as node:
        task = asyncio.ensure_future(node.commit(filled(node, A), durable=True))
        for _ in range(turns):  # of about one write each
            await asyncio.sleep(0.0003)
        task.cancel()
        await asyncio.wait([task])
        await check_books(node, settings)
        for chunk in A:
            assert await read(node, chunk) in (None, chunk.blob)
        assert all(outcome != "rejected" for outcome in outcomes(await put(node, A, durable=True)))
        assert [await read(node, chunk) for chunk in A] == [chunk.blob for chunk in A]


async def test_what_was_promised_to_be_there_and_went_is_rejected_not_forgotten() -> None:
    async with opened(config(None)) as node:
        await put(node, A)
        stage = offer(node, A)
        assert stage.verdicts == ["have"] * 4
        await node.delete(LAYOUT.namespace_id, [A[3].hash], 0)
        results = await node.commit(stage, durable=False)
        assert outcomes(results) == ["have"] * 3 + ["rejected"]
        assert "again" in results[3].reason


# Memory full of what is not on disk yet


async def test_puts_wait_for_memory_that_the_disk_is_still_to_free(tmp_path: Path) -> None:
    """Memory for two objects, eight puts of two at once: all are stored, none is lost."""
    prompts = [kv.chunks(LAYOUT, 2, seed=seed) for seed in range(10, 18)]
    async with opened(config(tmp_path, host=2 * SIZE)) as node:
        results = await asyncio.gather(*(put(node, prompt) for prompt in prompts))
        assert [outcomes(result) for result in results] == [["stored"] * 2] * 8
        for prompt in prompts:
            assert [await read(node, chunk) for chunk in prompt] == [chunk.blob for chunk in prompt]


async def test_an_object_larger_than_memory_goes_straight_to_disk(tmp_path: Path) -> None:
    async with opened(config(tmp_path, host=SIZE - 1)) as node:
        (result,) = await put(node, A[:1])
        assert (result.outcome, result.durable) == ("stored", True)
        assert found(node, A) == ["disk"]
        assert await read(node, A[0]) == A[0].blob
        assert found(node, A) == ["disk"], "and is not promoted"


# Deleting


@pytest.mark.parametrize("turns", [0, 1, 3, 6])
@pytest.mark.parametrize("host", [ROOMY, 0])
async def test_a_delete_during_a_write_wins_or_comes_first(tmp_path: Path, host: int, turns: int) -> None:
    settings = config(tmp_path, host=host)
    async with opened(settings) as node:
        task = asyncio.ensure_future(put(node, A, durable=True))
        for _ in range(turns):  # of about one write each
            await asyncio.sleep(0.0003)
        over = task.done()
        removed, _ = await node.delete(LAYOUT.namespace_id, [chunk.hash for chunk in A], 0)
        results = await task
        left = [chunk for chunk in A if tiers_of(node, chunk)]
        assert len(left) == 4 - removed
        assert [result.durable for result in results] == [over or bool(tiers_of(node, chunk)) for chunk in A]
        await check_books(node, settings)
    async with opened(settings) as node:
        assert [chunk for chunk in A if tiers_of(node, chunk)] == left


async def test_delete_then_put_again_while_the_first_write_is_queued(tmp_path: Path) -> None:
    settings = config(tmp_path)
    async with opened(settings) as node:
        for _ in range(5):
            await put(node, A)
            assert (await asyncio.gather(node.delete(LAYOUT.namespace_id, None, 0), put(node, A)))[0] == (4, 4 * SIZE)
        await put(node, A, durable=True)
    async with opened(settings) as node:
        assert [await read(node, chunk) for chunk in A] == [chunk.blob for chunk in A]


async def test_a_namespace_is_deleted_with_all_that_is_known_of_it(tmp_path: Path) -> None:
    settings = config(tmp_path)
    other = kv.chunks(OTHER, 2, seed=5)
    async with opened(settings) as node:
        await put(node, A, durable=True)
        await put(node, other, OTHER, durable=True)
        assert node.stat().namespaces == 2
        assert await node.delete(LAYOUT.namespace_id, None, 0) == (4, 4 * SIZE)
        assert node.stat().namespaces == 1
        assert await node.delete(LAYOUT.namespace_id, None, 0) == (0, 0)
    async with opened(settings) as node:
        assert (node.stat().namespaces, node.stat().objects) == (1, 2)
        assert [await read(node, chunk, OTHER) for chunk in other] == [chunk.blob for chunk in other]


# Namespaces, lists


async def test_layouts_come_back_and_damaged_ones_are_removed(tmp_path: Path) -> None:
    settings = config(tmp_path)
    other = kv.chunks(OTHER, 1, seed=5)
    async with opened(settings) as node:
        await put(node, A, durable=True)
        await put(node, other, OTHER, durable=True)
    folder = tmp_path / "disk" / "namespaces"
    assert len(list(folder.iterdir())) == 2
    damaged = folder / f"{OTHER.namespace_id.hex()}.json"
    intact = folder / f"{LAYOUT.namespace_id.hex()}.json"
    strangers = {
        damaged: damaged.read_bytes()[:-1],
        folder / f"{'0' * 64}.json": intact.read_bytes(),
        folder / "absurd.json": b'{"chunk_tokens":' + b"9" * 5000,
        folder / "binary.json": random.Random(1).randbytes(100),
        intact.with_suffix(".tmp"): intact.read_bytes(),
    }
    for path, content in strangers.items():
        path.write_bytes(content)
    (folder / "folder").mkdir()
    async with opened(settings) as node:
        assert sorted(folder.iterdir()) == sorted([intact, folder / "folder"])
        assert node.stat().namespaces == 1
        models = {
            entry.key.namespace_id: entry.model for entry in (await node.operations.list_objects(None, b"", 10, ""))[0]
        }
        assert models == {LAYOUT.namespace_id: "test-model", OTHER.namespace_id: ""}
        assert await read(node, other[0], OTHER) == other[0].blob, "objects do not need their layout to be read"
        await put(node, kv.chunks(OTHER, 1, seed=6), OTHER, durable=True)
        assert damaged.read_bytes() == OTHER.canonical_bytes


async def test_a_layout_that_is_none_is_an_invalid_request() -> None:
    async with opened(config(None)) as node:
        for layout_bytes in (b"", b"{}", b"\xff", b'{"chunk_tokens":' + b"9" * 5000 + b"}"):
            with pytest.raises(InvalidRequest):
                node.offer(codec.namespace_id_of(layout_bytes), layout_bytes, 0, [])
        with pytest.raises(InvalidRequest, match="does not hash"):
            node.offer(bytes(32), LAYOUT.canonical_bytes, 0, [])


@pytest.mark.parametrize("limit", [1, 2, 3, 11, 12, 13])
async def test_pages_show_everything_once(limit: int) -> None:
    async with opened(config(None)) as node:
        for prompt in (A, B, C):
            await put(node, prompt)
        token, seen = "", []
        while True:
            page, token = await node.operations.list_objects(None, b"", limit, token)
            assert 0 < len(page) <= limit
            seen += [entry.key for entry in page]
            if not token:
                break
        assert seen == sorted(key_of(chunk) for chunk in [*A, *B, *C])


@pytest.mark.parametrize("token", ["x", "00", "00" * 65, "00" * 67, "zz" * 66])
async def test_a_page_token_that_is_none_is_refused(token: str) -> None:
    async with opened(config(None)) as node:
        with pytest.raises(InvalidRequest, match="page_token"):
            await node.operations.list_objects(None, b"", 1, token)


async def test_a_page_token_outlives_the_object_it_names() -> None:
    async with opened(config(None)) as node:
        await put(node, A)
        page, token = await node.operations.list_objects(None, b"", 2, "")
        await node.delete(LAYOUT.namespace_id, [page[1].key.chunk_hash], 0)
        rest, token = await node.operations.list_objects(None, b"", 2, token)
        assert [entry.key for entry in [*page, *rest]] == sorted(key_of(chunk) for chunk in A)
        assert token == ""


# Verify


async def verified(node: Node) -> tuple[int, set[bytes]]:
    """(objects checked, hashes found damaged)."""
    checked, damaged = 0, set()
    async for progress in node.operations.verify(None, None):
        checked = progress.checked
        if progress.damaged_hash is not None:
            assert progress.problem
            damaged.add(progress.damaged_hash)
    return checked, damaged


async def test_verify_finds_and_drops_damaged_copies(tmp_path: Path) -> None:
    settings = config(tmp_path)
    async with opened(settings) as node:
        await put(node, A, durable=True)
        assert await verified(node) == (4, set())
        place_on_disk(settings, A[1]).write(300, bytes(8))
        place_on_disk(settings, A[2]).punch()
        assert await verified(node) == (4, {A[1].hash, A[2].hash})
        assert [tiers_of(node, chunk) for chunk in A] == [("host", "disk"), ("host",), ("host",), ("host", "disk")]
        assert await verified(node) == (4, set())
        results = await put(node, A, durable=True)
        assert [(result.outcome, result.durable) for result in results] == [("have", True)] * 4
        assert await verified(node) == (4, set())
