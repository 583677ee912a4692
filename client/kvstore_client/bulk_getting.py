"""A get over a bulk connection: one request asks for the lookup and for the objects, one thread does all the rest.

What is exact is checked and copied into its place by the thread that receives it; what takes decoding goes to other
threads, while the next object arrives. Nothing that a node sends is trusted, as in `fetching.py`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import kvstore_codec as codec
from kvstore_client.coder import DeadlineCoder
from kvstore_client.connection import Node
from kvstore_client.deadline import Deadline
from kvstore_client.errors import DeadlineExceeded, KvClientError, Unavailable
from kvstore_client.fetching import Fetched, ProfileSource, decode_object, profile_named
from kvstore_client.lookups import good_enough, hits_of, lookup_request
from kvstore_client.pace import Timing
from kvstore_client.results import ChunkHit
from kvstore_client.transports.blob import Blob
from kvstore_client.transports.bulk_connection import BulkConnection
from kvstore_client.transports.bulk_path import result_of
from kvstore_client.transports.wanted import Wanted
from kvstore_codec import ChunkRef, KVArray, KVLayout, Profile, Quality

RECEIVED_AHEAD = 4  # objects that are here and not decoded
#: An exact object up to here is copied sooner than another thread would have taken it over.
AT_ONCE_BYTES_MAX = 2 << 20


@dataclass(frozen=True)
class Asked:
    """A get's question, of at most HASHES_MAX chunks. `out`: where to decode into; None: a new array. `first_chunk`:
    hash of the prompt's first chunk, where it is not among `refs`."""

    layout: KVLayout
    part: int
    refs: Sequence[ChunkRef]
    quality: Quality
    min_quality: Quality
    lease_ms: int
    out: KVArray | None
    first_chunk: bytes = b""

    def room(self, chunks: Sequence[ChunkHit]) -> KVArray:
        """For the first chunks of `refs`."""
        if self.out is not None:
            return self.out
        return codec.empty(self.layout.part_layout(self.part), sum(chunk.tokens for chunk in chunks))


@dataclass
class Got:
    """`stored`: how many chunks the node holds; `chunks`: those of them that are good enough; `into`: where they are
    decoded; `fetched`: how many of them are there."""

    stored: int
    chunks: Sequence[ChunkHit]
    into: KVArray
    fetched: Fetched


@dataclass(frozen=True)
class Tools:
    """What a get needs of its client. `profile_of` belongs to the event loop."""

    executor: Executor
    timing: Timing
    profile_of: ProfileSource


async def bulk_get(node: Node, asked: Asked, tools: Tools, found_by: Deadline, deadline: Deadline) -> Got | None:
    """None where there is no bulk path, or it broke before it brought anything. `found_by`: when the node has to have
    told what it holds, else it raises DeadlineExceeded, as it raises the typed error of what else is wrong until then.

    When it returns, raises or is cancelled, nothing writes to `asked.out` any more."""
    connection = await node.bulk.take(found_by)
    if connection is None:
        return None
    getting = _Getting(node, connection, asked, tools, found_by, deadline)
    running = node.bulk.start(connection, getting.run, deadline, node.bulk.gets)
    try:
        await _ended(running, getting.stop)
        got = result_of(running, node.address)
    except KvClientError as error:
        connection.close()
        node.bulk.failed(error)
        if isinstance(error, Unavailable):  # such as a connection to a node that was started anew since
            return None
        raise
    except BaseException:
        connection.close()
        raise
    if getting.broken is None and got.fetched.error is None:
        node.bulk.give_back(connection)
        return got
    connection.close()
    if getting.broken is not None:
        node.bulk.failed(getting.broken)
        if isinstance(getting.broken, Unavailable) and not getting.came:
            return None
    return got


async def _ended(running: asyncio.Future[Any], stop: Callable[[], None]) -> None:
    """Waits for `running`, and makes it stop where this is cancelled; it has ended in any case."""
    again: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:
            again = error
            stop()
    if again is not None:
        raise again


