"""One node upstream, over gRPC, and whether it is there.

A node that fails once is not asked again until it is found: a connection of its own, made anew for each try, is asked
twice a second at least, so that a node that hangs costs its callers one timeout, and one that is back is used soon
after, whatever became of the old connection.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import grpc

from kvstore.engine.outside import Chain, FoundChunk, PutObject, Sent
from kvstore.metrics import NodeMetrics
from kvstore_client.circuit import Circuit, State
from kvstore_client.connection import Connections, Node, failures, understood, worth_another_node
from kvstore_client.errors import DeadlineExceeded, InvalidArgument, KvClientError, ProtocolViolation
from kvstore_client.tls import TLS
from kvstore_client.transports.put_stream import PutStream, put_stream
from kvstore_codec import Quality
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import DATA_BYTES_MAX, Framed

log = logging.getLogger(__name__)

FAILURES_MAX = 1  # in a row
PAUSE_S_MAX = 0.5  # between tries to find a node again
TICK_S = 0.1
TRY_S = 1.0
STREAM_S_MAX = 60.0  # a fetch or put as a whole, however slowly it goes on
FETCH_PATIENCE = 2  # timeouts without a piece: it may come from the node's disk
WRITE_PATIENCE_S = 5.0  # without progress: a put or delete waits for the node's own tiers
TOKENS_MAX = 2048  # of a chunk
_QUALITIES = frozenset(Quality)
_VERDICTS = {pb.VERDICT_SEND, pb.VERDICT_HAVE, pb.VERDICT_REFUSED}
_OUTCOMES: Mapping[int, Sent] = {pb.OUTCOME_STORED: "stored", pb.OUTCOME_HAVE: "have", pb.OUTCOME_REJECTED: "rejected"}
R = TypeVar("R")


class Peer(Protocol):
    """A node upstream, however it is reached. Calls raise KvClientError, each counted before it is raised."""

    address: str

    @property
    def state(self) -> State:
        """Of its circuit: it is asked while that is closed."""

    def start(self) -> None: ...

    async def lookup(self, chain: Chain, lease_ms: int, timeout_s: float) -> list[FoundChunk]: ...

    def fetch(self, chain: Chain, quality: Quality) -> AsyncGenerator[memoryview, None]:
        """Objects as they were sent, in order: whole, but not verified."""

    async def put(self, objects: Sequence[PutObject]) -> list[Sent]:
        """Of objects of one chain, in its order: "stored", "have" or "rejected"."""

    async def delete(self, namespace_id: bytes, hashes: Sequence[bytes], part: int) -> None:
        """No hashes: the whole namespace."""

    async def aclose(self) -> None: ...


class GrpcPeer:
    """`timeout_s`: as of upstream_timeout_ms. `object_bytes_max`: more is not taken from it. `tls`: its files are read
    with every try to find the node again. Raises InvalidArgument where they cannot be used."""

    def __init__(
        self, address: str, metrics: NodeMetrics, *, timeout_s: float, object_bytes_max: int,
        clock: Callable[[], float], rng: random.Random, tls: TLS | None = None,
    ) -> None:  # fmt: skip
        self.address = address
        self._metrics, self._timeout_s, self._object_bytes_max = metrics, timeout_s, object_bytes_max
        self._circuit = Circuit(clock, rng, FAILURES_MAX, PAUSE_S_MAX)
        self._tls = tls
        self._connections = Connections((address,), tls=tls)
        self._warming: asyncio.Task[bool] | None = None
        self._search: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        return self._circuit.state

    def start(self) -> None:
        """Connects before the first call needs it."""
        self._warming = asyncio.get_running_loop().create_task(_answers(self._connections.node(self.address)))

    async def lookup(self, chain: Chain, lease_ms: int, timeout_s: float) -> list[FoundChunk]:
        request = pb.LookupRequest(
            namespace_id=chain.namespace_id, chunk_hashes=b"".join(chain.hashes), part=chain.part, lease_ms=lease_ms,
            first_chunk_hash=chain.first,
        )  # fmt: skip
        async with self._call("lookup") as node:
            answer = understood(node, await node.stub.Lookup(request, timeout=timeout_s))
            columns = (answer.tokens, answer.quality, answer.provenance, answer.stored_bytes)
            found = [FoundChunk(*values, "upstream") for values in zip(*columns, strict=False)]
            sane = (
                all(len(column) == len(found) <= len(chain) for column in columns)
                and all(0 < each.tokens <= TOKENS_MAX and each.stored_bytes > 0 for each in found)
                and all(_QUALITIES.issuperset((each.quality, each.provenance)) for each in found)
            )
            _check(node, sane, "a lookup answered impossible chunks")
        fits = [each.stored_bytes <= self._object_bytes_max for each in found]
        return found[: fits.index(False)] if False in fits else found

    async def fetch(self, chain: Chain, quality: Quality) -> AsyncGenerator[memoryview, None]:
        request = pb.FetchRequest(
            namespace_id=chain.namespace_id, chunk_hashes=b"".join(chain.hashes), part=chain.part, quality=quality,
            first_chunk_hash=chain.first,
        )  # fmt: skip
        async with self._call("fetch") as node:
            call = node.stub.Fetch(request, timeout=STREAM_S_MAX)
            try:
                for at in range(len(chain)):
                    data = await self._object(node, call, at)
                    if data is None:
                        return
                    yield data
            finally:
                call.cancel()

    async def put(self, objects: Sequence[PutObject]) -> list[Sent]:
        async with self._call("put") as node, put_stream(node, STREAM_S_MAX) as stream:
            await _within(WRITE_PATIENCE_S, stream.write(Framed(pb.PutRequest(offer=_offer(objects)))), node)
            verdicts = (await _within(WRITE_PATIENCE_S, stream.answer("verdicts"), node)).verdicts.verdicts
            _check(node, len(verdicts) == len(objects) and _VERDICTS.issuperset(verdicts), "a put was answered wrongly")
            for index, (put, verdict) in enumerate(zip(objects, verdicts, strict=True)):
                if verdict == pb.VERDICT_SEND:
                    await _send(node, stream, index, memoryview(put.data))
            await _within(WRITE_PATIENCE_S, stream.write(Framed(pb.PutRequest(commit=pb.PutCommit()))), node)
            await stream.done_writing()
            results = (await _within(WRITE_PATIENCE_S, stream.answer("results"), node)).results.results
            sane = len(results) == len(objects) and all(result.outcome in _OUTCOMES for result in results)
            _check(node, sane, "a put was answered wrongly")
            await stream.settle()
            return [_OUTCOMES[result.outcome] for result in results]

    async def delete(self, namespace_id: bytes, hashes: Sequence[bytes], part: int) -> None:
        request = pb.DeleteRequest(namespace_id=namespace_id, chunk_hashes=b"".join(hashes), part=part)
        async with self._call("delete") as node:
            understood(node, await node.stub.Delete(request, timeout=WRITE_PATIENCE_S))

    async def aclose(self) -> None:
        for task in (self._warming, self._search):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        await self._connections.aclose()

    @asynccontextmanager
    async def _call(self, call: str) -> AsyncIterator[Node]:
        """The node, for one call; what the call raises is counted and, where it is the node's failure, ends its use."""
        began_s = time.perf_counter()
        try:
            node = self._connections.node(self.address)
            async with failures(node):
                yield node
        except KvClientError as error:
            self._metrics.upstream_failures.labels(self.address, call, error.code.value).inc()
            self._metrics.warn_once(f"upstream {call} {error.code.value}", "upstream: %s; a miss", error)
            if worth_another_node(error):
                self._failed()
            raise
        finally:
            self._metrics.upstream_seconds.labels(call).observe(time.perf_counter() - began_s)

    def _failed(self) -> None:
        if not self._circuit.fail():
            return
        self._metrics.upstream_circuits.labels(self.address, "open").inc()
        log.warning("upstream %s does not answer: it is not asked until it does", self.address)
        if self._search is None or self._search.done():
            self._search = asyncio.get_running_loop().create_task(self._find_again())

    async def _find_again(self) -> None:
        while self._circuit.state != "closed":
            await asyncio.sleep(TICK_S)
            if self._circuit.allow():
                await self._try()

    async def _try(self) -> None:
        """Over a new connection: the old one may wait for a machine that has forgotten it."""
        try:
            connections = unused = Connections((self.address,), tls=self._tls)
        except InvalidArgument as error:  # its certificates are being renewed, say
            self._metrics.warn_once("upstream tls", "upstream: %s", error)
            self._circuit.fail()
            return
        try:
            if await _answers(connections.node(self.address)):
                unused, self._connections = self._connections, connections
                self._circuit.succeed()
                self._metrics.upstream_circuits.labels(self.address, "closed").inc()
                log.info("upstream %s answers again", self.address)
            else:
                self._circuit.fail()
        finally:
            await unused.aclose()

    async def _object(self, node: Node, call: Any, at: int) -> memoryview | None:
        """The next object of a fetch, which is to be number `at`; None: there is none."""
        buffer, received = bytearray(), 0
        while True:
            message = await _within(FETCH_PATIENCE * self._timeout_s, call.read(), node)
            if message is grpc.aio.EOF:  # type: ignore[attr-defined]
                _check(node, not received, "a fetch ended inside an object")
                return None
            framed: Framed[pb.FetchResponse] = understood(node, message)
            head, data = framed.head, framed.data
            size = head.object_bytes if not received else len(buffer)
            sane = (
                head.chunk_index == at
                and head.offset == received
                and 0 < len(data) <= DATA_BYTES_MAX
                and received + len(data) <= size <= self._object_bytes_max
            )
            _check(node, sane, "a fetch sent a piece out of place")
            if len(data) == size:
                return memoryview(data)
            if not received:
                buffer = bytearray(size)
            buffer[received : received + len(data)] = data
            received += len(data)
            if received == size:
                return memoryview(buffer)


