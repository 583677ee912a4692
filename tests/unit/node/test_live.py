"""Live writes without a network: every reader gets the layers that were written, from the first on, or an end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from engine_node import ROOMY, config, opened, put
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_objects import chunks
from prometheus_client import CollectorRegistry
from tier_objects import LAYOUT

from kvstore.engine.live import Asked, Found, LiveOpening, LiveWrite, LiveWrites, Piece
from kvstore.errors import InvalidRequest, TierFull
from kvstore.metrics import NodeMetrics
from kvstore_codec import Quality

HASHES = [bytes([number]) * 32 for number in range(8)]
NAMESPACE = bytes(32)
LAYERS = 3


@dataclass
class Budget:
    """Room in flight, as the node keeps it."""

    free_bytes: int = ROOMY

    def reserve(self, size: int) -> bool:
        if size > self.free_bytes:
            return False
        self.free_bytes -= size
        return True

    def release(self, size: int) -> None:
        self.free_bytes += size


def registry(budget: Budget | None = None, stored: frozenset[bytes] = frozenset()) -> LiveWrites:
    budget = budget or Budget()
    metrics = NodeMetrics(CollectorRegistry())
    return LiveWrites(budget.reserve, budget.release, lambda key, floor: key.chunk_hash in stored, metrics)


def opening(
    first: int = 0, last: int = 3, *, layers: int = LAYERS, quality: Quality = Quality.HIGH, part: int = 0
) -> LiveOpening:  # fmt: skip
    return LiveOpening(NAMESPACE, part, HASHES[first:last], layers, quality, Quality.RAW)


def asked(count: int = 3, stored: int = 0, *, floor: Quality = Quality.LOW, part: int = 0) -> Asked:
    return Asked(NAMESPACE, part, HASHES[:count], stored, floor)


def layer_bytes(layer: int, lengths: Sequence[int]) -> bytes:
    return b"".join(bytes([16 * layer + index + 1]) * length for index, length in enumerate(lengths))


def pieces(layer: int, lengths: Sequence[int], size: int = 5) -> list[Piece]:
    whole = layer_bytes(layer, lengths)
    return [
        Piece(layer, offset, tuple(lengths) if not offset else (), whole[offset : offset + size])
        for offset in range(0, len(whole), size)
    ]


def write_all(write: LiveWrite, lengths: Sequence[int] = (3, 4, 5)) -> None:
    for layer in range(write.opening.layers):
        for piece in pieces(layer, lengths):
            write.add(piece)


@dataclass
class Reader:
    """One that takes what comes, and what it makes of it."""

    chunks: int
    layers: dict[int, bytearray] = field(default_factory=dict)
    lengths: dict[int, Sequence[int]] = field(default_factory=dict)
    ended: bool = False

    async def run(self, write: LiveWrite) -> None:
        with write.kept():
            async for piece in write.follow(self.chunks):
                got = self.layers.setdefault(piece.layer, bytearray())
                assert piece.offset == len(got)
                assert bool(piece.object_bytes) == (not got)
                if piece.object_bytes:
                    self.lengths[piece.layer] = piece.object_bytes
                got += piece.data
        self.ended = True


lengths = st.lists(st.integers(1, 12), min_size=3, max_size=3)
actions = st.lists(
    st.one_of(
        st.just("write"), st.just("write"), st.just("write"), st.just("turn"), st.just("leave"),
        st.integers(1, 3),  # a reader of so many chunks joins
    ),
    max_size=40,
)  # fmt: skip


@given(
    by_layer=st.lists(lengths, min_size=LAYERS, max_size=LAYERS), size=st.integers(1, 12), steps=actions,
    dies=st.booleans(),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
async def test_every_reader_gets_a_prefix_of_the_layers_and_an_end(
    by_layer: list[list[int]], size: int, steps: list[Any], dies: bool
) -> None:
    budget = Budget()
    writes = registry(budget)
    write = writes.open(opening())
    todo = [piece for layer, each in enumerate(by_layer) for piece in pieces(layer, each, size)]
    sent: list[Piece] = []
    readers: list[tuple[Reader, asyncio.Task[None]]] = []
    for step in [*steps, *([] if dies else ["write"] * len(todo))]:
        if step == "write" and todo:
            sent.append(todo.pop(0))
            write.add(sent[-1])
        elif step == "turn":
            await asyncio.sleep(0)
        elif step == "leave" and readers:
            _, task = readers.pop(0)
            task.cancel()
            await asyncio.wait([task])
        elif isinstance(step, int):
            found = await writes.find(asked(), 0)
            assert isinstance(found, Found)
            assert (found.write, found.first_chunk, found.chunks) == (write, 0, 3)
            reader = Reader(step)
            readers.append((reader, asyncio.create_task(reader.run(write))))
            await asyncio.sleep(0)
    assert write.complete == (not todo)
    writes.close(write)
    assert await writes.find(asked(), 0) is None
    for reader, task in readers:
        await asyncio.wait_for(task, 5)
        for layer, each in enumerate(by_layer):
            came = b"".join(piece.data for piece in sent if piece.layer == layer)
            expected = came[: sum(each[: reader.chunks])]
            assert bytes(reader.layers.get(layer, b"")) == expected
            assert not expected or list(reader.lengths[layer]) == each[: reader.chunks]
    assert budget.free_bytes == ROOMY, "nothing is held for nobody"


async def test_a_reader_keeps_what_a_writer_that_is_gone_has_written() -> None:
    budget = Budget()
    writes = registry(budget)
    write = writes.open(opening())
    write_all(write)
    reader = Reader(2)
    with write.kept():
        writes.close(write)
        assert budget.free_bytes < ROOMY
        await reader.run(write)
    assert reader.layers[LAYERS - 1] == layer_bytes(LAYERS - 1, (3, 4))
    assert budget.free_bytes == ROOMY


async def test_a_reader_that_waits_finds_the_writer_that_comes() -> None:
    writes = registry()
    waiting = asyncio.create_task(writes.find(asked(), 30))
    await asyncio.sleep(0)
    other = writes.open(opening(part=1))
    worse = writes.open(opening(quality=Quality.LOW))
    await asyncio.sleep(0)
    assert isinstance(await writes.find(asked(), 0), Found)
    assert await writes.find(asked(floor=Quality.HIGH), 0) is None
    found = await asyncio.wait_for(waiting, 5)
    assert isinstance(found, Found)
    assert found.write is worse
    for write in (other, worse):
        writes.close(write)
    assert len(writes) == 0


async def test_of_several_writers_the_one_that_comes_furthest_is_followed() -> None:
    writes = registry()
    short, whole, behind = writes.open(opening(0, 2)), writes.open(opening(0, 4)), writes.open(opening(2, 4))
    beyond = writes.open(opening(5, 8))

    async def follows(count: int, stored: int) -> tuple[LiveWrite, int, int] | None:
        found = await writes.find(asked(count, stored), 0)
        return (found.write, found.first_chunk, found.chunks) if isinstance(found, Found) else None

    assert await follows(2, 0) == (short, 0, 2)
    assert await follows(8, 0) == (whole, 0, 4)
    assert await follows(8, 2) == (behind, 2, 2)  # as far, and repeats nothing
    assert await follows(8, 4) is None  # a gap between what is stored and what is written
    assert await follows(8, 5) == (beyond, 5, 3)
    assert await follows(3, 1) == (whole, 0, 3)


async def test_nobody_waits_beyond_the_wait_or_for_a_node_that_stops() -> None:
    writes = registry()
    assert await asyncio.wait_for(writes.find(asked(), 0.02), 5) is None
    waiting = asyncio.create_task(writes.find(asked(), 600))
    await asyncio.sleep(0)
    writes.stop_waiting()
    assert await asyncio.wait_for(waiting, 5) is None


@pytest.mark.parametrize(
    "wrong",
    [
        Piece(1, 0, (3, 4, 5), b"abc"),  # not its layer's turn
        Piece(0, 1, (3, 4, 5), b"abc"),
        Piece(0, 0, (), b"abc"),
        Piece(0, 0, (3, 4), b"abc"),
        Piece(0, 0, (3, 0, 5), b"abc"),
        Piece(0, 0, (1, 1, 1), b"abcd"),  # longer than declared
    ],
)  # fmt: skip
async def test_pieces_out_of_place_are_refused(wrong: Piece) -> None:
    write = registry().open(opening())
    with pytest.raises(InvalidRequest):
        write.add(wrong)


async def test_pieces_after_the_first_continue_it_and_nothing_follows_the_last_layer() -> None:
    write = registry().open(opening(layers=1))
    write.add(Piece(0, 0, (3, 4, 5), b"abc"))
    for wrong in (Piece(0, 3, (3, 4, 5), b"d"), Piece(0, 4, (), b"d"), Piece(1, 3, (), b"d")):
        with pytest.raises(InvalidRequest):
            write.add(wrong)
    write.add(Piece(0, 3, (), b"defghijkl"))
    assert write.complete
    with pytest.raises(InvalidRequest):
        write.add(Piece(1, 0, (1, 1, 1), b"abc"))


async def test_a_write_beyond_the_room_in_flight_is_refused_and_gives_it_back() -> None:
    budget = Budget(4000)
    writes = registry(budget)
    write = writes.open(opening())
    with pytest.raises(TierFull):
        write_all(write, (500, 500, 500))
    writes.close(write)
    assert budget.free_bytes == 4000
    budget.free_bytes = 100
    with pytest.raises(TierFull):
        writes.open(opening())
    assert budget.free_bytes == 100
    assert len(writes) == 0


async def test_a_put_ends_the_wait_of_those_who_ask_for_its_chunks(tmp_path: Any) -> None:
    stored = chunks(LAYOUT, 2, seed=1)
    hashes = [chunk.hash for chunk in stored]
    async with opened(config(None)) as node:
        waiting = asyncio.create_task(node.live.find(Asked(LAYOUT.namespace_id, 0, hashes, 0, Quality.LOW), 30))
        too_good = Asked(LAYOUT.namespace_id, 0, hashes, 0, Quality.RAW)
        await put(node, stored[:1])
        assert await asyncio.wait_for(waiting, 5) == "stored"
        assert await node.live.find(too_good, 0) == "stored"
        assert await node.live.find(Asked(LAYOUT.namespace_id, 0, hashes, 1, Quality.LOW), 0) is None
        live = node.live.open(LiveOpening(LAYOUT.namespace_id, 0, hashes[1:], 1, Quality.RAW, Quality.RAW))
        live.add(Piece(0, 0, (7,), b"1234567"))
        assert node.stat().staged_bytes > 7
        node.live.close(live)  # `opened` sees that nothing stays reserved