class _Getting:
    """`run` in a thread; `stop` from the event loop ends it soon.

    `broken`: what ended the connection before the request was answered whole; `came`: whether an object did."""

    def __init__(
        self, node: Node, connection: BulkConnection, asked: Asked, tools: Tools, found_by: Deadline, deadline: Deadline
    ) -> None:
        self._node, self._connection, self._asked, self._tools = node, connection, asked, tools
        self._found_by, self._deadline = found_by, deadline
        self._loop = asyncio.get_running_loop()
        self._coder = DeadlineCoder(deadline)
        self._ahead = threading.Semaphore(RECEIVED_AHEAD)
        self._stopped = threading.Event()
        self._outcomes: list[Future[None]] = []  # of the decodes, in order
        self._seen = 0  # of them, found good
        self._profiles: dict[bytes, Profile] = {}
        self._asking: Future[Profile] | None = None
        self.broken: KvClientError | None = None
        self.came = False

    def stop(self) -> None:
        self._stopped.set()
        self._coder.stop()
        self._ahead.release()
        if self._asking is not None:
            self._asking.cancel()
        self._connection.shutdown()

    def run(self) -> Got:
        """Raises what went wrong before it is known what there is."""
        asked, tools = self._asked, self._tools
        began = time.monotonic()
        answer = self._connection.get(
            lookup_request(asked.layout, asked.part, asked.refs, asked.lease_ms, asked.first_chunk), asked.quality,
            asked.min_quality, self._found_by, self._deadline.remaining(),
        )  # fmt: skip
        tools.timing.answered(time.monotonic() - began)
        stored = hits_of(self._node.address, asked.layout, asked.part, asked.refs, answer)
        chunks = good_enough(stored, asked.min_quality)
        into = asked.room(chunks)
        wanted = Wanted(asked.layout, asked.part, chunks, asked.quality, asked.min_quality, asked.first_chunk)
        error = self._fetch(wanted, into)
        return Got(len(stored), chunks, into, self._counted(error))

    def _fetch(self, wanted: Wanted, into: KVArray) -> KvClientError | None:
        """What ended it early."""
        problem, in_place = None, False
        last_s = time.monotonic()
        try:
            for index, found in enumerate(self._connection.objects(wanted, self._deadline)):
                asked_s = time.monotonic()
                if not self._ahead.acquire(timeout=self._deadline.remaining()):
                    raise DeadlineExceeded("the call's deadline passed", seconds=self._deadline.seconds)
                waited_s = time.monotonic() - asked_s
                if isinstance(found, memoryview):
                    in_place = True
                    blob = Blob(found, self._ahead.release, in_place=True)
                    self._tools.timing.received(len(found))
                else:
                    blob = self._received(found)
                self.came = True
                now_s = time.monotonic()
                self._tools.timing.came(len(blob.data), now_s - last_s, waited_s, now_s)
                problem = problem or self._problem()
                if problem is None:
                    self._outcomes.append(self._decode(wanted, index, blob, into))
                else:
                    blob.done()
                    if not in_place:
                        return problem
                    # The rest is let pass: what was read in place is to be confirmed behind it.
                last_s = time.monotonic()
        except KvClientError as error:
            problem, self.broken = problem or error, error
        finally:
            self._settle()
        if in_place and self.broken is None:
            try:
                self._connection.release(self._deadline)
            except KvClientError as error:
                problem, self.broken = problem or error, error
        if in_place and self.broken is not None:  # of what was read in place, nobody can say any more
            self._outcomes.clear()
        return problem

    def _received(self, size: int) -> Blob:
        buffers = self._node.bulk.buffers
        buffer, view = buffers.take(size)
        self._connection.receive_into(view, self._deadline, self._tools.timing.received)

        def done() -> None:
            buffers.give_back(buffer)
            self._ahead.release()

        return Blob(view, done)

    def _decode(self, wanted: Wanted, index: int, blob: Blob, into: KVArray) -> Future[None]:
        """What becomes of an object: known at once where it is exact and not large, else when a thread has decoded
        it."""
        chunk = wanted.chunks[index]
        first = chunk.first_token - wanted.chunks[0].first_token
        place = codec.token_slice(into, first, first + chunk.tokens)
        decode = partial(decode_object, self._node, wanted, chunk, blob, place, self._coder)
        if chunk.quality is Quality.RAW and len(blob.data) <= AT_ONCE_BYTES_MAX:
            try:
                decode(None, self._tools.timing)
            except KvClientError as error:
                return _failed(error)
            return _WELL
        try:
            named = None if chunk.quality is Quality.RAW else profile_named(wanted, chunk, blob.data)
            profile = None if named is None else self._profile(named)
        except KvClientError as error:
            blob.done()
            return _failed(error)
        return self._tools.executor.submit(decode, profile, self._tools.timing)

    def _profile(self, profile_id: bytes) -> Profile:
        """Raises the typed error of why it cannot be had."""
        if profile_id not in self._profiles:
            asking = asyncio.run_coroutine_threadsafe(self._tools.profile_of(profile_id), self._loop)
            self._asking = asking
            if self._stopped.is_set():
                asking.cancel()
            try:
                self._profiles[profile_id] = asking.result(self._deadline.remaining())
            except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
                asking.cancel()
                raise DeadlineExceeded("the call's deadline passed", seconds=self._deadline.seconds) from None
        return self._profiles[profile_id]

    def _problem(self) -> KvClientError | None:
        """Of the decodes that are done, what the first bad one found."""
        while self._seen < len(self._outcomes) and self._outcomes[self._seen].done():
            if (error := self._outcomes[self._seen].exception()) is not None:
                return _typed(error)
            self._seen += 1
        return None

    def _settle(self) -> None:
        """Waits for the decodes up to the deadline; then none runs any more."""
        concurrent.futures.wait(self._outcomes, self._deadline.remaining())
        self._coder.stop()
        for outcome in self._outcomes:
            outcome.cancel()
        # Not for those that never began: of them a busy executor takes notice late.
        concurrent.futures.wait([outcome for outcome in self._outcomes if not outcome.done()])

    def _counted(self, error: KvClientError | None) -> Fetched:
        fetched = Fetched(error=error)
        for outcome in self._outcomes:
            if outcome.cancelled():
                fetched.error = error or DeadlineExceeded("the call's deadline passed", seconds=self._deadline.seconds)
                break
            if (problem := outcome.exception()) is not None:
                fetched.error = _typed(problem)
                break
            fetched.chunks += 1
        return fetched


def _failed(error: KvClientError) -> Future[None]:
    outcome: Future[None] = Future()
    outcome.set_exception(error)
    return outcome


def _typed(error: BaseException) -> KvClientError:
    if not isinstance(error, KvClientError):
        raise error
    return error


_WELL: Future[None] = Future()
_WELL.set_result(None)
