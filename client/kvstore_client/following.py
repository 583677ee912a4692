"""Follow: one live write, its layers received and decoded as they come, whether or not they are taken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

import grpc.aio

import kvstore_codec as codec
from kvstore_client.coder import DeadlineCoder
from kvstore_client.connection import Node, failures, understood
from kvstore_client.deadline import SECONDS_MAX, Deadline
from kvstore_client.errors import DeadlineExceeded, KvClientError, ProtocolViolation
from kvstore_client.fetching import call_off, decode_object, settle, wait_for_turn
from kvstore_client.results import ChunkHit
from kvstore_client.session import Session
from kvstore_client.transports.blob import Blob
from kvstore_client.transports.wanted import Wanted
from kvstore_codec import ChunkRef, KVArray, KVLayout, Quality
from kvstore_proto.v1 import live_pb2 as pb
from kvstore_proto.v1.framing import DATA_BYTES_MAX, Framed

MS_MAX = 2**32 - 1  # as the protocol can say it
DECODE_JOBS = 4  # of one layer, some chunks each: what a thread costs is not to be paid for each small page
_QUALITIES = frozenset(Quality)
Message = Framed[pb.FollowResponse]


@dataclass(frozen=True)
class StreamAsked:
    """`wanted`: read no better; `floor`: nothing worse. `wait_s`: for a writer to appear; `deadline_s`: of each step
    after that."""

    layout: KVLayout
    part: int
    refs: Sequence[ChunkRef]
    wanted: Quality
    floor: Quality
    wait_s: float
    deadline_s: float

    @property
    def tokens(self) -> int:
        return self.refs[-1].first_token + self.refs[-1].tokens if self.refs else 0


class LiveReader:
    """Decodes a live write of `asked.refs` into `into`, the KV of all of them, from chunk number `stored` on. Once it
    is closed, nothing writes to `into` any more."""

    def __init__(self, node: Node, session: Session, asked: StreamAsked, stored: int, into: KVArray) -> None:
        self._node, self._session, self._asked, self._stored, self._into = node, session, asked, stored, into
        self._layers = asked.layout.part_layout(asked.part).num_layers
        self._by_layers = codec.layout_by_layers(asked.layout)
        self._coder = DeadlineCoder(Deadline(SECONDS_MAX))
        self._call: Any = None
        self._found = pb.LiveFound()
        self._receiving: asyncio.Task[None] | None = None
        self._jobs: list[Future[None]] = []
        #: for each layer what decodes it; then None (the write has ended) or what went wrong
        self._queue: asyncio.Queue[list[Future[None]] | KvClientError | None] = asyncio.Queue()

    @property
    def end(self) -> int:
        """Chunks of the prompt up to the live write's last."""
        return self._found.first_chunk + self._found.chunks

    async def open(self, wait: Deadline, limit: Deadline) -> Literal["found", "stored", "absent"]:
        """Waits for a writer; "stored" where more than `stored` chunks are, by now. Raises the typed error of a failed
        call, ProtocolViolation."""
        asked = self._asked
        request = pb.FollowRequest(
            namespace_id=asked.layout.namespace_id, part=asked.part, stored_chunks=self._stored,
            chunk_hashes=b"".join(ref.hash for ref in asked.refs), min_quality=asked.floor,
            wait_ms=min(int(wait.remaining() * 1000), MS_MAX),
        )  # fmt: skip
        async with failures(self._node):
            self._call = self._node.live.Follow(request)
        first = await self._first(limit.remaining())
        if first is None:
            return "absent"
        kind = first.head.WhichOneof("kind")
        if kind == "stored":
            return "stored"
        self._found = first.head.found
        self._require(kind == "found" and self._is_possible(self._found), "a follow was answered out of place")
        self._receiving = asyncio.create_task(self._receive())
        return "found"

    async def next_layer(self, limit: Deadline) -> bool:
        """Whether another layer is decoded; False: its writer aborted or died. Raises DeadlineExceeded, BadObject,
        ProtocolViolation, the typed error of the failed call."""
        try:
            jobs = await asyncio.wait_for(self._queue.get(), limit.remaining())
        except asyncio.TimeoutError:
            raise DeadlineExceeded("the next layer did not come in time", seconds=limit.seconds) from None
        if jobs is None:
            return False
        if isinstance(jobs, KvClientError):
            raise jobs
        await settle(jobs, limit.remaining())
        for job in jobs:
            if not job.done():
                raise DeadlineExceeded("the call's deadline passed while coding", seconds=limit.seconds)
            if (error := job.exception()) is not None:
                raise error
        return True

    async def aclose(self) -> None:
        """Idempotent."""
        self._coder.stop()
        if self._call is not None:
            self._call.cancel()
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.wait([self._receiving])
        await call_off(self._jobs)

    async def _first(self, timeout_s: float) -> Message | None:
        try:
            return await asyncio.wait_for(self._read(), timeout_s)
        except asyncio.TimeoutError:
            raise DeadlineExceeded("the node did not answer in time", node=self._node.address) from None

    async def _read(self) -> Message | None:
        """The next message; None: there are no more."""
        async with failures(self._node):
            message = await self._call.read()
        if message is grpc.aio.EOF:  # type: ignore[attr-defined]
            return None
        framed: Message = understood(self._node, message)
        return framed

    async def _receive(self) -> None:
        """Fills the queue. Waits where decoding is behind, which holds back the node."""
        layer, running = 0, list[Future[None]]()
        try:
            async with aclosing(self._layer_objects()) as layers:
                async for objects in layers:
                    jobs = self._decode(layer, objects)
                    self._queue.put_nowait(jobs)
                    self._jobs += jobs
                    running += jobs
                    layer += 1
                    await wait_for_turn(running, Deadline(SECONDS_MAX))
        except KvClientError as error:
            self._queue.put_nowait(error)
            return
        self._queue.put_nowait(None)

    async def _layer_objects(self) -> AsyncGenerator[list[memoryview], None]:
        """The objects of each layer, in order; ends early where the write does."""
        for layer in range(self._layers):
            buffer, lengths = bytearray(), list[int]()
            while not lengths or len(buffer) < sum(lengths):
                message = await self._read()
                if message is None:
                    return
                self._check_piece(message, layer, len(buffer), lengths)
                lengths = lengths or list(message.head.object_bytes)
                buffer += message.data  # grows by what came, not by what was declared
                self._session.metrics.bytes_received.inc(len(message.data))
            whole, at, objects = memoryview(buffer), 0, []
            for length in lengths:
                objects.append(whole[at : at + length])
                at += length
            yield objects

    def _decode(self, layer: int, objects: Sequence[memoryview]) -> list[Future[None]]:
        found = self._found
        chunks = [
            (ChunkHit(
                ref.hash, ref.first_token, ref.tokens, Quality(found.quality), Quality(found.provenance), len(blob),
                "live",
            ), blob)
            for index, (ref, blob) in enumerate(zip(self._refs, objects, strict=True), found.first_chunk)
            if index >= self._stored
        ]  # fmt: skip
        size = -(-len(chunks) // DECODE_JOBS)
        runs = [chunks[first : first + size] for first in range(0, len(chunks), size)]
        return [self._session.executor.submit(self._decode_run, layer, run) for run in runs]

    def _decode_run(self, layer: int, chunks: Sequence[tuple[ChunkHit, memoryview]]) -> None:
        """Raises BadObject, DeadlineExceeded."""
        asked, (k, v) = self._asked, self._into[layer]
        part = codec.layer_part(asked.layout, asked.part, layer)
        wanted = Wanted(self._by_layers, part, (), asked.wanted, asked.floor)
        for chunk, blob in chunks:
            first, last = chunk.first_token, chunk.first_token + chunk.tokens
            decode_object(self._node, wanted, chunk, Blob(blob), [(k[first:last], v[first:last])], self._coder, None)

    @property
    def _refs(self) -> Sequence[ChunkRef]:
        """What is written, of the prompt."""
        return self._asked.refs[self._found.first_chunk : self.end]

    def _is_possible(self, found: pb.LiveFound) -> bool:
        return (
            found.layers == self._layers
            and found.first_chunk <= self._stored < found.first_chunk + found.chunks <= len(self._asked.refs)
            and {found.quality, found.provenance} <= _QUALITIES
            and max(found.quality, found.provenance) <= self._asked.floor
        )

    def _check_piece(self, message: Message, layer: int, received: int, lengths: Sequence[int]) -> None:
        """That a piece goes on where the layer's last one ended. Raises ProtocolViolation."""
        head, size = message.head, len(message.data)
        declared = lengths or head.object_bytes
        part_layout = self._by_layers.part_layout(codec.layer_part(self._asked.layout, self._asked.part, layer))
        token_bytes = part_layout.bytes_per_token
        self._require(
            head.WhichOneof("kind") is None
            and (head.layer, head.offset) == (layer, received)
            and bool(head.object_bytes) != bool(lengths)
            and 0 < size <= DATA_BYTES_MAX
            and len(declared) == self._found.chunks
            and all(
                0 < length <= codec.object_bytes_max(ref.tokens * token_bytes)
                for length, ref in zip(declared, self._refs, strict=True)
            )
            and received + size <= sum(declared),
            "a follow sent a piece out of place",
        )

    def _require(self, sane: bool, problem: str) -> None:
        if not sane:
            raise ProtocolViolation(problem, node=self._node.address)
