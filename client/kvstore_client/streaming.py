"""Stream: a prompt's KV layer by layer, out of what is stored and what a writer is writing meanwhile.

What is stored is fetched as a get does; where it ends, a live write may go on (writing.py). Its layers are received
and decoded as they come, however slowly they are taken: the memory is that of the KV itself. As everywhere, nothing
that a node sends is trusted: lengths are bounded by the layout, pieces come in order, and every object's identity,
layer, position, quality and checksums are compared before its layer is handed over.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import kvstore_codec as codec
from kvstore_client.connection import Node
from kvstore_client.deadline import Deadline
from kvstore_client.errors import KvClientError
from kvstore_client.fetching import Fetched, fetch
from kvstore_client.following import LiveReader, StreamAsked
from kvstore_client.lookups import good_enough
from kvstore_client.metrics import ABSENT, QUALITY
from kvstore_client.results import ChunkHit, Hit
from kvstore_client.session import Session
from kvstore_client.transports.wanted import Wanted
from kvstore_codec import Profile
from kvstore_proto.v1.framing import HASHES_MAX

CALL = "stream"
ABORTED = "aborted"
LEASE_MARGIN_S = 1.0
MS_MAX = 2**32 - 1  # as the protocol can say it

#: (node, hit, why no more) of a lookup, given a lease's milliseconds and a deadline; no node where none answered
Find = Callable[[int, Deadline], Awaitable[tuple[Node | None, Hit, str]]]
ProfileOf = Callable[[Node, bytes, Deadline], Coroutine[Any, Any, Profile]]
Layer = tuple[int, Any, Any]


@dataclass
class Progress:
    """How far a stream came. See AsyncStream."""

    tokens: int = 0
    layers: int = 0
    complete: bool = False
    reason: str = ""


class AsyncStream:
    """The layers of a prompt, for one `async for`; made by `AsyncNamespace.stream`, see there.

    `tokens`: that every layer covers, known from the first layer on. `layers`: handed over so far. `complete`: all
    layers were. `reason`: why there are not all tokens, or not all layers, in the end: "" (there are), "absent"
    (nobody stored or wrote them), "quality" (what there is, is worse than min_quality), "aborted" (the writer gave up
    or died) or the code of an error.
    """

    def __init__(self, session: Session, asked: StreamAsked, find: Find, profile_of: ProfileOf) -> None:
        self._progress = Progress()
        # It knows nothing of this object, so that one that is dropped ends its calls.
        self._generator = _stream(session, asked, find, profile_of, self._progress)

    @property
    def tokens(self) -> int:
        return self._progress.tokens

    @property
    def layers(self) -> int:
        return self._progress.layers

    @property
    def complete(self) -> bool:
        return self._progress.complete

    @property
    def reason(self) -> str:
        return self._progress.reason

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Layer:
        return await anext(self._generator)

    async def aclose(self) -> None:
        """Lets go of what is still on its way. Idempotent; not needed after the last layer."""
        await self._generator.aclose()


async def _stream(
    session: Session, asked: StreamAsked, find: Find, profile_of: ProfileOf, progress: Progress
) -> AsyncGenerator[Layer, None]:  # fmt: skip
    if not asked.refs:
        return
    source = _Source(session, asked, find, profile_of)
    try:
        async for layer in source.layers(progress):
            yield layer
            progress.layers += 1
        progress.complete = progress.layers == source.layout.num_layers
    except KvClientError as error:
        progress.reason = error.code.value
        session.metrics.failures.labels(CALL, progress.reason).inc()
        session.forgive(CALL, error)
    finally:
        await source.aclose()
        if progress.reason:
            session.metrics.misses.labels(progress.reason).inc()
        tokens = progress.tokens if progress.complete else 0
        session.metrics.tokens_hit.inc(tokens)
        session.metrics.tokens_missed.inc(asked.tokens - tokens)


class _Source:
    """What one stream reads from: fetches of what is stored, and at most one live write behind them."""

    def __init__(self, session: Session, asked: StreamAsked, find: Find, profile_of: ProfileOf) -> None:
        self.layout = asked.layout.part_layout(asked.part)
        self._session, self._asked, self._find, self._profile_of = session, asked, find, profile_of
        self._into = codec.empty(self.layout, asked.tokens)
        self._stored = 0  # chunks that are stored, and being fetched
        self._fetches: list[tuple[int, asyncio.Task[Fetched]]] = []
        self._reader: LiveReader | None = None
        self._asked_again = False
        self._reason = ABSENT

    async def layers(self, progress: Progress) -> AsyncGenerator[Layer, None]:
        """Raises the typed error of what ended a live write's layers, once there was one."""
        asked = self._asked
        limit = Deadline(asked.wait_s + asked.deadline_s)
        followed = await self._rendezvous(limit)
        chunks = await self._fetched(limit)
        if followed is not None and chunks == self._stored and await self._has_begun(followed, limit):
            chunks = followed.end
        else:
            followed = None
        progress.tokens = sum(ref.tokens for ref in asked.refs[:chunks])
        progress.reason = self._reason if chunks < len(asked.refs) else ""
        for layer in range(self.layout.num_layers if progress.tokens else 0):
            if followed is not None and layer and not await followed.next_layer(Deadline(asked.deadline_s)):
                progress.reason = ABORTED
                return
            k, v = self._into[layer]
            yield layer, k[: progress.tokens], v[: progress.tokens]

    async def aclose(self) -> None:
        """When it returns, nothing is on its way any more."""
        for _, fetching in self._fetches:
            fetching.cancel()
        if self._fetches:
            await asyncio.wait([fetching for _, fetching in self._fetches])
        if self._reader is not None:
            await self._reader.aclose()

    async def _rendezvous(self, limit: Deadline) -> LiveReader | None:
        """Begins to fetch what is stored, and to follow what is written behind that, if anybody does."""
        asked, wait = self._asked, Deadline(self._asked.wait_s)
        while True:
            lease_ms = int((limit.remaining() + LEASE_MARGIN_S) * 1000)
            node, hit, self._reason = await self._find(min(lease_ms, MS_MAX), Deadline(limit.remaining()))
            usable = good_enough(hit.chunks, asked.floor)
            if len(usable) < len(hit.chunks):
                self._reason = QUALITY
            new = usable[self._stored :]
            if node is None or (self._asked_again and not new):
                return None
            if new:
                self._fetch(node, new, hit.lease.ids if hit.lease is not None else (), limit)
            if self._stored == len(asked.refs) or len(asked.refs) > HASHES_MAX:
                return None
            reader = self._reader = LiveReader(node, self._session, asked, self._stored, self._into)
            try:
                found = await reader.open(wait, limit)
            except KvClientError as error:  # what is stored is of use without it
                self._forgive(error)
                return None
            if found != "stored":
                return reader if found == "found" else None
            await reader.aclose()
            self._asked_again = True

    def _fetch(self, node: Node, chunks: Sequence[ChunkHit], lease_ids: Sequence[bytes], limit: Deadline) -> None:
        asked = self._asked
        place = codec.token_slice(self._into, chunks[0].first_token, chunks[-1].first_token + chunks[-1].tokens)
        fetching = fetch(
            node, Wanted(asked.layout, asked.part, chunks, asked.wanted, asked.floor), lease_ids, place,
            self._session.executor, limit, self._session.metrics.bytes_received.inc,
            lambda profile_id: self._profile_of(node, profile_id, limit),
        )  # fmt: skip
        self._fetches.append((len(chunks), asyncio.create_task(fetching)))
        self._stored += len(chunks)

    async def _fetched(self, limit: Deadline) -> int:
        """Chunks of the stored prefix that came intact."""
        intact = 0
        for expected, fetching in self._fetches:
            fetched = await fetching
            intact += fetched.chunks
            if fetched.error is not None:
                self._forgive(fetched.error)
            if fetched.chunks < expected:
                break
        return intact

    async def _has_begun(self, reader: LiveReader, limit: Deadline) -> bool:
        """Whether its first layer has come; without, what is stored is all there is."""
        try:
            begun = await reader.next_layer(limit)
        except KvClientError as error:
            self._forgive(error)
            return False
        if not begun:
            self._reason = ABORTED
        return begun

    def _forgive(self, error: KvClientError) -> None:
        self._reason = error.code.value
        self._session.metrics.failures.labels(CALL, self._reason).inc()
        self._session.forgive(CALL, error)
