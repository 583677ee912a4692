"""The client's connections: one channel a seed, made when first used; failed calls as typed errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import grpc
import grpc.aio

from kvstore_client.deadline import Deadline
from kvstore_client.errors import (
    DeadlineExceeded,
    KvClientError,
    ProtocolViolation,
    ServerFailed,
    Unavailable,
    from_status,
)  # fmt: skip
from kvstore_client.tls import TLS
from kvstore_client.transports.bulk_path import BulkPath, Transport
from kvstore_cluster.placement import rank
from kvstore_proto.v1.framing import CHANNEL_OPTIONS, FramedStoreStub
from kvstore_proto.v1.live_framing import FramedLiveStub

R = TypeVar("R")
TRANSFERS_MAX = 16  # under way at a time over bulk paths, each on its thread, and as many gets
#: For so long calls to a node may end unanswered at their deadlines before its connection is taken for dead. A peer
#: that was replaced without a word, or whose bytes came wrong, leaves one on which gRPC waits for a minute.
SILENT_S = 0.5
_CLOSING_S = 30.0  # for calls that are still under way on such a connection
#: What another node may do better: the caller's mistakes and the lies of a node are not among it.
_TRY_ELSEWHERE = (Unavailable, DeadlineExceeded, ServerFailed)
_OPTIONS = [
    *CHANNEL_OPTIONS,
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # another client's back-off is not ours
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),  # what an attempt may take, in fact
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Makes the kernel give up a connection whose peer has vanished without a word (TCP_USER_TIMEOUT); pings are rare.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 5_000),
]


@dataclass(frozen=True)
class _Connection:
    channel: grpc.aio.Channel
    bulk: BulkPath
    stub: FramedStoreStub
    live: FramedLiveStub
    made_s: float  # monotonic


class Node:
    """One seed, as the calls see it. Each call begins on the connection that there is by then: of a get or a stream
    that makes several, the second may come after the first one's connection was replaced."""

    def __init__(self, address: str, connect: Callable[[], _Connection]) -> None:
        self.address = address
        self._connect = connect
        self._connection = connect()

    @property
    def is_connected(self) -> bool:
        """As far as gRPC knows: a call begins with its request, not with a handshake."""
        return self._connection.channel.get_state() is grpc.ChannelConnectivity.READY

    @property
    def stub(self) -> FramedStoreStub:
        return self._connection.stub

    @property
    def bulk(self) -> BulkPath:
        return self._connection.bulk

    @property
    def live(self) -> FramedLiveStub:
        return self._connection.live

    def replaced(self, silent_since_s: float) -> _Connection | None:
        """Replaces a connection that was made before `silent_since_s` and is up, as far as gRPC knows; returns that
        one."""
        silent = self._connection
        if silent.made_s > silent_since_s or silent.channel.get_state() is not grpc.ChannelConnectivity.READY:
            return None
        self._connection = self._connect()
        return silent

    async def aclose(self) -> None:
        await self._connection.bulk.aclose()
        await self._connection.channel.close(None)


