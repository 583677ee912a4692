"""A put's stream where gRPC holds on to what it has begun to write, as it may while a peer that reads nothing more
still has its connection: puts were seen to end five seconds late, or to fail though they were stored, too rarely to be
had at will."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import pytest

from kvstore_client import DeadlineExceeded, ProtocolViolation
from kvstore_client.connection import Connections
from kvstore_client.transports.put_stream import PutStream
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import Framed


class HeldCall:
    """A call of gRPC's: what is written never leaves, and it ends with `status` when `end` is called. `answers`: what
    its peer has sent."""

    def __init__(
        self, status: grpc.StatusCode = grpc.StatusCode.DEADLINE_EXCEEDED, answers: Sequence[pb.PutResponse] = ()
    ) -> None:
        self._status, self._answers = status, list(answers)
        self._on_end: list[Callable[[Any], None]] = []
        self._ended = asyncio.Event()

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._on_end.append(callback)

    def end(self) -> None:
        self._ended.set()
        for callback in self._on_end:
            callback(self)

    def cancel(self) -> None:
        pass

    async def read(self) -> Any:
        if self._answers:
            return self._answers.pop(0)
        await self._ended.wait()
        return grpc.aio.EOF  # type: ignore[attr-defined]

    def time_remaining(self) -> float | None:
        return None

    async def write(self, message: object) -> None:
        await asyncio.Event().wait()

    async def done_writing(self) -> None:
        await asyncio.Event().wait()

    async def code(self) -> grpc.StatusCode:
        return self._status

    async def details(self) -> str:
        return ""


@pytest.mark.parametrize("send", ["write", "done_writing"])
async def test_what_is_being_sent_ends_with_its_call(send: str) -> None:
    connections, call = Connections(["127.0.0.1:1"]), HeldCall()
    stream = PutStream(connections.node("127.0.0.1:1"), call)
    sending = asyncio.ensure_future(
        stream.write(Framed(pb.PutRequest())) if send == "write" else stream.done_writing()
    )  # fmt: skip
    await asyncio.sleep(0.01)
    assert not sending.done()
    call.end()
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(sending, 10.0)
    stream.cancel()
    await connections.aclose()


async def test_a_call_that_ended_well_while_it_was_being_closed_has_been_answered() -> None:
    """Seen on a busy machine: the node's status came before the closing of our half of the call was through."""
    connections = Connections(["127.0.0.1:1"])
    call = HeldCall(grpc.StatusCode.OK, [pb.PutResponse(results=pb.PutResults(results=[pb.ObjectResult()]))])
    stream = PutStream(connections.node("127.0.0.1:1"), call)
    closing = asyncio.ensure_future(stream.done_writing())
    await asyncio.sleep(0.01)
    call.end()
    await asyncio.wait_for(closing, 10.0)
    assert len((await stream.answer("results")).results.results) == 1
    with pytest.raises(ProtocolViolation):
        await stream.answer("results")
    stream.cancel()
    await connections.aclose()


class BrokenCall(HeldCall):
    """At its deadline the write fails, and gRPC has no other status for it than its own."""

    async def write(self, message: object) -> None:
        self.end()
        raise grpc.aio.AioRpcError(
            grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), "Internal error from Core", None
        )

    def time_remaining(self) -> float:
        return 0.0

    async def details(self) -> str:
        return "Internal error from Core"


async def test_a_write_that_fails_at_the_deadline_is_late_and_no_fault_of_the_node() -> None:
    connections, call = Connections(["127.0.0.1:1"]), BrokenCall(grpc.StatusCode.INTERNAL)
    stream = PutStream(connections.node("127.0.0.1:1"), call)
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(stream.write(Framed(pb.PutRequest())), 10.0)
    stream.cancel()
    await connections.aclose()
