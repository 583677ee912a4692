"""The bulk path to one node: whether there is one, which way it goes, and the connections that are open.

It is found out in the background, on the first call and again a while after each failure; calls meanwhile, and wherever
there is none, go over gRPC.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Literal, TypeVar, cast, get_args

import grpc
import grpc.aio

from kvstore_client.deadline import Deadline
from kvstore_client.errors import DeadlineExceeded, InvalidArgument, KvClientError, Unavailable, from_status
from kvstore_client.tls import LoadedTLS
from kvstore_client.transports.blob import Buffers
from kvstore_client.transports.bulk_connection import ABSTRACT, BulkConnection, Memory
from kvstore_client.transports.ready import ReadyConnections
from kvstore_proto.v1 import transfer_pb2
from kvstore_proto.v1.bulk import VERSION
from kvstore_proto.v1.transfer_pb2_grpc import TransferStub

#: auto: the best that works; grpc: that alone; the others: that, or gRPC where it cannot be had.
Transport = Literal["auto", "grpc", "tcp", "unix", "shm"]
TRANSPORTS: tuple[str, ...] = get_args(Transport)
ATTEMPT_S = 2.0  # at finding a way
AGAIN_S = 5.0  # after which a way that failed is looked for again
ASK_AGAIN_S = 0.2  # after which a node that could not even be asked is asked again: it may be back
LATE_S = 0.01  # a thread that gives up by itself says why
R = TypeVar("R")


def checked_transport(transport: str) -> Transport:
    """Raises InvalidArgument."""
    if transport not in TRANSPORTS:
        raise InvalidArgument(f"no transport {transport!r}: use one of {', '.join(TRANSPORTS)}")
    return cast(Transport, transport)


class BulkPath:
    """Belongs to an event loop, but for `ready` and `buffers`. `executor`: threads that connections block, `gets`:
    those of whole gets, which may wait for what the others do; `ready`: connections in no use; `buffers`: what they
    receive into. `on_failure` is told of each failure. `tls`: of all TCP connections."""

    def __init__(
        self, seed: str, channel: grpc.aio.Channel, transport: Transport, executor: Executor, gets: Executor,
        on_failure: Callable[[KvClientError], None], tls: LoadedTLS | None,
    ) -> None:  # fmt: skip
        self.executor, self.gets, self.buffers, self.ready = executor, gets, Buffers(), ReadyConnections()
        self._seed, self._transport, self._on_failure, self._tls = seed, transport, on_failure, tls
        self._stub = TransferStub(channel)  # type: ignore[no-untyped-call]
        self._finding: asyncio.Task[None] | None = None
        self._address: str | None = None
        self._memory: Memory | None = None
        self._not_before = 0.0
        self._closed = False

    async def take(self, deadline: Deadline) -> BulkConnection | None:
        """A connection for one request, None where gRPC has to do. A transport that was asked for by name is waited
        for, at most half of the time that is left; the best of all is not."""
        if self._transport == "grpc" or self._closed:
            return None
        if (ready := self.ready.take()) is not None:
            return ready
        if self._address is not None:
            try:
                return await self._connect(self._address, deadline)
            except KvClientError as error:
                self.failed(error)
                return None
        if self._finding is None and time.monotonic() >= self._not_before:
            self._finding = asyncio.get_running_loop().create_task(self._find())
        if self._finding is not None and self._transport != "auto":
            await asyncio.wait([self._finding], timeout=deadline.share(2))
            return self.ready.take()
        return None

    def failed(self, error: KvClientError) -> None:
        """A connection broke or could not be had: the others are as old, and the node may be another one by now."""
        self._on_failure(error)
        self._address = None
        self._not_before = time.monotonic() + (0 if self._transport != "auto" else AGAIN_S)
        self.ready.clear()

    async def aclose(self) -> None:
        self._closed = True
        self.ready.close()
        if self._finding is not None:
            self._finding.cancel()
            await asyncio.wait([self._finding])

    def start(
        self, connection: BulkConnection, call: Callable[[], R], deadline: Deadline, executor: Executor | None = None
    ) -> asyncio.Future[R]:
        """A blocking call of `connection` on a thread. At the deadline it ends, or never begins (then the future is
        cancelled); it is not to be cancelled itself."""
        work = (executor or self.executor).submit(call)

        def give_up() -> None:
            if not work.cancel():
                connection.shutdown()

        future = asyncio.wrap_future(work)
        timer = asyncio.get_running_loop().call_later(deadline.remaining() + LATE_S, give_up)
        future.add_done_callback(lambda _: timer.cancel())
        return future

    async def run(self, connection: BulkConnection, call: Callable[[], R], deadline: Deadline) -> R:
        """The result of a blocking call of `connection`; nothing of it runs any more when this returns or raises."""
        running = self.start(connection, call, deadline)
        try:
            await asyncio.wait([running])
        finally:
            if not running.done():  # cancelled
                connection.shutdown()
                await asyncio.wait([running])
        return result_of(running, self._seed)

    async def _find(self) -> None:
        """Tries the node's ways, best first; the first that works is taken from now on."""
        deadline = Deadline(ATTEMPT_S)
        error: KvClientError | None = None
        again_s = ASK_AGAIN_S
        try:
            answer = await self._ask(deadline)
            again_s = AGAIN_S
            for address in (
                _in_order(answer.addresses, self._transport, self._seed) if answer.version == VERSION else ()
            ):
                try:
                    connection = await self._connect(address, deadline)
                except KvClientError as problem:
                    error = problem
                    continue
                self._address = address
                self.ready.give_back(connection)
                return
        except (Unavailable, DeadlineExceeded):
            pass  # nor can the calls of this moment reach the node, which count and say it
        except KvClientError as problem:
            error = problem
        finally:
            self._finding = None
            self._not_before = time.monotonic() + again_s
        if error is not None:
            self._on_failure(error)

    async def _connect(self, address: str, deadline: Deadline) -> BulkConnection:
        ticket = (await self._ask(deadline)).ticket
        shares = self._transport in ("auto", "shm") and address.startswith(("unix:", ABSTRACT))

        def connect() -> BulkConnection:
            connection = BulkConnection(self._seed, address, ticket, deadline, self._tls)
            if shares:
                try:
                    connection.share_memory(self._memory, deadline)
                except BaseException:
                    connection.close()
                    raise
            return connection

        connecting = asyncio.get_running_loop().run_in_executor(self.executor, connect)
        try:
            connection = await asyncio.wait_for(connecting, deadline.remaining() + LATE_S)
        except asyncio.TimeoutError:  # such as where no thread is free; a connection that comes late is dropped
            raise DeadlineExceeded("the node did not answer in time", node=self._seed) from None
        self._memory = connection.memory
        return connection

    async def _ask(self, deadline: Deadline) -> transfer_pb2.ConnectResponse:
        try:
            answer: transfer_pb2.ConnectResponse = await self._stub.Connect(
                transfer_pb2.ConnectRequest(version=VERSION), timeout=deadline.remaining()
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:  # a node of before there was such a path
                return transfer_pb2.ConnectResponse()
            raise from_status(error.code(), error.details(), self._seed) from None
        return answer


def result_of(ended: asyncio.Future[R], node: str) -> R:
    """Of a call that `start` began. Raises DeadlineExceeded where it had no turn."""
    if ended.cancelled():
        raise DeadlineExceeded("the call's deadline passed before it had its turn", node=node)
    return ended.result()


def _in_order(addresses: Sequence[str], transport: Transport, seed: str) -> list[str]:
    """Of a node's addresses those that the transport may take: this machine's first."""
    local = [address for address in addresses if address.startswith(("unix:", ABSTRACT))]
    if transport in ("unix", "shm"):
        return local
    host = seed.rpartition(":")[0] if not seed.startswith("unix:") else "127.0.0.1"
    remote = [
        f"{host}{address}" if address.startswith(":") else address for address in addresses if address not in local
    ]
    return remote if transport == "tcp" else [*local, *remote]
