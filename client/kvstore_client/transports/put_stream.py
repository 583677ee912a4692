"""The stream of one put, with its errors as they are.

gRPC says no more than "internal error" of a write to a call that has ended, and lets that hide the status that ended
it. So the node's next message is always being read ahead, without which no status arrives, and the first status that
is not of gRPC's making is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import grpc
import grpc.aio

from kvstore_client.connection import Node, failures, understood
from kvstore_client.errors import KvClientError, ProtocolViolation, from_status
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import Framed

#: What gRPC's Python layer says of a write that failed; never a node's own words.
_WRITE_FAILED = "Internal error from Core"
_SETTLE_S = 0.2  # for the status to follow the failed write, or the last answer
R = TypeVar("R")


@asynccontextmanager
async def put_stream(node: Node, timeout_s: float) -> AsyncIterator[PutStream]:
    """Raises the typed error of the call. Leaves nothing running, however it is left."""
    async with failures(node):
        stream = PutStream(node, node.stub.Put(timeout=timeout_s))
        try:
            yield stream
        finally:
            stream.cancel()


class PutStream:
    """Also of a live write (writing.py), which is such a call of other messages."""

    def __init__(self, node: Node, call: Any) -> None:
        self._node, self._call = node, call
        self._status: asyncio.Future[tuple[grpc.StatusCode, str | None]] = asyncio.get_running_loop().create_future()
        call.add_done_callback(self._note_status)
        self._ahead: asyncio.Future[Any] = asyncio.ensure_future(call.read())

    async def write(self, message: Framed[Any]) -> None:
        try:
            await self._while_it_lasts(self._call.write(message))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await self._ended_by() from None

    async def done_writing(self) -> None:
        await self._while_it_lasts(self._call.done_writing())

    async def answer(self, kind: str) -> pb.PutResponse:
        """The node's next message, which must be of this kind. Raises ProtocolViolation or the call's error."""
        try:
            response = await self._ahead
        except grpc.aio.AioRpcError:
            raise await self._ended_by() from None
        if response is grpc.aio.EOF:  # type: ignore[attr-defined]
            raise await self._ended_by()
        answer: pb.PutResponse = understood(self._node, response)
        if answer.WhichOneof("kind") != kind:
            raise ProtocolViolation("a put was answered out of place", node=self._node.address, expected=kind)
        self._ahead = asyncio.ensure_future(self._call.read())
        return answer

    async def settle(self) -> None:
        """Lets the call end by itself after the last answer: its status is a moment away.

        Each call that is cancelled before it costs the node, and this process, some hundred bytes for good (gRPC's
        issue 43360)."""
        await asyncio.wait([self._ahead], timeout=_SETTLE_S)  # or up to the call's deadline, which ends it too

    def cancel(self) -> None:
        self._call.cancel()
        self._ahead.cancel()
        self._ahead.add_done_callback(_seen)

    async def _while_it_lasts(self, sending: Coroutine[Any, Any, None]) -> None:
        """Sends. Raises the call's error as soon as it has ended: gRPC itself lets go of what it is sending only when
        the connection takes it or is given up, seconds later where the peer reads nothing more.

        A call that ended well is no error here: a node that has the commit answers and ends it, on a busy machine
        before our half of it is closed. Whether it has answered all, `answer` tells."""
        task = asyncio.ensure_future(sending)
        task.add_done_callback(_seen)  # where nobody waits for it any more
        try:
            ends: list[asyncio.Future[Any]] = [task, self._status]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
        if task.done():
            task.result()
            return
        status, details = self._status.result()
        if status is not grpc.StatusCode.OK:
            raise from_status(status, details, self._node.address)

    async def _ended_by(self) -> KvClientError:
        """The error of a call that has ended."""
        with suppress(grpc.aio.AioRpcError):
            while await self._ahead is not grpc.aio.EOF:  # type: ignore[attr-defined]
                self._ahead = asyncio.ensure_future(self._call.read())  # the status comes behind all that was sent
        left_s = self._call.time_remaining()
        await asyncio.wait([self._status], timeout=_SETTLE_S if left_s is None else min(_SETTLE_S, left_s))
        if self._status.done():
            return from_status(*self._status.result(), self._node.address)
        if self._call.time_remaining() == 0:  # what ended it, whatever the write says
            return from_status(grpc.StatusCode.DEADLINE_EXCEEDED, None, self._node.address)
        return from_status(await self._call.code(), await self._call.details(), self._node.address)

    def _note_status(self, call: Any) -> None:
        """Called whenever gRPC sets the call's status, which it does twice where a write fails, in any order."""
        status, details = _at_once(call.code()), _at_once(call.details())
        if details != _WRITE_FAILED and not self._status.done():
            self._status.set_result((status, details))


def _at_once(coroutine: Coroutine[Any, Any, R]) -> R:
    """The result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: R = stop.value
        return result
    raise AssertionError("the call has no status yet")


def _seen(read: asyncio.Future[Any]) -> None:
    if not read.cancelled():
        read.exception()
