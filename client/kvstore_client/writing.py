"""A live write: the KV of a prompt, layer by layer while it is computed, for readers that follow; stored at the end.

Each layer is coded in threads as one object a chunk (kvstore_codec.layerwise), sent to the node, which hands it on, and
kept. At the end the chunks' objects are joined from those and put as any others: nothing is coded twice, and what a get
returns later is what was streamed. Where a namespace codes with a profile, which may join layers, the end is an
ordinary put of a copy of the KV.

That readers cannot follow (no node, no room, a link too slow) is counted and logged, never raised: storing is what
counts, and it does not depend on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import kvstore_codec as codec
from kvstore_client.coder import DeadlineCoder
from kvstore_client.connection import Node, failures, timeout_s
from kvstore_client.deadline import SECONDS_MAX, Deadline
from kvstore_client.errors import DeadlineExceeded, InvalidArgument, KvClientError
from kvstore_client.learning import copied
from kvstore_client.lookups import lookup
from kvstore_client.putting import Chunk, Source, Stored, batches, put_encoded, result_of
from kvstore_client.results import PutResult
from kvstore_client.session import Session
from kvstore_client.transports.put_stream import PutStream
from kvstore_codec import ChunkRef, KVArray
from kvstore_proto.v1 import live_pb2 as pb
from kvstore_proto.v1.framing import DATA_BYTES_MAX, HASHES_MAX, Framed

if TYPE_CHECKING:
    from typing_extensions import Self

CALL = "writer"
#: layers written and not yet sent, before a write waits for them
PENDING_LAYERS_MAX = 4
#: `put(kv, deadline=seconds)` of a list of (k, v) from the source's first token on
PutWhole = Callable[..., Awaitable[PutResult]]


class _Written(NamedTuple):
    """One layer on its way: its chunks' objects, in order, being coded; whether it counts as pending."""

    objects: list[Future[list[bytes]]]
    pending: bool


