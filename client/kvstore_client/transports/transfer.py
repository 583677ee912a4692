"""Fetch and put by the best way there is: the bulk path, and gRPC where that cannot be had or breaks before it has
brought anything."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import TypeVar

from kvstore_client.connection import Node, failures, timeout_s
from kvstore_client.deadline import Deadline
from kvstore_client.errors import KvClientError, Unavailable
from kvstore_client.transports import grpc_fetch
from kvstore_client.transports.blob import Blob
from kvstore_client.transports.bulk_connection import BulkConnection
from kvstore_client.transports.bulk_path import result_of
from kvstore_client.transports.put_stream import PutStream, put_stream
from kvstore_client.transports.wanted import Wants
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import DATA_BYTES_MAX, Framed

R = TypeVar("R")
RECEIVED_AHEAD = 4  # objects in buffers, received and not done with


class Fetch:
    """One fetch. Iterate `objects`, then `confirm`, and `aclose` in any case."""

    def __init__(
        self, node: Node, wanted: Wants, lease_id: bytes, deadline: Deadline, count_received: Callable[[int], None],
        begun_anew: Callable[[], None] = lambda: None, taken_by: Deadline | None = None,
    ) -> None:  # fmt: skip
        """`begun_anew`: called where the request is made again, by another way. `taken_by`: when there is to be a
        connection, where that is not worth all of the deadline."""
        self._node, self._wanted, self._lease_id, self._deadline = node, wanted, lease_id, deadline
        self._taken_by = taken_by or deadline
        self._buffers, self._count_received = node.bulk.buffers, count_received
        self._begun_anew = begun_anew
        self._in_place: BulkConnection | None = None
        self._is_owed = False  # a confirmation

    async def objects(self) -> AsyncGenerator[Blob, None]:
        """Whole objects in the order of the chunks wanted, possibly fewer; one at a time is to be taken, `done` with
        earlier ones may come later. Raises the typed error of what went wrong."""
        connection = await self._node.bulk.take(self._taken_by)
        came = False
        if connection is not None:
            try:
                async with aclosing(self._bulk_objects(connection)) as objects:
                    async for blob in objects:
                        came = True
                        yield blob
                return
            except Unavailable:  # such as a connection to a node that was started anew since
                if came:
                    raise
                self._begun_anew()
        over_grpc = grpc_fetch.objects(
            self._node, self._wanted, self._lease_id, self._deadline, self._buffers, self._count_received
        )
        async with aclosing(over_grpc):
            async for blob in over_grpc:
                yield blob

    async def confirm(self) -> None:
        """Raises the error of objects that were read in place and may have changed meanwhile."""
        if not self._is_owed:
            return
        if self._in_place is None:
            raise Unavailable("the bulk connection ended while its objects were read", node=self._node.address)
        connection, self._in_place = self._in_place, None
        path = self._node.bulk
        try:
            await path.run(connection, lambda: connection.release(self._deadline), self._deadline)
        except KvClientError as error:
            connection.close()
            path.failed(error)
            raise
        except BaseException:
            connection.close()
            raise
        path.ready.give_back(connection)

    async def aclose(self) -> None:
        if self._in_place is not None:
            self._in_place.close()
            self._in_place = None

    async def _bulk_objects(self, connection: BulkConnection) -> AsyncGenerator[Blob, None]:
        """A thread receives; this hands on."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Blob | None] = asyncio.Queue()
        ahead = threading.Semaphore(RECEIVED_AHEAD)

        def hand_over(blob: Blob) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, blob)

        def receive() -> bool:
            return connection.fetch(
                self._wanted, self._lease_id, self._deadline, self._buffers, ahead, hand_over, self._count_received
            )

        path = self._node.bulk
        receiving = path.start(connection, receive, self._deadline)
        receiving.add_done_callback(lambda _: arrived.put_nowait(None))
        try:
            while (blob := await arrived.get()) is not None:
                self._is_owed |= blob.in_place
                yield blob
            result_of(receiving, self._node.address)
        except KvClientError as error:
            path.failed(error)
            raise
        finally:
            if not receiving.done():  # nobody wants the rest; but what was read in place is to be confirmed behind it
                ahead.release(len(self._wanted.chunks))
                if not self._is_owed:
                    connection.shutdown()
                await asyncio.wait([receiving])
            if receiving.cancelled() or receiving.exception() is not None:
                connection.close()
            elif self._is_owed:
                self._in_place = connection
            else:
                path.ready.give_back(connection)


class Put:
    """One put: `offer`, `send` what is wanted, `commit`; `aclose` in any case. All raise the typed error of what went
    wrong."""

    def __init__(self, node: Node, deadline: Deadline, count_sent: Callable[[int], None]) -> None:
        self._node, self._deadline, self._count_sent = node, deadline, count_sent
        self._connection: BulkConnection | None = None
        self._stack = AsyncExitStack()
        self._stream: PutStream | None = None

    async def offer(self, offer: pb.PutOffer) -> pb.PutVerdicts:
        self._connection = await self._node.bulk.take(self._deadline)
        if self._connection is not None:
            try:
                return (await self._run(lambda connection: connection.offer(offer, self._deadline))).verdicts
            except Unavailable:  # such as a connection to a node that was started anew since
                pass
        async with failures(self._node):
            self._stream = await self._stack.enter_async_context(put_stream(self._node, timeout_s(self._deadline)))
            await self._stream.write(Framed(pb.PutRequest(offer=offer)))
            return (await self._stream.answer("verdicts")).verdicts

    async def send(self, objects: Sequence[tuple[int, bytes | memoryview]]) -> None:
        """(index in the offer, the object), in the order of the offer."""
        if self._stream is None:
            await self._run(lambda connection: connection.send(objects, self._deadline, self._count_sent))
            return
        async with failures(self._node):
            for index, blob in objects:
                view = memoryview(blob)
                for offset in range(0, len(blob), DATA_BYTES_MAX):
                    piece = view[offset : offset + DATA_BYTES_MAX]
                    await self._stream.write(Framed(pb.PutRequest(object_index=index, offset=offset), piece))
                    self._count_sent(len(piece))

    async def commit(self) -> pb.PutResults:
        if self._stream is None:
            answer = await self._run(lambda connection: connection.commit(self._deadline))
            connection, self._connection = self._connection, None
            assert connection is not None, "it has just answered"
            self._node.bulk.ready.give_back(connection)
            return answer.results
        async with failures(self._node):
            await self._stream.write(Framed(pb.PutRequest(commit=pb.PutCommit())))
            await self._stream.done_writing()
            results = (await self._stream.answer("results")).results
            await self._stream.settle()
            return results

    async def aclose(self) -> None:
        """A put that is not committed leaves nothing behind."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        await self._stack.aclose()

    async def _run(self, call: Callable[[BulkConnection], R]) -> R:
        connection = self._connection
        assert connection is not None, "it was opened by `offer`"
        try:
            return await self._node.bulk.run(connection, lambda: call(connection), self._deadline)
        except KvClientError as error:
            self._node.bulk.failed(error)
            self._connection = None
            connection.close()
            raise
