"""The put of a gRPC stream on a real node, with a scripted peer: what happens while a piece is being copied."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import kv_objects as kv
import pytest
from engine_node import config, filled, opened, read
from polling import wait_until
from prometheus_client import CollectorRegistry

import kvstore.service.put
import kvstore_codec as codec
from kvstore.engine.commit import Arrival
from kvstore.engine.node import Node
from kvstore.engine.stage import Checked
from kvstore.service.streams import StreamMetrics
from kvstore.tiers.allocator import aligned
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import DATA_BYTES_MAX, Framed

WIDE = kv.small_layout("wide", layers=64, head_dim=256)  # objects over 1 MiB: several messages each
A, B = (kv.chunks(WIDE, 2, seed=seed) for seed in (1, 2))
PLACE = aligned(len(A[0].blob))


class ScriptedPeer:
    """Stands where gRPC's context does: hands out what a client sends, keeps what it is answered."""

    def __init__(self, chunks: Sequence[kv.StoredChunk], layout: codec.KVLayout = WIDE) -> None:
        self._messages = self._script(chunks, layout)
        self.answers: list[pb.PutResponse] = []

    async def read(self) -> Framed[pb.PutRequest]:
        await asyncio.sleep(0)  # as a socket would
        return next(self._messages)

    async def write(self, answer: pb.PutResponse) -> None:
        self.answers.append(answer)

    @staticmethod
    def _script(chunks: Sequence[kv.StoredChunk], layout: codec.KVLayout) -> Iterator[Framed[pb.PutRequest]]:
        yield Framed(kv.put_offer(layout, [chunk.offer() for chunk in chunks]))
        for index, chunk in enumerate(chunks):
            for offset in range(0, len(chunk.blob), DATA_BYTES_MAX):
                piece = memoryview(chunk.blob)[offset : offset + DATA_BYTES_MAX]
                yield Framed(pb.PutRequest(object_index=index, offset=offset), piece)
        yield Framed(pb.PutRequest(commit=pb.PutCommit()))


class HeldCopies:
    """Lets each copy of a piece begin, and go on when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.may_go_on = threading.Event(), threading.Event()
        self.errors: list[str] = []
        self._copy = kvstore.service.put._copy
        monkeypatch.setattr(kvstore.service.put, "_copy", self.copy)

    def copy(self, room: memoryview, data: memoryview | bytes, arrival: Arrival, end: int) -> Checked | None:
        self.begun.set()
        assert self.may_go_on.wait(30.0)
        try:
            return self._copy(room, data, arrival, end)
        except ValueError as error:  # of memory that is not there any more
            self.errors.append(str(error))
            raise


def putting(node: Node, peer: Any) -> asyncio.Task[None]:
    metrics = StreamMetrics(CollectorRegistry())
    return asyncio.create_task(kvstore.service.put.put(node, peer, stream_idle_s=30.0, metrics=metrics))


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldCopies]:
    held = HeldCopies(monkeypatch)
    yield held
    held.may_go_on.set()


async def test_lookups_are_answered_while_a_piece_is_copied(copies: HeldCopies) -> None:
    async with opened(config(None, host=8 * PLACE)) as node:
        peer = ScriptedPeer(A)
        task = putting(node, peer)
        await asyncio.to_thread(copies.begun.wait, 30.0)
        assert len(node.lookup(WIDE.namespace_id, [A[0].hash], 0, 0)) == 0
        assert not task.done()
        copies.may_go_on.set()
        await task
        assert [result.outcome for result in peer.answers[-1].results.results] == [pb.OUTCOME_STORED] * 2
        assert [await read(node, chunk, WIDE) for chunk in A] == [chunk.blob for chunk in A]


async def test_a_piece_that_is_still_copied_when_its_put_is_cut_off_hits_nothing_else(copies: HeldCopies) -> None:
    async with opened(config(None, host=3 * PLACE)) as node:  # not enough for both: what is free is taken again
        cut_off = putting(node, ScriptedPeer(A))
        await asyncio.to_thread(copies.begun.wait, 30.0)
        cut_off.cancel()
        await asyncio.wait([cut_off])
        assert cut_off.cancelled()
        assert (node.stat().staged_objects, node.stat().staged_bytes) == (0, 0)
        stage = filled(node, B, WIDE)
        copies.may_go_on.set()
        assert [result.outcome for result in await node.commit(stage, durable=False)] == ["stored"] * 2
        assert [await read(node, chunk, WIDE) for chunk in B] == [chunk.blob for chunk in B]
        assert len(node.lookup(WIDE.namespace_id, [A[0].hash], 0, 0)) == 0
        del cut_off
        await asyncio.to_thread(wait_until, lambda: node._holdings.host.waiting_bytes == 0, "the copy lets go")
        assert copies.errors == []


class FailingReaders:
    """In the place of the threads that check what nobody has checked yet."""

    def submit(self, *_: Any) -> None:
        raise AssertionError("an object is checked a second time, when all have come")


@pytest.mark.parametrize("layout", [WIDE, kv.small_layout("narrow")], ids=["by pieces", "small"])
async def test_what_came_is_checked_when_the_commit_comes(
    layout: codec.KVLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = kv.chunks(layout, 3, seed=3)
    bad = bytearray(chunks[1].blob)
    bad[-1] ^= 1
    sent = [chunks[0], dataclasses.replace(chunks[1], blob=bytes(bad)), chunks[2]]
    async with opened(config(None, host=8 * PLACE)) as node:
        monkeypatch.setattr(node._holdings, "_readers", FailingReaders())
        peer = ScriptedPeer(sent, layout)
        await putting(node, peer)
        results = peer.answers[-1].results.results
        assert [each.outcome for each in results] == [pb.OUTCOME_STORED, pb.OUTCOME_REJECTED, pb.OUTCOME_STORED]
        assert "checksum" in results[1].reason
        monkeypatch.undo()
        assert len(node.lookup(layout.namespace_id, [chunk.hash for chunk in chunks], 0, 0)) == 1