class AsyncWriter:
    """Made by `AsyncNamespace.writer`, for one `async with`; see there. `result` is set when that was left normally."""

    def __init__(
        self, session: Session, source: Source, refs: Sequence[ChunkRef], *, tokens: int, key: bytes,
        put_whole: PutWhole | None, deadline: float | None,
    ) -> None:  # fmt: skip
        """`source`: without KV. `tokens`: that each layer has, from `source.first_token` on. `key`: of placement."""
        self.result: PutResult | None = None
        self._session, self._source, self._key, self._put_whole = session, source, key, put_whole
        self._prompt, self._tokens, self._deadline_s = refs, tokens, deadline
        self._mine = [ref for ref in refs if ref.first_token >= source.first_token]
        self._layout = source.layout.part_layout(source.part)
        self._by_layers = codec.layout_by_layers(source.layout)
        self._coder = DeadlineCoder(Deadline(SECONDS_MAX))
        self._held: dict[bytes, int] = {}  # stored bytes, by hash
        self._missing = self._mine  # what is written live: all chunks behind those that are held
        self._before: int | None = None
        self._layers = 0
        self._kept: list[KVArray] = []  # for put_whole
        self._objects: list[list[bytes]] = []  # of each layer
        self._queue: asyncio.Queue[_Written] = asyncio.Queue()
        self._room = asyncio.Semaphore(PENDING_LAYERS_MAX)
        self._node: Node | None = None
        self._stream: PutStream | None = None  # None: nobody can follow
        self._sending: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        limit = self._session.begin(self._deadline_s)
        if self._mine:
            try:
                self._node = await self._look_up(limit)
                if 0 < len(self._missing) <= HASHES_MAX:
                    await self._open(self._node, limit)
            except KvClientError as error:
                self._give_up(error)
        self._sending = asyncio.create_task(self._send())
        return self

    async def write(self, layer: int, k: Any, v: Any) -> None:
        """The next layer (0, 1, …): k, v `[tokens, kv_heads, dim]`, of the tokens from first_token on, as
        `codec.encode` takes them. They may be overwritten once this returns, which it does before they are sent; it
        waits, at most the deadline, while several layers before it are still on their way.

        Raises LayoutError (shape, dtype), InvalidArgument (another layer's turn, other tokens), and ValuesError for
        this layer or one before.
        """
        limit = self._session.begin(self._deadline_s)
        if self._sending is None:
            raise InvalidArgument('a writer writes inside its "with" block')
        if layer != self._layers or layer >= self._layout.num_layers:
            raise InvalidArgument("layers come in order, each once", layer=layer, expected=self._layers)
        layout = self._by_layers.part_layout(codec.layer_part(self._source.layout, self._source.part, layer))
        held = codec.token_count([(k, v)], layout)
        if held != self._tokens:
            raise InvalidArgument("k and v must hold the tokens from first_token on", got=held, expected=self._tokens)
        await self._raise_what_ended_sending()
        pair = await self._copy(k, v, layout)
        self._layers += 1
        pending = await self._wait_for_room(limit)
        self._queue.put_nowait(_Written(self._encode(layer, pair), pending))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                limit = self._session.begin(self._deadline_s)
                if self._mine and self._layers < self._layout.num_layers:
                    raise InvalidArgument("the writer was left before its last layer", layers=self._layers)
                with self._session.timed(CALL):
                    self.result = await self._finish(limit)
        finally:
            await self._close()

    async def _look_up(self, limit: Deadline) -> Node:
        source = self._source
        node, hit = await self._session.attempt(
            CALL, self._key, limit,
            lambda node, timeout_s: lookup(
                node, source.layout, source.part, self._prompt, lease_ms=0, timeout_s=timeout_s
            ),
        )  # fmt: skip
        self._before = source.first_token if hit.tokens >= source.first_token else None
        mine = {ref.hash for ref in self._mine}
        for chunk in hit.chunks:
            if chunk.hash in mine:
                if chunk.quality > source.quality:
                    break  # the first that is worse: readers want no gap
                self._held[chunk.hash] = chunk.stored_bytes
        self._missing = [ref for ref in self._mine if ref.hash not in self._held]
        return node

    async def _open(self, node: Node, limit: Deadline) -> None:
        source = self._source
        opening = pb.LiveOpen(
            namespace_id=source.layout.namespace_id, part=source.part, layers=self._layout.num_layers,
            chunk_hashes=b"".join(ref.hash for ref in self._missing), quality=source.quality,
            provenance=source.provenance,
        )  # fmt: skip
        seconds = timeout_s(limit)
        async with failures(node):
            self._stream = PutStream(node, node.live.Write())
            try:
                await asyncio.wait_for(self._opened(self._stream, opening), seconds)
            except asyncio.TimeoutError:
                raise DeadlineExceeded("the node did not answer in time", node=node.address) from None

    @staticmethod
    async def _opened(stream: PutStream, opening: pb.LiveOpen) -> None:
        await stream.write(Framed(pb.LiveWriteRequest(open=opening)))
        await stream.answer("opened")

    async def _copy(self, k: Any, v: Any, layout: codec.KVLayout) -> KVArray:
        """(k, v) of what is not held, in memory of its own."""
        loop, executor = asyncio.get_running_loop(), self._session.executor
        ((k, v),) = await loop.run_in_executor(executor, copied, [(k, v)], layout)
        if self._put_whole is not None:
            self._kept.append((k, v))
        first = self._missing[0].first_token - self._source.first_token if self._missing else self._tokens
        return k[first:], v[first:]

    def _encode(self, layer: int, pair: KVArray) -> list[Future[list[bytes]]]:
        """Some chunks a thread: what a thread costs is not to be paid for each small page."""
        missing = self._missing
        size = -(-len(missing) // PENDING_LAYERS_MAX) or 1
        runs = [missing[first : first + size] for first in range(0, len(missing), size)]
        return [self._session.executor.submit(self._encode_run, layer, pair, run) for run in runs]

    def _encode_run(self, layer: int, pair: KVArray, refs: Sequence[ChunkRef]) -> list[bytes]:
        source, start = self._source, self._missing[0].first_token
        objects = []
        for ref in refs:
            self._coder.check()
            first, last = ref.first_token - start, ref.first_token - start + ref.tokens
            objects.append(
                codec.encode(
                    [(pair[0][first:last], pair[1][first:last])], self._by_layers, quality=source.quality,
                    first_position=ref.first_token, chunk_hash=ref.hash, provenance=source.provenance,
                    part=codec.layer_part(source.layout, source.part, layer), coder=self._coder,
                )
            )  # fmt: skip
        return objects

    async def _wait_for_room(self, limit: Deadline) -> bool:
        """Whether the layer has a place among the pending ones. Without, the link is too slow to be followed."""
        try:
            await asyncio.wait_for(self._room.acquire(), limit.remaining())
        except asyncio.TimeoutError:
            self._give_up(DeadlineExceeded("layers are not sent as fast as they are written", seconds=limit.seconds))
            return False
        return True

    async def _send(self) -> None:
        """Sends layers as they are coded, all of them in order. Raises ValuesError."""
        for layer in range(self._layout.num_layers):
            written = await self._queue.get()
            runs = await asyncio.gather(*(asyncio.wrap_future(run) for run in written.objects))
            objects = [blob for run in runs for blob in run]
            self._objects.append(objects)
            await self._followable(self._send_layer(layer, objects))
            if written.pending:
                self._room.release()

    async def _followable(self, sending: Coroutine[Any, Any, None]) -> None:
        """Sends, or gives up being followed."""
        if self._stream is None or self._node is None:
            sending.close()
            return
        try:
            async with failures(self._node):
                await sending
        except KvClientError as error:
            if self._stream is not None:  # else it was given up meanwhile, which ended the call
                self._give_up(error)

    async def _send_layer(self, layer: int, objects: Sequence[bytes]) -> None:
        run = memoryview(b"".join(objects))
        for offset in range(0, len(run), DATA_BYTES_MAX):
            if self._stream is None:
                return
            head = pb.LiveWriteRequest(layer=layer, offset=offset)
            if not offset:
                head.object_bytes.extend(map(len, objects))
            piece = run[offset : offset + DATA_BYTES_MAX]
            await self._stream.write(Framed(head, piece))
            self._session.metrics.bytes_sent.inc(len(piece))

    async def _finish(self, limit: Deadline) -> PutResult:
        """Waits for what is being coded and sent, and stores it. Raises ValuesError."""
        try:
            await self._wait_for_sending(limit)
            if self._put_whole is not None:
                return await self._put_whole(self._kept, deadline=timeout_s(limit))
            stored = await self._put(limit)
        except KvClientError as error:
            self._session.metrics.rejections.labels(error.code.value).inc(len(self._missing))
            self._session.forgive(CALL, error)
            stored = [self._settled(ref) or Stored(ref, "rejected", str(error), False, 0) for ref in self._mine]
        self._session.count_rejected(CALL, stored)
        return result_of(self._before, stored)

    async def _wait_for_sending(self, limit: Deadline) -> None:
        if not self._mine or self._sending is None:
            return
        await asyncio.wait([self._sending], timeout=limit.remaining() / 2)
        if not self._sending.done():  # storing comes first: half of the time is left for it
            self._give_up(DeadlineExceeded("layers are not sent as fast as they are written", seconds=limit.seconds))
            await asyncio.wait([self._sending], timeout=limit.remaining())
        if not self._sending.done():
            raise DeadlineExceeded("the call's deadline passed while coding", seconds=limit.seconds)
        self._sending.result()

    async def _put(self, limit: Deadline) -> list[Stored]:
        source, loop = self._source, asyncio.get_running_loop()
        joined = await asyncio.gather(*(
            loop.run_in_executor(self._session.executor, codec.join_layers, layers, source.layout, source.part)
            for layers in zip(*self._objects, strict=True)
        ))  # fmt: skip
        blobs = dict(zip((ref.hash for ref in self._missing), joined, strict=True))
        answered = {ref.hash: settled for ref in self._mine if (settled := self._settled(ref)) is not None}
        unsettled = [Chunk(ref, self._held.get(ref.hash, 0)) for ref in self._mine if ref.hash not in answered]
        for batch in batches(source, unsettled):
            answered |= {each.ref.hash: each for each in await self._put_batch(batch, blobs, limit)}
        return [answered[ref.hash] for ref in self._mine]

    async def _put_batch(self, batch: Sequence[Chunk], blobs: dict[bytes, bytes], limit: Deadline) -> list[Stored]:
        chosen = [blobs.get(chunk.ref.hash) for chunk in batch]
        count = self._session.metrics.bytes_sent.inc
        _, done = await self._session.attempt(
            CALL, self._key, limit,
            lambda node, timeout_s: put_encoded(node, self._source, batch, chosen, Deadline(timeout_s), count),
        )  # fmt: skip
        return done

    def _settled(self, ref: ChunkRef) -> Stored | None:
        """What the node holds of a chunk is settled, unless it has to be made durable."""
        held_bytes = self._held.get(ref.hash, 0)
        return Stored(ref, "have", "", False, held_bytes) if held_bytes and not self._source.durable else None

    async def _raise_what_ended_sending(self) -> None:
        if self._sending is not None and self._sending.done():
            await self._sending

    def _give_up(self, error: KvClientError) -> None:
        """Readers cannot follow any more."""
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None
        self._session.metrics.failures.labels(CALL, error.code.value).inc()
        self._session.warn(CALL, error.code, str(error))

    async def _close(self) -> None:
        """Ends the live write: what is stored is found by itself, what is not is aborted."""
        self._coder.stop()
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None
        if self._sending is not None:
            sending, self._sending = self._sending, None
            sending.cancel()
            await asyncio.wait([sending])
            problem = None if sending.cancelled() else sending.exception()
            if problem is not None and not isinstance(problem, codec.ValuesError | DeadlineExceeded):
                raise problem