class Connections:
    """`transport`: which way objects go. `on_failure` is told (node, error) where its bulk path cannot be had. `tls`:
    to all seeds that are no unix sockets; its files are read now, which may raise InvalidArgument."""

    def __init__(
        self, seeds: Sequence[str], transport: Transport = "grpc",
        on_failure: Callable[[str, KvClientError], None] = lambda node, error: None, tls: TLS | None = None,
    ) -> None:  # fmt: skip
        self._seeds = tuple(seeds)
        self._transport, self._on_failure = transport, on_failure
        self._tls = None if tls is None else tls.load()
        # They start no thread before they have work.
        self._executor = ThreadPoolExecutor(TRANSFERS_MAX, "kvstore-transfer")
        self._gets = ThreadPoolExecutor(TRANSFERS_MAX, "kvstore-get")
        self._nodes: dict[str, Node] = {}
        self._unanswered_since_s: dict[str, float] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def seeds(self) -> tuple[str, ...]:
        return self._seeds

    def node(self, seed: str) -> Node:
        """Connects in the background; a call meanwhile waits no longer than its own timeout. Raises Unavailable once
        closed."""
        if self._closed:
            raise _closed_meanwhile(seed)
        if seed not in self._nodes:
            self._nodes[seed] = Node(seed, partial(self._connect, seed))
        return self._nodes[seed]

    def known(self, key: bytes) -> list[Node | None]:
        """As `ranked`; None where no call has gone yet. Any thread may ask."""
        return [self._nodes.get(seed) for seed in rank(self._seeds, key)]

    def _connect(self, seed: str) -> _Connection:
        channel = self._channel(seed)
        bulk = BulkPath(
            seed, channel, self._transport, self._executor, self._gets, partial(self._on_failure, seed), self._tls
        )  # fmt: skip
        return _Connection(channel, bulk, FramedStoreStub(channel), FramedLiveStub(channel), time.monotonic())

    def _channel(self, seed: str) -> grpc.aio.Channel:
        if self._tls is None or seed.startswith("unix:"):
            return grpc.aio.insecure_channel(seed, options=_OPTIONS)
        return grpc.aio.secure_channel(seed, self._tls.credentials, options=[*_OPTIONS, *self._tls.options])

    def ranked(self, key: bytes) -> Iterator[Node]:
        """The seeds, best for `key` first."""
        return (self.node(seed) for seed in rank(self._seeds, key))

    def answered(self, node: Node) -> None:
        """A call to `node` came to an end other than its deadline."""
        self._unanswered_since_s.pop(node.address, None)

    def unanswered(self, node: Node, began_s: float) -> None:
        """A call to `node` that began at `began_s` (monotonic) ended at its deadline. After SILENT_S of these, the next
        call gets a connection of its own; where none is there yet, gRPC looks after that itself."""
        since_s = self._unanswered_since_s.setdefault(node.address, began_s)
        if self._closed or time.monotonic() - since_s < SILENT_S:
            return
        self.answered(node)
        silent = node.replaced(since_s)
        if silent is not None:
            closing = asyncio.get_running_loop().create_task(_closed(silent))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def aclose(self) -> None:
        self._closed = True
        for closing in self._closing:
            closing.cancel()
        nodes = list(self._nodes.values())
        self._nodes = {}
        await asyncio.gather(*(node.aclose() for node in nodes))
        self._executor.shutdown(wait=False)
        self._gets.shutdown(wait=False)


async def _closed(silent: _Connection) -> None:
    await silent.bulk.aclose()
    try:
        await silent.channel.close(_CLOSING_S)
    except asyncio.CancelledError:  # the client is closed, and waits for nobody
        await silent.channel.close(None)
        raise


def worth_another_node(error: KvClientError) -> bool:
    return isinstance(error, _TRY_ELSEWHERE)


@asynccontextmanager
async def failures(node: Node) -> AsyncIterator[None]:
    """Raises the typed error of a gRPC call that fails inside, also by the client's own aclose()."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_status(error.code(), error.details(), node.address) from None
    except grpc.aio.UsageError:  # its channel was closed before it began
        raise _closed_meanwhile(node.address) from None
    except asyncio.CancelledError:
        if _is_cancelled():
            raise
        raise _closed_meanwhile(node.address) from None  # by gRPC, which cancels the calls of a closed channel


def understood(node: Node, message: R | None) -> R:
    """`message`; raises ProtocolViolation for None, which gRPC hands out for bytes that are no such message."""
    if message is None:
        raise ProtocolViolation("the node's answer is not what the protocol says", node=node.address)
    return message


def timeout_s(deadline: Deadline, attempts: int = 1) -> float:
    """What one of `attempts` more attempts may take. Raises DeadlineExceeded when nothing is left."""
    seconds = deadline.share(attempts)
    if seconds <= 0:
        raise DeadlineExceeded("the call's deadline passed", seconds=deadline.seconds)
    return seconds


def _closed_meanwhile(address: str) -> Unavailable:
    return Unavailable("the client was closed during the call", node=address)


def _is_cancelled() -> bool:
    """Whether someone cancelled the running task. Before Python 3.11 nobody can tell, and the cancellation stands."""
    task = asyncio.current_task()
    cancelling = getattr(task, "cancelling", None)
    return cancelling is None or cancelling() > 0
