"""The thread of a get over a bulk connection: asks, receives, and has decoded, all in blocking calls.

What is raw is checked and copied into its place by the thread that receives it, in pieces as they come, or of objects
in the node's memory together with the threads that decode (raw_objects.py); what takes decoding goes to those, while
the next object arrives. Nothing that a node sends is trusted, as in `fetching.py`.
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
from itertools import pairwise

import kvstore_codec as codec
from kvstore_client.coder import DeadlineCoder
from kvstore_client.connection import Node
from kvstore_client.deadline import Deadline
from kvstore_client.errors import DeadlineExceeded, KvClientError
from kvstore_client.fetching import Fetched, ProfileSource, decode_object, profile_named
from kvstore_client.lookups import good_enough, hits_of, lookup_request
from kvstore_client.pace import Timing
from kvstore_client.raw_objects import RawObjects
from kvstore_client.results import ChunkHit
from kvstore_client.transports.blob import Blob
from kvstore_client.transports.bulk_connection import BulkConnection
from kvstore_client.transports.wanted import Wanted
from kvstore_codec import ChunkRef, KVArray, KVLayout, Profile, Quality

RECEIVED_AHEAD = 4  # objects that are here and not decoded
#: So much is copied sooner than another thread would have taken it over.
SHARE_BYTES_MIN = 2 << 20
#: Decodes one object.
Decode = Callable[["Profile | None", Timing], None]


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
    """What a get needs of its client. `threads`: of `executor`, which decode. `profile_of` belongs to `loop`."""

    executor: Executor
    threads: int
    timing: Timing
    profile_of: ProfileSource
    loop: asyncio.AbstractEventLoop


class Receiving:
    """`run` in a thread; `stop` from another ends it soon.

    `broken`: what ended the connection before the request was answered whole; `came`: whether an object did."""

    def __init__(
        self, node: Node, connection: BulkConnection, asked: Asked, tools: Tools, found_by: Deadline, deadline: Deadline
    ) -> None:
        self._node, self.connection, self._asked, self._tools = node, connection, asked, tools
        self._found_by, self._deadline = found_by, deadline
        self._coder = DeadlineCoder(deadline)
        self._ahead = threading.Semaphore(RECEIVED_AHEAD)
        self._stopped = threading.Event()
        self._outcomes: list[Future[Fetched]] = []  # of the decodes, in order
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
        self.connection.shutdown()

    def run(self) -> Got:
        """Raises what went wrong before it is known what there is."""
        asked, tools = self._asked, self._tools
        began = time.monotonic()
        answer = self.connection.get(
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
        problem, in_place, index = None, False, 0
        raw: RawObjects | None = None
        last_s = time.monotonic()
        try:
            for found in self.connection.objects(wanted, self._deadline):
                raw = raw or self._raw_objects(wanted, into)
                in_place |= isinstance(found, list)
                blobs, waited_s = self._arrived(raw, index, found)
                self.came = True
                now_s = time.monotonic()
                size_bytes = sum(map(len, found)) if isinstance(found, list) else found
                self._tools.timing.came(size_bytes, now_s - last_s, waited_s, now_s)
                problem = problem or self._problem()
                if problem is None:
                    self._decode(raw, wanted, index, blobs, into)
                else:
                    for blob in blobs:
                        blob.done()
                    if not in_place:
                        return problem
                    # The rest is let pass: what was read in place is to be confirmed behind it.
                index += len(found) if isinstance(found, list) else 1
                last_s = time.monotonic()
        except KvClientError as error:
            problem, self.broken = problem or error, error
        finally:
            if raw is not None:
                raw.close()
            self._settle()
        if in_place and self.broken is None:
            try:
                self.connection.release(self._deadline)
            except KvClientError as error:
                problem, self.broken = problem or error, error
        if in_place and self.broken is not None:  # of what was read in place, nobody can say any more
            self._outcomes.clear()
        return problem

    def _raw_objects(self, wanted: Wanted, into: KVArray) -> RawObjects:
        timing = self._tools.timing

        def decode(index: int, blob: Blob) -> None:
            self._decode_of(wanted, index, blob, into)(None, timing)

        return RawObjects(self._node, wanted, into, timing, self._coder, decode)

    def _arrived(self, raw: RawObjects, index: int, found: list[memoryview] | int) -> tuple[list[Blob], float]:
        """What there is to decode of the objects from chunk `index` on, and for how many seconds they waited for us."""
        if isinstance(found, list):
            self._tools.timing.received(sum(map(len, found)))
            return [Blob(place, in_place=True) for place in found], 0.0
        begin, waited_s = memoryview(b""), 0.0
        if raw.are(index, found):
            arrived = raw.receive(self.connection, index, found, self._deadline)
            begin, waited_s = arrived.left, arrived.copying_s
            if not begin:
                self._outcomes.append(_outcome(Fetched(int(arrived.error is None), arrived.error)))
                return [], waited_s
        waited_s += self._wait_for_turn()
        return [self._received(found, begin)], waited_s

    def _wait_for_turn(self) -> float:
        """Until few enough objects are here; how many seconds that took."""
        asked_s = time.monotonic()
        if not self._ahead.acquire(timeout=self._deadline.remaining()):
            raise DeadlineExceeded("the call's deadline passed", seconds=self._deadline.seconds)
        return time.monotonic() - asked_s

    def _received(self, size: int, begin: memoryview) -> Blob:
        """An object that begins with what has been received already."""
        buffers = self._node.bulk.buffers
        buffer, view = buffers.take(size)
        view[: len(begin)] = begin
        self.connection.receive_into(view[len(begin) :], self._deadline, self._tools.timing.received)

        def done() -> None:
            buffers.give_back(buffer)
            self._ahead.release()

        return Blob(view, done)

    def _decode(
        self, raw: RawObjects, wanted: Wanted, index: int, blobs: Sequence[Blob], into: KVArray
    ) -> None:  # fmt: skip
        """Of the objects from chunk `index` on: here what is raw and in place, else in other threads."""
        chunks = wanted.chunks[index : index + len(blobs)]
        if blobs and blobs[0].in_place and all(chunk.quality is Quality.RAW for chunk in chunks):
            self._copy(raw, index, blobs)
            return
        for at, blob in enumerate(blobs, index):
            self._outcomes.append(
                self._elsewhere(wanted, wanted.chunks[at], blob, self._decode_of(wanted, at, blob, into))
            )  # fmt: skip

    def _decode_of(self, wanted: Wanted, index: int, blob: Blob, into: KVArray) -> Decode:
        chunk = wanted.chunks[index]
        first = chunk.first_token - wanted.chunks[0].first_token
        place = codec.token_slice(into, first, first + chunk.tokens)
        return partial(decode_object, self._node, wanted, chunk, blob, place, self._coder)

    def _copy(self, raw: RawObjects, index: int, blobs: Sequence[Blob]) -> None:
        """In as many shares as pay, one of them by this thread, and those that no other thread had time for."""
        size_bytes = sum(len(blob.data) for blob in blobs)
        count = min(self._tools.threads, len(blobs), max(1, size_bytes // SHARE_BYTES_MIN))
        bounds = [len(blobs) * share // count for share in range(count + 1)]
        *others, mine = ((index + first, blobs[first:last]) for first, last in pairwise(bounds))
        begun = len(self._outcomes)
        # Noted before this thread does its own: whatever interrupts that, they have ended when the get has.
        self._outcomes += [self._tools.executor.submit(raw.copy, *share) for share in others]
        self._outcomes.append(_outcome(raw.copy(*mine)))
        for at, share in enumerate(others, begun):
            if self._outcomes[at].cancel():
                self._outcomes[at] = _outcome(raw.copy(*share))

    def _elsewhere(self, wanted: Wanted, chunk: ChunkHit, blob: Blob, decode: Decode) -> Future[Fetched]:
        try:
            named = None if chunk.quality is Quality.RAW else profile_named(wanted, chunk, blob.data)
            profile = None if named is None else self._profile(named)
        except KvClientError as error:
            blob.done()
            return _outcome(Fetched(error=error))
        return self._tools.executor.submit(_decoded, decode, profile, self._tools.timing)

    def _profile(self, profile_id: bytes) -> Profile:
        """Raises the typed error of why it cannot be had."""
        if profile_id not in self._profiles:
            asking = asyncio.run_coroutine_threadsafe(self._tools.profile_of(profile_id), self._tools.loop)
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
            if (error := self._outcomes[self._seen].result().error) is not None:
                return error
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
            some = outcome.result()
            fetched.chunks += some.chunks
            if some.error is not None:
                fetched.error = some.error
                break
        return fetched


def _decoded(decode: Decode, profile: Profile | None, timing: Timing) -> Fetched:
    try:
        decode(profile, timing)
    except KvClientError as error:
        return Fetched(error=error)
    return Fetched(1)


def _outcome(fetched: Fetched) -> Future[Fetched]:
    outcome: Future[Fetched] = Future()
    outcome.set_result(fetched)
    return outcome
