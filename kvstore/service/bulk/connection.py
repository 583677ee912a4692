"""One bulk connection, served by one thread: whole objects between the socket and memory's own room.

The event loop decides (what is stored, who may put what); this thread asks it a few times a request and moves bytes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from kvstore.engine.commit import Arrival
from kvstore.engine.node import Node, Offer, Result, Stage
from kvstore.engine.stage import Checked
from kvstore.errors import Code, InvalidRequest, KvStoreError
from kvstore.service import requests, wire
from kvstore.service.boundary import Boundary
from kvstore.service.bulk.fetches import Fetches
from kvstore.service.status import STATUS_OF_CODE
from kvstore.service.streams import StreamMetrics
from kvstore_codec import Quality
from kvstore_proto.v1 import store_pb2, transfer_pb2
from kvstore_proto.v1.bulk import BadFrame, Kind
from kvstore_proto.v1.bulk_socket import BulkSocket, ConnectionEnded, NoProgress

#: What is made room for ahead of the socket.
BATCH_BYTES = 16 << 20
#: Of an object, what is received before it is hashed: it is in a core's cache then.
PIECE_BYTES = 256 << 10
#: A connection that nobody asks anything is closed.
UNUSED_S_MAX = 300.0
R = TypeVar("R")


class Connection:
    """`local`: over a unix socket, so that memory can be shared. `run` returns when the connection has ended."""

    def __init__(
        self, node: Node, socket: BulkSocket, loop: asyncio.AbstractEventLoop, boundary: Boundary,
        metrics: StreamMetrics, *, local: bool, stream_idle_s: float, hold_ms_max: int,
    ) -> None:  # fmt: skip
        self._node, self._socket, self._loop, self._boundary = node, socket, loop, boundary
        self._metrics, self._local = metrics, local
        self._stream_idle_s, self._hold_ms_max = stream_idle_s, hold_ms_max
        self._fetches = Fetches(node, socket, self._start, metrics)
        self._shared = False

    def run(self) -> None:
        """Raises nothing that a peer can cause."""
        try:
            self._socket.send(Kind.WELCOME, 0)
            while True:
                self._socket.limit(UNUSED_S_MAX)
                asked = self._socket.receive(Kind.GET, Kind.FETCH, Kind.OFFER, Kind.MAP)
                self._socket.limit(self._stream_idle_s)
                payload = self._socket.payload(asked)
                if asked.kind is Kind.GET:
                    self._answered("BulkGet", lambda: self._get(payload))  # noqa: B023
                elif asked.kind is Kind.FETCH:
                    self._answered("BulkFetch", lambda: self._fetch(payload))  # noqa: B023
                elif asked.kind is Kind.OFFER:
                    self._answered("BulkPut", lambda: self._put(payload))  # noqa: B023
                else:
                    self._answered("BulkMap", self._share)
        except (ConnectionEnded, NoProgress, BadFrame, _Refused):
            return

    def _answered(self, method: str, serve: Any) -> None:
        """Counts and times a request; one that fails is answered with the reason, and ends the connection."""
        began_s, status = time.perf_counter(), grpc.StatusCode.UNKNOWN
        self._boundary.begin()
        try:
            try:
                serve()
                status = grpc.StatusCode.OK
            except NoProgress:
                status = STATUS_OF_CODE[Code.STREAM_STALLED]
                raise
            except (BadFrame, DecodeError) as error:
                raise InvalidRequest(str(error)) from None
            except ConnectionEnded:
                status = grpc.StatusCode.CANCELLED
                raise
        except KvStoreError as error:
            status = STATUS_OF_CODE[error.code]
            ended = transfer_pb2.Ended(
                status=status.value[0], code=error.code.value, details=str(error).replace("\n", " ")
            )
            self._socket.send(Kind.END, 0, ended.SerializeToString())
            raise _Refused from None
        finally:
            self._boundary.end(method, status.name, time.perf_counter() - began_s)

    def _fetch(self, payload: bytes) -> None:
        asked = transfer_pb2.BulkFetch.FromString(payload)
        self._hold(self._fetches.fetch(asked, places=asked.places and self._shared), asked.hold_ms)

    def _get(self, payload: bytes) -> None:
        asked = transfer_pb2.BulkGet.FromString(payload)
        self._hold(self._fetches.get(asked, places=asked.places and self._shared), asked.hold_ms)

    def _hold(self, held: list[memoryview], hold_ms: int) -> None:
        """Keeps what the client reads in place."""
        if not held:
            return
        # The end of its time frees the memory: what is read after it is not confirmed, and counts for nothing.
        self._socket.limit(min(hold_ms, self._hold_ms_max) / 1000)
        try:
            self._socket.receive(Kind.RELEASE)
        except BaseException:
            # Before the memory is let go: a client that finds its connection open takes what it has read for good.
            self._socket.shutdown()
            raise
        self._socket.limit(self._stream_idle_s)
        self._socket.send(Kind.RELEASED, 0)

    def _put(self, payload: bytes) -> None:
        offer = requests.put_offer(store_pb2.PutRequest.FromString(payload))
        offers = [
            Offer(each.chunk_hash, each.parent_hash, each.object_bytes, Quality(each.quality)) for each in offer.objects
        ]
        stage = self._start(_offered(self._node, offer, offers)).result()
        try:
            self._socket.send(Kind.VERDICTS, 0, wire.verdicts(stage.verdicts).SerializeToString())
            arrived = self._fill(stage)
            committed = self._start(_committed(self._node, stage, offer, arrived)).result()
        finally:
            self._loop.call_soon_threadsafe(self._node.abort, stage)
        self._socket.send(Kind.RESULTS, 0, wire.results(committed).SerializeToString())

    def _fill(self, stage: Stage) -> dict[int, Checked]:
        """Receives the wanted objects, in the order of the offer, and the commit. Which of them came, checked here: a
        piece is in this thread's caches, and the next one is on its way."""
        wanted = [index for index, verdict in enumerate(stage.verdicts) if verdict == "send"]
        buffers: dict[int, memoryview] = {}
        arrived: dict[int, Checked] = {}
        for at, index in enumerate(wanted):
            found = self._socket.receive(Kind.OBJECT, Kind.COMMIT)
            if found.kind is Kind.COMMIT:
                return arrived  # what did not come is rejected by the commit
            if found.index != index or found.length != stage.offers[index].object_bytes:
                raise InvalidRequest(
                    "an object out of order or of another length", index=found.index, expected=index, bytes=found.length
                )
            if index not in buffers:
                buffers = self._start(_room(stage, wanted[at:])).result()
            buffer = buffers.pop(index)
            arrived[index] = self._received(buffer, Arrival(buffer, stage, stage.offers[index]))
        self._socket.receive(Kind.COMMIT)
        return arrived

    def _received(self, buffer: memoryview, arrival: Arrival) -> Checked:
        at, checked = 0, None
        while checked is None:
            end = min(at + PIECE_BYTES, len(buffer))
            self._socket.receive_into(buffer[at:end], after=self._metrics.put_bytes.inc)
            at, checked = end, arrival.to(end)
        return checked

    def _share(self) -> None:
        if not self._local:
            raise InvalidRequest("memory is shared over unix sockets only")
        with self._node.shared_memory() as (descriptor, size):
            shared = transfer_pb2.SharedMemory(bytes=size)
            self._socket.send_descriptor(Kind.MAPPED, shared.SerializeToString(), descriptor)
        self._shared = True

    def _start(self, coroutine: Coroutine[Any, Any, R]) -> concurrent.futures.Future[R]:
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # the loop is closed: the node has stopped
            coroutine.close()
            raise ConnectionEnded from None


class _Refused(Exception):
    """The peer has been told why."""


async def _offered(node: Node, offer: store_pb2.PutOffer, offers: Sequence[Offer]) -> Stage:
    return node.offer(offer.namespace_id, offer.layout, offer.part, offers, offer.first_chunk_hash)


async def _committed(
    node: Node, stage: Stage, offer: store_pb2.PutOffer, arrived: Mapping[int, Checked]
) -> list[Result]:  # fmt: skip
    for index, checked in arrived.items():
        stage.arrived(index, checked)
    durable = offer.durability == store_pb2.DURABILITY_DISK
    return await node.commit(stage, durable=durable, retain=requests.retention(offer))


async def _room(stage: Stage, indices: Sequence[int]) -> dict[int, memoryview]:
    """Where the next objects go: at least one, and about a batch."""
    buffers: dict[int, memoryview] = {}
    size = 0
    for index in indices:
        buffers[index] = stage.buffer(index)
        size += stage.offers[index].object_bytes
        if size >= BATCH_BYTES:
            break
    return buffers
