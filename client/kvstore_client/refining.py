"""A get's better values, later: the objects that came are kept, and what they lack travels behind them.

What a get read first is the beginning of what it could have read, so only the rest is fetched. It is decoded when the
caller says so, into the array that the caller says: an engine may be reading the coarse values meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import numpy.typing as npt

import kvstore_codec as codec
from kvstore_client.coder import DeadlineCoder
from kvstore_client.connection import Node
from kvstore_client.deadline import Deadline
from kvstore_client.errors import ClientClosed, DeadlineExceeded, KvClientError, ObjectForeign, from_codec
from kvstore_client.fetching import call_off, settle
from kvstore_client.kv_views import sliceable
from kvstore_client.leasing import RELEASE_S_MAX, kept_alive
from kvstore_client.metrics import ABSENT
from kvstore_client.pace import RefinePace, Timing
from kvstore_client.results import ChunkHit, Lease
from kvstore_client.session import Session
from kvstore_client.transports.transfer import Fetch
from kvstore_client.transports.wanted import Wanted
from kvstore_codec import KVArray, KVLayout, ObjectHeader, Profile, Quality
from kvstore_proto.v1.framing import HASHES_MAX

CALL = "refine"


@dataclass
class _Kept:
    """The beginning of one object: its first `held` bytes in memory for all that is wanted of it. `applied`: bytes that
    the get's own array has the values of."""

    header: ObjectHeader
    memory: npt.NDArray[np.uint8]
    held: int
    applied: int
    profile: Profile | None

    @property
    def is_whole(self) -> bool:
        return self.held == len(self.memory)

    def lacks(self, quality: Quality) -> bool:
        """Whether it reads better at `quality` than as it is here."""
        return self.held < min(self.header.length_for(quality), len(self.memory))

    @property
    def blob(self) -> memoryview:
        return self.memory.data[: self.held]


