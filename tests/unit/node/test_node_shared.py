"""A node's engine and a real Redis: what is kept of what was read there, and in which order things reach it."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kv_objects as kv
import pytest
from engine_node import config, found, opened, outcomes, put, read, tiers_of
from fake_clock import FakeClock
from redis_process import RedisProcess
from redis_tiers import redis_tier
from tier_objects import LAYOUT, key_of
from tier_objects import put as put_in_redis

import kvstore_codec as codec
from kvstore.engine.node import Node
from kvstore.tiers.allocator import aligned

LOW, HIGH, RAW = (kv.chunks(LAYOUT, 4, seed=1, quality=quality) for quality in ("low", "high", "raw"))
OTHER = kv.chunks(LAYOUT, 4, seed=2)
PLACE = aligned(len(RAW[0].blob))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    server = RedisProcess(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop(signal.SIGKILL)


@pytest.fixture
def server(running: RedisProcess) -> RedisProcess:
    running.command("FLUSHALL")
    return running


def stored_in(server: RedisProcess, chunks: list[kv.StoredChunk]) -> None:
    """As another node does."""
    tier = redis_tier(server)
    for chunk in chunks:
        put_in_redis(tier, chunk)
    tier.close()


async def read_chain(node: Node, chunks: list[kv.StoredChunk], quality: codec.Quality) -> list[bytes]:
    return [bytes(data) async for data in node.read_chain([key_of(chunk) for chunk in chunks], quality)]


def settings(server: RedisProcess, folder: Path | None = None, **more: Any) -> Any:
    return config(folder, redis_url=server.url, redis_timeout_ms=2000, redis_write="through", **more)


async def test_only_what_is_whole_is_kept(server: RedisProcess) -> None:
    stored_in(server, HIGH)
    async with opened(settings(server)) as node:
        low = await read_chain(node, HIGH, codec.Quality.LOW)
        assert low == [chunk.blob[: codec.parse_header(chunk.blob).layer_bytes[0]] for chunk in HIGH]
        assert found(node, HIGH) == []
        assert await read_chain(node, HIGH, codec.Quality.RAW) == [chunk.blob for chunk in HIGH]
        assert found(node, HIGH) == ["host"] * 4
        assert [await read(node, chunk) for chunk in HIGH] == [chunk.blob for chunk in HIGH]
        assert node.stat().counters["reads.redis"] == 8


async def test_what_is_kept_pushes_out_what_was_not_used_since_and_no_more(server: RedisProcess) -> None:
    stored_in(server, RAW)
    async with opened(settings(server, host=5 * PLACE)) as node:
        await put(node, OTHER)
        await put(node, kv.chunks(LAYOUT, 1, seed=3))
        assert await read_chain(node, RAW, codec.Quality.RAW) == [chunk.blob for chunk in RAW]
        assert found(node, RAW) == ["host"] * 4
        assert found(node, OTHER, lease_ms=0) == []
        assert found(node, RAW, lease_ms=1000) == ["host"] * 4
        assert await read_chain(node, OTHER, codec.Quality.RAW) == [chunk.blob for chunk in OTHER]
        assert found(node, OTHER) == ["host"], "in the one place that no lease holds"


async def test_a_version_on_its_way_to_disk_is_not_mixed_with_another_from_redis(
    server: RedisProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored_in(server, LOW[:1])
    clock, began, go_on = FakeClock(), threading.Event(), threading.Event()
    async with opened(settings(server, tmp_path, host=2 * PLACE), clock) as node:
        third = kv.chunks(LAYOUT, 1, seed=3)
        for chunks in (OTHER[:1], third):
            await put(node, chunks, durable=True)
            found(node, chunks, lease_ms=1000)  # memory is full of them
        disk = node._holdings.disk
        assert disk is not None
        real = disk.put_many

        def slow(objects: Any) -> None:
            began.set()
            go_on.wait(10)
            real(objects)

        monkeypatch.setattr(disk, "put_many", slow)
        better = asyncio.ensure_future(put(node, HIGH[:1]))
        await asyncio.to_thread(began.wait, 10)
        clock.now_s += 2
        found(node, third)  # no lease holds the other, and it was not used since: there would be room
        assert await read_chain(node, LOW[:1], codec.Quality.RAW) == [LOW[0].blob]
        assert tiers_of(node, LOW[0]) == ()
        go_on.set()
        assert outcomes(await better) == ["stored"]
        assert tiers_of(node, HIGH[0]) == ("disk",)
        assert await read(node, HIGH[0]) == HIGH[0].blob


@pytest.mark.parametrize("everything", [False, True])
async def test_what_is_deleted_while_it_is_read_from_redis_does_not_stay_here(
    server: RedisProcess, monkeypatch: pytest.MonkeyPatch, everything: bool
) -> None:
    stored_in(server, RAW)
    async with opened(settings(server)) as node:
        assert node._shared is not None
        real, began, go_on = node._shared.tier.read_many, threading.Event(), threading.Event()

        def slow(wanted: Any) -> Any:
            read_before = real(wanted)
            began.set()
            go_on.wait(10)
            return read_before

        monkeypatch.setattr(node._shared.tier, "read_many", slow)
        reading = asyncio.ensure_future(read_chain(node, RAW, codec.Quality.RAW))
        await asyncio.to_thread(began.wait, 10)
        hashes = None if everything else [chunk.hash for chunk in RAW]
        await node.delete(LAYOUT.namespace_id, hashes, 0)
        go_on.set()
        assert await reading == [chunk.blob for chunk in RAW], "it came before"
        assert found(node, RAW) == []
        assert len(await node.find(LAYOUT.namespace_id, [chunk.hash for chunk in RAW], 0, 0)) == 0


async def test_what_another_node_replaces_while_it_is_read_is_a_miss_and_stays(
    server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored_in(server, LOW[:1])
    async with opened(settings(server)) as node:
        assert node._shared is not None
        tier = node._shared.tier
        real = tier.read_many

        def replaced_first(wanted: Any) -> Any:
            monkeypatch.undo()
            stored_in(server, HIGH[:1])
            return real(wanted)

        monkeypatch.setattr(tier, "read_many", replaced_first)
        assert await read_chain(node, LOW[:1], codec.Quality.RAW) == []
        assert not any(name.startswith("integrity_failures") for name in node.stat().counters)
        assert await read_chain(node, HIGH[:1], codec.Quality.RAW) == [HIGH[0].blob]


async def test_a_damaged_object_in_redis_is_a_miss_and_goes(server: RedisProcess) -> None:
    stored_in(server, RAW)
    (name,) = server.command("KEYS", f"*{RAW[1].hash.hex()}*") or [b""]
    assert name, "its key names its hash"
    value = bytearray(server.command("GET", name))
    value[-1] ^= 1
    server.command("SET", name, bytes(value))
    async with opened(settings(server)) as node:
        assert await read_chain(node, RAW, codec.Quality.RAW) == [RAW[0].blob]
        assert found(node, RAW) == ["host"]
        assert not server.command("EXISTS", name)
        assert sum(
            count for name, count in node.stat().counters.items() if name.startswith("integrity_failures.redis")
        ) == 1  # fmt: skip
        assert outcomes(await put(node, RAW)) == ["have", *["stored"] * 3]
        assert server.command("EXISTS", name), "it is put right"


async def test_a_better_version_from_elsewhere_is_not_replaced(server: RedisProcess) -> None:
    stored_in(server, HIGH)
    async with opened(settings(server)) as node:
        assert outcomes(await put(node, LOW)) == ["stored"] * 4
    tier = redis_tier(server)
    assert [bytes(tier.read(key_of(chunk), len(chunk.blob)) or b"") for chunk in HIGH] == [
        chunk.blob for chunk in HIGH
    ]  # fmt: skip
    tier.close()


@pytest.mark.parametrize("write", ["behind", "through"])
async def test_a_closing_node_sends_what_is_on_its_way(server: RedisProcess, write: str) -> None:
    async with opened(config(None, redis_url=server.url, redis_write=write)) as node:
        assert outcomes(await put(node, RAW)) == ["stored"] * 4
    assert server.command("DBSIZE") == 4
