"""The engine when its disk fails it: damaged and lost files, refused writes and deletes, slow writes."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kv_objects as kv
import pytest
from disk_places import Place
from engine_node import (
    check_books,
    config,
    filled,
    found,
    opened,
    outcomes,
    place_on_disk,
    put,
    read,
    tiers_of,
)  # fmt: skip
from fake_clock import FakeClock
from tier_objects import LAYOUT

from kvstore.engine.node import Node
from kvstore.errors import DiskUnusable, TierFailed
from kvstore.tiers.allocator import aligned
from kvstore.tiers.disk import DiskTier

A, B = (kv.chunks(LAYOUT, 4, seed=seed) for seed in (1, 2))
LOW = kv.chunks(LAYOUT, 4, seed=1, quality="low")
SIZE = len(A[0].blob)
COST = -(-SIZE // 4096) * 4096 + 256


def zeroed(place: Place) -> None:
    place.write(0, bytes(SIZE))


def cut(place: Place) -> None:
    place.write(100, bytes(SIZE - 100))


def lost(place: Place) -> None:
    place.punch()


def a_flipped_bit(place: Place) -> None:
    place.flip(random.Random(1).randrange(SIZE), 2)


def another_object(place: Place) -> None:
    place.write(0, B[0].blob)


@pytest.mark.parametrize("damage", [zeroed, cut, lost, a_flipped_bit, another_object])
async def test_a_damaged_file_is_a_miss_and_can_be_put_again(
    tmp_path: Path, damage: Callable[[Place], None], caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(tmp_path, host=0)
    async with opened(settings) as node:
        await put(node, A)
        for chunk in A[2:]:
            damage(place_on_disk(settings, chunk))
        assert found(node, A) == ["disk"] * 4, "nobody has looked yet"
        assert [await read(node, chunk) for chunk in A] == [A[0].blob, A[1].blob, None, None]
        assert found(node, A) == ["disk"] * 2
        counters = node.stat().counters
        assert sum(value for name, value in counters.items() if name.startswith("integrity_failures.disk.")) == 2
        assert counters["reads.none"] == 2
        assert len([record for record in caplog.records if "damaged or lost" in record.message]) == 1
        assert outcomes(await put(node, A)) == ["have", "have", "stored", "stored"]
        assert [await read(node, chunk) for chunk in A] == [chunk.blob for chunk in A]


async def test_a_damaged_file_does_not_take_the_copy_in_memory_with_it(tmp_path: Path) -> None:
    settings = config(tmp_path)
    async with opened(settings) as node:
        await put(node, A, durable=True)
        a_flipped_bit(place_on_disk(settings, A[0]))
        assert await read(node, A[0]) == A[0].blob
        assert [progress.damaged_hash async for progress in node.operations.verify(None, [A[0].hash])] == [A[0].hash]
        assert tiers_of(node, A[0]) == ("host",)
        assert await read(node, A[0]) == A[0].blob


def failing_put(monkeypatch: pytest.MonkeyPatch, *, times: int) -> None:
    real, failures = DiskTier.put_many, iter(range(times))

    def put_or_fail(self: DiskTier, *arguments: Any) -> None:
        if next(failures, None) is not None:
            raise TierFailed("disk tier cannot write: No space left on device", errno=errno.ENOSPC)
        real(self, *arguments)

    monkeypatch.setattr(DiskTier, "put_many", put_or_fail)


async def test_what_the_disk_refuses_stays_in_memory_and_is_not_called_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing_put(monkeypatch, times=1000)
    async with opened(config(tmp_path)) as node:
        with caplog.at_level(logging.WARNING):
            results = await put(node, A, durable=True)
        assert outcomes(results) == ["stored"] * 4
        assert [result.durable for result in results] == [False] * 4
        assert [await read(node, chunk) for chunk in A] == [chunk.blob for chunk in A]
        assert found(node, A) == ["host"] * 4
        assert node.stat().counters["tier_failures.disk.write"] >= 4
        assert len(caplog.records) == 1
        monkeypatch.undo()
        results = await put(node, A, durable=True)
        assert [(result.outcome, result.durable) for result in results] == [("have", True)] * 4, "the fault has passed"


async def test_what_fits_nowhere_but_on_a_disk_that_refuses_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_put(monkeypatch, times=2)
    async with opened(config(tmp_path, host=0)) as node:
        results = await put(node, A)
        assert outcomes(results) == ["rejected"] * 2 + ["stored"] * 2
        assert "disk" in results[0].reason
        assert outcomes(await put(node, A)) == ["stored"] * 2 + ["have"] * 2


@pytest.mark.parametrize("host", [0, 64 << 20])
@pytest.mark.parametrize(
    ("function", "call"),
    [("pwrite", 1), ("fdatasync", 1), ("pwrite", 2), ("fdatasync", 2)],
    ids=lambda value: str(value),
)
async def test_a_replacement_that_the_disk_refuses_leaves_no_stale_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: int, function: str, call: int
) -> None:
    """The worse version has made way in memory: it must not come back from the disk after a restart."""
    settings = config(tmp_path, host=host)
    async with opened(settings) as node:
        await put(node, LOW[:1], durable=True)
        real, calls = getattr(os, function), iter(range(1, 1000))

        def faulty(*arguments: Any, **keywords: Any) -> Any:
            if next(calls) == call:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **keywords)

        monkeypatch.setattr(os, function, faulty)
        results = await put(node, A[:1])
        await check_books(node, settings)
        monkeypatch.undo()
        assert outcomes(results) == (["stored"] if host else ["rejected"])
        assert await read(node, A[0]) == (A[0].blob if host else None)
    async with opened(settings) as node:
        assert found(node, A) == []
        assert await read(node, A[0]) is None


async def test_a_delete_that_the_disk_refuses_keeps_its_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, host=0, disk=4 * COST)
    async with opened(settings) as node:
        await put(node, A)

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", refuse)
            await node.delete(LAYOUT.namespace_id, [A[3].hash], 0)
        assert found(node, A) == ["disk"] * 3
        assert node.stat().counters["tier_failures.disk.delete"] == 1
        holdings = node._holdings
        assert holdings.queue is not None
        assert holdings.disk is not None
        assert holdings.queue.planned_bytes == holdings.disk.used_bytes == 4 * COST
        assert outcomes(await put(node, B)) == ["stored"] * 3 + ["rejected"], (
            "what is still there takes the room of one"
        )
        assert outcomes(await put(node, A[3:])) == ["stored"], "and is written over"
        assert "tier_failures.disk.write" not in node.stat().counters


async def test_a_disk_that_cannot_be_read_is_a_miss_and_nothing_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(config(tmp_path, host=0)) as node:
        await put(node, A)

        def fail(*_: Any, **__: Any) -> None:
            raise TierFailed("disk tier cannot read: Input/output error", errno=errno.EIO)

        with monkeypatch.context() as patched:
            patched.setattr(DiskTier, "read", fail)
            assert await read(node, A[0]) is None
        assert node.stat().counters["tier_failures.disk.read"] == 1
        assert [await read(node, chunk) for chunk in A] == [chunk.blob for chunk in A]


async def test_a_write_that_dies_of_something_else_does_not_leave_its_put_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise MemoryError

    escaped: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: escaped.append(context))
    async with opened(config(tmp_path)) as node:
        with monkeypatch.context() as patched:
            patched.setattr(DiskTier, "put_many", die)
            results = await asyncio.wait_for(put(node, A[:1], durable=True), 5)
        assert [(result.outcome, result.durable) for result in results] == [("stored", False)]
        assert await read(node, A[0]) == A[0].blob


@pytest.fixture
async def slow_disk(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Writes of the disk wait for this event."""
    real, go, loop = DiskTier.put_many, asyncio.Event(), asyncio.get_running_loop()

    def slow_put(self: DiskTier, *arguments: Any) -> None:
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result()
        real(self, *arguments)

    monkeypatch.setattr(DiskTier, "put_many", slow_put)
    return go