async def _answers(node: Node) -> bool:
    """A failure is not counted: it failed no caller."""
    try:
        async with failures(node):
            await node.stub.Lookup(pb.LookupRequest(namespace_id=bytes(32)), timeout=TRY_S, wait_for_ready=True)
    except KvClientError:
        return False
    return True


async def _within(seconds: float, work: Awaitable[R], node: Node) -> R:
    """Raises DeadlineExceeded where it takes longer."""
    try:
        return await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError:
        raise DeadlineExceeded("the node makes no progress", node=node.address, seconds=seconds) from None


async def _send(node: Node, stream: PutStream, index: int, data: memoryview) -> None:
    for offset in range(0, len(data), DATA_BYTES_MAX):
        head = pb.PutRequest(object_index=index, offset=offset)
        await _within(WRITE_PATIENCE_S, stream.write(Framed(head, data[offset : offset + DATA_BYTES_MAX])), node)


def _offer(objects: Sequence[PutObject]) -> pb.PutOffer:
    layout = objects[0].layout
    return pb.PutOffer(
        namespace_id=layout.namespace_id, layout=layout.canonical_bytes, part=objects[0].key.part,
        first_chunk_hash=objects[0].first,
        objects=[
            pb.ObjectOffer(
                chunk_hash=put.key.chunk_hash, parent_hash=put.parent, object_bytes=len(put.data), quality=put.quality
            )
            for put in objects
        ],
    )  # fmt: skip


def _check(node: Node, sane: bool, problem: str) -> None:
    if not sane:
        raise ProtocolViolation(problem, node=node.address)
