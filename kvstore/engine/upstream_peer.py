"""One node upstream, over gRPC and for what is read the bulk path, and whether it is there.

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
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from kvstore.engine.outside import Chain, FoundChunk, PutObject, Sent
from kvstore.metrics import NodeMetrics
from kvstore_client.circuit import Circuit, State
from kvstore_client.connection import Connections, Node, failures, understood, worth_another_node
from kvstore_client.deadline import Deadline
from kvstore_client.errors import DeadlineExceeded, InvalidArgument, KvClientError, ProtocolViolation
from kvstore_client.tls import TLS
from kvstore_client.transports.blob import Blob
from kvstore_client.transports.bulk_path import Transport
from kvstore_client.transports.put_stream import PutStream, put_stream
from kvstore_client.transports.transfer import Fetch
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


@dataclass(frozen=True)
class _Wanted:
    """Of a chain, as transports take it: only the node knows its layout."""

    chain: Chain
    quality: Quality
    object_bytes_max: int

    @property
    def chunks(self) -> Sequence[bytes]:
        return self.chain.hashes

    def bytes_max(self, index: int) -> int:
        return self.object_bytes_max

    def request(self, lease_id: bytes) -> pb.FetchRequest:
        chain = self.chain
        return pb.FetchRequest(
            namespace_id=chain.namespace_id, chunk_hashes=b"".join(chain.hashes), part=chain.part,
            quality=self.quality, lease_id=lease_id, first_chunk_hash=chain.first,
        )  # fmt: skip


class RemotePeer:
    """`timeout_s`: as of upstream_timeout_ms. `object_bytes_max`: more is not taken from it. `tls`: its files are read
    with every try to find the node again. `transport`: which way what is read comes. Raises InvalidArgument where
    certificates cannot be used."""

    def __init__(
        self, address: str, metrics: NodeMetrics, *, timeout_s: float, object_bytes_max: int,
        clock: Callable[[], float], rng: random.Random, tls: TLS | None = None, transport: Transport = "auto",
    ) -> None:  # fmt: skip
        self.address = address
        self._metrics, self._timeout_s, self._object_bytes_max = metrics, timeout_s, object_bytes_max
        self._circuit = Circuit(clock, rng, FAILURES_MAX, PAUSE_S_MAX)
        self._tls, self._transport = tls, transport
        self._connections = self._connected()
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
        wanted = _Wanted(chain, quality, self._object_bytes_max)
        came = _Arrivals(FETCH_PATIENCE * self._timeout_s)
        loop, last, at = asyncio.get_running_loop(), None, 0
        async with self._call("fetch") as node:
            fetch = Fetch(
                node, wanted, b"", Deadline(STREAM_S_MAX), came.count, taken_by=Deadline(came.patience_s)
            )  # fmt: skip
            try:
                async with aclosing(fetch.objects()) as blobs:
                    while (blob := await came.next(blobs, node)) is not None:
                        data = await loop.run_in_executor(node.bulk.executor, _owned, blob)
                        at += 1
                        if at < len(chain):
                            yield data
                        else:  # not before the stream has ended: who has all that he wants asks no further
                            last = data
                await fetch.confirm()
            finally:
                await fetch.aclose()
            if last is not None:
                yield last

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
            connections = unused = self._connected()
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

    def _connected(self) -> Connections:
        """Raises InvalidArgument for certificates that cannot be used."""
        return Connections((self.address,), self._transport, self._bulk_failed, self._tls)

    def _bulk_failed(self, node: str, error: KvClientError) -> None:
        """Objects come over gRPC meanwhile."""
        self._metrics.upstream_failures.labels(node, "bulk", error.code.value).inc()
        self._metrics.warn_once(f"upstream bulk {error.code.value}", "upstream: %s; gRPC instead", error)


class _Arrivals:
    """Objects as they come. An object may take any time while some of it comes; `patience_s`: while nothing does."""

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self._bytes = 0

    def count(self, received: int) -> None:
        self._bytes += received

    async def next(self, blobs: AsyncGenerator[Blob, None], node: Node) -> Blob | None:
        """None: there is none. Raises DeadlineExceeded, what `blobs` raises."""
        coming = asyncio.ensure_future(anext(blobs, None))
        try:
            while not coming.done():
                before = self._bytes
                await asyncio.wait([coming], timeout=self.patience_s)
                if not coming.done() and self._bytes == before:
                    raise _no_progress(node, self.patience_s)
            return coming.result()
        finally:
            if not coming.done():
                coming.cancel()
                await asyncio.wait([coming])


def _owned(blob: Blob) -> memoryview:
    """A copy: what transports receive into, or share, is theirs."""
    data = np.frombuffer(blob.data, np.uint8).copy()
    blob.done()
    return data.data


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
        raise _no_progress(node, seconds) from None


def _no_progress(node: Node, seconds: float) -> DeadlineExceeded:
    return DeadlineExceeded("the node makes no progress", node=node.address, seconds=seconds)


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