class AsyncRefinement:
    """Made by a get with `refine=True`; see there. `aclose` it where the better values are not wanted any more.

    `tokens`: how many of the get's tokens, from the first on, are here as good as they were stored and asked for.
    `done`: nothing more will come. `reason`: why less than all has come in the end: "absent" (the node has it no more),
    "closed" or the code of another error; else "".
    """

    def __init__(self, session: Session, layout: KVLayout) -> None:
        """`layout`: of the part."""
        self._session, self._layout = session, layout
        self._kept: dict[bytes, _Kept] = {}
        self._wanted: Wanted | None = None
        self._into: KVArray | None = None
        self._task: asyncio.Task[None] | None = None
        self._error: KvClientError | None = None

    @property
    def tokens(self) -> int:
        chunks = self._chunks
        whole = next((at for at, chunk in enumerate(chunks) if not self._kept[chunk.hash].is_whole), len(chunks))
        return sum(chunk.tokens for chunk in chunks[:whole])

    @property
    def done(self) -> bool:
        return self._task is None or self._task.done()

    @property
    def reason(self) -> str:
        if self._error is not None:
            return self._error.code.value
        if self._task is not None and self._task.cancelled():  # before it began
            return ClientClosed.code.value
        return ABSENT if self.done and self.tokens < self._tokens else ""

    async def wait(self, timeout: float | None = None) -> bool:
        """Until nothing more will come, or for so many seconds. Whether all is here.

        Strict, raises the typed error of what ended it."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=timeout)
        if self._error is not None and self._session.strict:
            raise self._error
        return self.done and self.tokens == self._tokens

    async def apply(self, out: KVArray | None = None, *, deadline: float | None = None) -> tuple[KVArray, int]:
        """(kv, n) as the get answered them, with the best values that have come by now.

        Without `out`, those that got better since are decoded into the get's own array; values that do not get their
        turn within the deadline stay as they were. Another array, in any form that a get takes, gets all n tokens, or
        as many whole chunks as it has room for; fewer where the deadline passes before. Nothing writes to either after
        this returns. Raises LayoutError (`out` does not fit)."""
        limit = self._session.begin(deadline)
        into = self._into if out is None else sliceable(out, self._layout)
        if into is None:
            return codec.empty(self._layout, 0), 0
        room = codec.token_count(into, self._layout)
        chunks = [chunk for chunk in self._chunks if chunk.first_token + chunk.tokens <= room]
        coder, decodes = DeadlineCoder(limit), []
        for chunk in chunks:
            decodes.append(
                self._session.executor.submit(self._decode, chunk, self._place(into, chunk), coder, out is None)
            )
        try:
            await settle(decodes, limit.remaining())
        finally:
            coder.stop()
            await call_off(decodes)
        applied = sum(chunk.tokens for chunk in chunks)
        for chunk, decode in zip(chunks, decodes, strict=True):
            error = None if decode.cancelled() else decode.exception()
            if error is not None and not isinstance(error, DeadlineExceeded):
                raise error
            if out is not None and (error is not None or decode.cancelled()):
                applied = min(applied, chunk.first_token)
        return codec.token_slice(into, 0, applied), applied

    async def improve(
        self, node: Node, chunks: int, quality: Quality, into: KVArray, lease_ids: Sequence[bytes],
        pace: Callable[[Iterator[int]], RefinePace], limit: Deadline,
    ) -> int:  # fmt: skip
        """While the get goes on: fetches what the first `chunks` chunks lack to `quality` and decodes it into `into`,
        for as long as `pace` lets it. How many became better; what a node does or fails to do is no error, but counted.
        When it returns, or is cancelled, nothing writes to `into` any more."""
        assert self._wanted is not None
        self._into = into
        coder = DeadlineCoder(limit)
        decodes: list[Future[None]] = []
        lacking = self._lacking(chunks, quality)
        timing = pace(iter(lacking))

        def came(chunk: ChunkHit) -> None:
            place = self._place(into, chunk)
            decodes.append(self._session.executor.submit(self._decode, chunk, place, coder, True, timing))

        try:
            for first, run in self._runs(lacking):
                number = first // HASHES_MAX
                lease_id = lease_ids[number] if number < len(lease_ids) else b""
                if not await self._fetch_run(node, run, lease_id, limit, quality, timing, came):
                    break
        except KvClientError as error:
            self._session.metrics.failures.labels(CALL, error.code.value).inc()
            self._session.warn(CALL, error.code, str(error))
        finally:
            await settle(decodes, min(timing.left_s, limit.remaining()))
            await call_off(decodes)
        problems = [decode.exception() for decode in decodes if not decode.cancelled()]
        for problem in problems:
            if problem is not None and not isinstance(problem, DeadlineExceeded):
                raise problem
        return problems.count(None)

    async def aclose(self) -> None:
        """Ends what is on its way; what has come can still be applied. Idempotent."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])

    def keep(self, chunk: ChunkHit, blob: memoryview, profile: Profile | None) -> None:
        """An object as it was read; in any thread."""
        header = codec.parse_header(blob)
        wanted = codec.Quality.RAW if self._wanted is None else self._wanted.quality
        whole = header.length_for(wanted)
        if whole > chunk.stored_bytes:  # the node lies: what was looked up is bounded by the layout, a header is not
            whole = len(blob)
        memory: npt.NDArray[np.uint8] = np.empty(max(whole, len(blob)), np.uint8)
        np.copyto(memory[: len(blob)], np.frombuffer(blob, np.uint8))
        self._kept[chunk.hash] = _Kept(header, memory, len(blob), len(blob), profile)

    def begin(self, wanted: Wanted) -> None:
        """Before the get reads: `wanted` is what it would have read at once."""
        self._wanted = wanted

    def go_on(self, node: Node, chunks: int, lease: Lease | None, into: KVArray, seconds: float) -> None:
        """After it has read `chunks` of them into `into`: fetches the rest of those within so many seconds."""
        assert self._wanted is not None
        self._wanted = replace(self._wanted, chunks=self._wanted.chunks[:chunks])
        self._into = into
        if self._lacking(chunks, self._wanted.quality):
            self._task = asyncio.create_task(self._fetch(node, lease, Deadline(seconds)))
            self._session.refining.add(self._task)
            self._task.add_done_callback(self._session.refining.discard)

    @property
    def _chunks(self) -> Sequence[ChunkHit]:
        return () if self._wanted is None or self._into is None else self._wanted.chunks

    @property
    def _tokens(self) -> int:
        return sum(chunk.tokens for chunk in self._chunks)

    async def _fetch(self, node: Node, lease: Lease | None, limit: Deadline) -> None:
        try:
            with self._session.timed(CALL):
                async with kept_alive(self._session, lease, RELEASE_S_MAX):
                    assert self._wanted is not None
                    quality = self._wanted.quality
                    for first, run in self._runs(self._lacking(len(self._chunks), quality)):
                        ids = lease.ids if lease is not None else ()
                        number = first // HASHES_MAX
                        lease_id = ids[number] if number < len(ids) else b""
                        await self._fetch_run(node, run, lease_id, limit, quality)
        except asyncio.CancelledError:
            self._error = ClientClosed("the refinement was given up before all had come")
        except KvClientError as error:
            self._error = error
            self._session.metrics.failures.labels(CALL, error.code.value).inc()
            self._session.warn(CALL, error.code, str(error))

    def _place(self, into: KVArray, chunk: ChunkHit) -> KVArray:
        """Where a chunk lies in what begins with the first that is read."""
        first = chunk.first_token - self._chunks[0].first_token
        return codec.token_slice(into, first, first + chunk.tokens)

    def _lacking(self, chunks: int, quality: Quality) -> list[int]:
        """Which of the first `chunks` chunks would read better at `quality`."""
        assert self._wanted is not None
        kept = [self._kept.get(chunk.hash) for chunk in self._wanted.chunks[:chunks]]  # what is whole need not be
        return [at for at, each in enumerate(kept) if each is not None and each.lacks(quality)]

    def _runs(self, indices: Sequence[int]) -> Iterator[tuple[int, list[ChunkHit]]]:
        """(index of its first, chunks) without gaps, each run under one lease."""
        for _, group in groupby(enumerate(indices), lambda each: (each[1] - each[0], each[1] // HASHES_MAX)):
            run = [at for _, at in group]
            yield run[0], [self._chunks[at] for at in run]

    async def _fetch_run(
        self, node: Node, run: Sequence[ChunkHit], lease_id: bytes, limit: Deadline, quality: Quality,
        timing: Timing | None = None, came: Callable[[ChunkHit], None] = lambda _: None,
    ) -> bool:  # fmt: skip
        """Whether all came; not where the node has no more, or `timing` ends it. `came` is told of each. Raises the
        typed error of what went wrong."""
        assert self._wanted is not None
        part = replace(
            self._wanted, chunks=run, first_chunk=self._wanted.first_chunk or self._wanted.chunks[0].hash,
            quality=quality, held_bytes=[self._kept[chunk.hash].held for chunk in run],
        )  # fmt: skip
        loop, count_received = asyncio.get_running_loop(), self._session.metrics.bytes_received.inc
        done = 0
        async with aclosing(Fetch(node, part, lease_id, limit, count_received)) as asked:
            objects = asked.objects()
            async with (
                aclosing(objects) as objects,
                aclosing(objects if timing is None else timing.objects(objects)) as timed,
            ):
                async for rest in timed:
                    kept = self._kept[run[done].hash]
                    try:
                        await loop.run_in_executor(self._session.executor, _put_behind, kept, rest.data, node.address)
                    finally:
                        rest.done()
                    came(run[done])
                    done += 1
            await asked.confirm()
        return done == len(run)

    def _decode(
        self, chunk: ChunkHit, place: KVArray, coder: DeadlineCoder, in_place: bool, timing: Timing | None = None
    ) -> None:  # fmt: skip
        """Raises DeadlineExceeded, LayoutError."""
        assert self._wanted is not None
        kept, wanted = self._kept[chunk.hash], self._wanted
        blob = kept.blob
        if in_place and len(blob) == kept.applied:
            return
        coder.check()
        began = time.perf_counter()
        codec.decode(
            blob, wanted.layout, quality=wanted.quality, out=place, chunk_hash=chunk.hash, part=wanted.part,
            profile=kept.profile, coder=coder,
        )  # fmt: skip
        if timing is not None:
            timing.decoded(kept.header, len(blob), time.perf_counter() - began)
        if in_place:
            kept.applied = len(blob)


def _put_behind(kept: _Kept, rest: memoryview, node: str) -> None:
    """What was lacking of an object, checked with what was here. Raises BadObject: it is another object by now."""
    held = kept.held + len(rest)
    if held not in kept.header.layer_bytes or held > len(kept.memory):
        raise ObjectForeign("an object is not the one that was read before", node=node, bytes=len(rest))
    np.copyto(kept.memory[kept.held : held], np.frombuffer(rest, np.uint8))
    try:
        codec.verify(kept.memory.data[:held])
    except codec.ObjectError as error:
        raise from_codec(error, node) from error
    kept.held = held