async def test_a_put_cancelled_while_it_waits_for_memory_leaves_the_others_alone(
    tmp_path: Path, slow_disk: asyncio.Event
) -> None:
    """Memory is full of one object on its way to disk; the next put waits for it and is cancelled."""
    settings = config(tmp_path, host=aligned(SIZE))
    async with opened(settings) as node:
        assert outcomes(await put(node, A[:1])) == ["stored"]
        waiting = asyncio.ensure_future(node.commit(filled(node, B[:1]), durable=False))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait([waiting])
        assert node.stat().staged_bytes == 0
        slow_disk.set()
        await check_books(node, settings)
        assert (await read(node, A[0]), await read(node, B[0])) == (A[0].blob, None)


@pytest.mark.parametrize("again", [False, True])
async def test_a_version_deleted_while_it_replaces_another_on_disk_takes_both_with_it(
    tmp_path: Path, slow_disk: asyncio.Event, again: bool
) -> None:
    settings = config(tmp_path)
    async with opened(settings) as node:
        slow_disk.set()
        await put(node, LOW, durable=True)
        slow_disk.clear()
        assert outcomes(await put(node, A)) == ["stored"] * 4
        deleting = asyncio.ensure_future(node.delete(LAYOUT.namespace_id, None, 0))
        await asyncio.sleep(0)
        if again:
            assert outcomes(await put(node, LOW)) == ["stored"] * 4
        assert not deleting.done()
        slow_disk.set()
        assert await deleting == (4, 4 * SIZE)
        await check_books(node, settings)
    async with opened(settings) as node:
        assert [await read(node, chunk) for chunk in LOW] == [chunk.blob if again else None for chunk in LOW]


async def test_a_version_that_fits_in_memory_only_takes_the_worse_one_off_the_disk(tmp_path: Path) -> None:
    """Else the worse one would come back after a restart, to some writer's surprise."""
    settings = config(tmp_path, disk=3 * 4096)
    async with opened(settings) as node:
        assert [result.durable for result in await put(node, LOW[:2], durable=True)] == [True, True]
        node.lookup(LAYOUT.namespace_id, [LOW[1].hash], 0, 1000)  # a leased leaf: nothing on disk may go
        (result,) = await put(node, A[:1])
        assert (result.outcome, result.durable) == ("stored", False)
        assert [tiers_of(node, chunk) for chunk in LOW[:2]] == [("host",), ("host", "disk")]
        await check_books(node, settings)
        assert await read(node, A[0]) == A[0].blob
    async with opened(settings) as node:
        assert [tiers_of(node, chunk) for chunk in LOW[:2]] == [(), ("disk",)]


async def test_a_disk_in_use_or_unusable_is_said_at_once(tmp_path: Path) -> None:
    settings = config(tmp_path)
    async with opened(settings):
        with pytest.raises(DiskUnusable, match="in use"):
            await Node.open(settings, clock=FakeClock())
    assert settings.disk_path is not None
    (settings.disk_path / "namespaces").rmdir()
    (settings.disk_path / "namespaces").write_bytes(b"x")
    with pytest.raises(DiskUnusable, match="cannot be used"):
        await Node.open(settings, clock=FakeClock())
    (settings.disk_path / "namespaces").unlink()
    async with opened(settings) as node:
        assert node.stat().objects == 0
