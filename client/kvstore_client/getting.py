"""Gets of one namespace: over the bulk path lookup and objects in one request, else a lookup and then fetches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import kvstore_codec as codec
from kvstore_client.arguments import LEASE_MS_MAX, check_first_token, qualities
from kvstore_client.bulk_getting import bulk_get, direct_get
from kvstore_client.connection import Node, timeout_s, worth_another_node
from kvstore_client.deadline import Deadline
from kvstore_client.deleting import LostChunks
from kvstore_client.errors import InvalidArgument, KvClientError, ProfileMissing
from kvstore_client.fetching import Fetched, ProfileSource, fetch
from kvstore_client.kv_views import sliceable
from kvstore_client.lookups import good_enough, lookup
from kvstore_client.metrics import ABSENT, QUALITY, SLOWER
from kvstore_client.namespace_profiles import NamespaceProfiles
from kvstore_client.namespace_puts import TokenIds
from kvstore_client.pace import RefinePace, Timing
from kvstore_client.planned import Goal, NamespacePlanner, checked_goal
from kvstore_client.planner.costs import PrefillSeconds
from kvstore_client.planner.refine import Refine
from kvstore_client.receiving import Asked, Got, Tools
from kvstore_client.refining import AsyncRefinement
from kvstore_client.results import Hit, Restored
from kvstore_client.session import Session
from kvstore_client.transports.wanted import Wanted
from kvstore_codec import ChunkRef, KVArray, KVLayout, Quality
from kvstore_proto.v1.framing import HASHES_MAX

#: Beyond a get's own deadline, so that a slow clock does not evict what is being read.
LEASE_MARGIN_MS = 1_000


class GetCall(NamedTuple):
    """A get: of which chunks (those of `prompt` from `first_token` on that `out` has room for), how, by when.
    `tokens`: how many were asked for."""

    prompt: Sequence[ChunkRef]
    refs: Sequence[ChunkRef]
    tokens: int
    first_token: int
    quality: Quality
    min_quality: Quality
    out: KVArray | None
    limit: Deadline
    goal: Goal | None
    refine: bool
    node: str  # to ask first, by its address; "": the prompt's own

    @property
    def first_chunk(self) -> bytes:
        """Hash of the prompt's first chunk, where it is not among `refs`."""
        return self.prompt[0].hash if self.first_token and self.prompt else b""


class Came(NamedTuple):
    """`tokens` of a get are in `into`; `reason`: as of Restored."""

    into: KVArray
    tokens: int = 0
    reason: str = ""


class Gets:
    """`refs_of`: all chunks of some tokens; `key_of`: where a prompt lives."""

    def __init__(
        self, session: Session, layout: KVLayout, part: int, refs_of: Callable[[TokenIds], list[ChunkRef]],
        key_of: Callable[[Sequence[ChunkRef]], bytes], planner: NamespacePlanner, profiles: NamespaceProfiles,
        lost: LostChunks,
    ) -> None:  # fmt: skip
        self._session, self._layout, self._part = session, layout, part
        self._part_layout = layout.part_layout(part)
        self._refs_of, self._key_of = refs_of, key_of
        self._planner, self._profiles, self._lost = planner, profiles, lost

    def called(
        self, token_ids: TokenIds, *, quality: str | Quality | None, min_quality: str | Quality, out: KVArray | None,
        first_token: int, ttft: float | None, prefill_tokens_per_s: float | PrefillSeconds | None, refine: bool,
        node: str, deadline: float | None,
    ) -> GetCall:  # fmt: skip
        """A get that is called now. Raises LayoutError (shape, dtype), InvalidArgument, ClientClosed."""
        limit = self._session.begin(deadline)
        goal = checked_goal(ttft, prefill_tokens_per_s, len(token_ids))  # type: ignore[arg-type]
        wanted, floor = qualities(quality, min_quality)
        check_first_token(self._layout, first_token)
        if refine and first_token:
            raise InvalidArgument("a get that is refined starts at the first token", first_token=first_token)
        prompt = self._refs_of(token_ids)
        refs = prompt[first_token // self._layout.chunk_tokens :]
        tokens = refs[-1].first_token + refs[-1].tokens - first_token if refs else 0
        if out is not None:
            out = sliceable(out, self._part_layout)
            room = codec.token_count(out, self._part_layout)
            refs = [ref for ref in refs if ref.first_token + ref.tokens - first_token <= room]
        return GetCall(prompt, refs, tokens, first_token, wanted, floor, out, limit, goal, refine, node)

    async def get(self, call: GetCall) -> Restored[AsyncRefinement]:
        """See AsyncNamespace.get.

        A get that is to be refined, or follows a plan, looks up first: it needs the lease, or has to choose."""
        refinement = AsyncRefinement(self._session, self._part_layout) if call.refine else None
        with self._session.timed("get"):
            came = await self._get(call, refinement) if call.refs else Came(self._asked(call).room(()))
        return self._restored(call, came, refinement)

    def get_directly(self, call: GetCall, loop: asyncio.AbstractEventLoop) -> Restored[AsyncRefinement] | None:
        """`get` in the calling thread, over a connection that lies ready; `loop` is the client's. None where there is
        none, where there is more to it than one request, or where it is worth asking again: then `get` is to follow."""
        if call.goal is not None or call.refine or not 0 < len(call.refs) <= HASHES_MAX:
            return None
        session, asked, began_s = self._session, self._asked(call), time.monotonic()
        at_hand = session.at_hand(self._key_of(call.prompt), call.node)
        if at_hand is None:
            return None
        node, sharing = at_hand
        try:
            found_by = Deadline(timeout_s(call.limit, sharing))
            got = direct_get(node, asked, self._tools(node, call.limit, loop), found_by, call.limit)
        except KvClientError as error:
            loop.call_soon_threadsafe(session.unanswered, node, error, began_s)
            if worth_another_node(error):
                return None
            session.failed(node, "get", error)
            came = self._missed(asked, error)
        else:
            if got is None:
                return None
            session.answered(node)
            came = self._came(node, got, call)
        session.metrics.seconds.labels("get").observe(time.monotonic() - began_s)
        return self._restored(call, came, None)

    async def _get(self, call: GetCall, refinement: AsyncRefinement | None) -> Came:
        asked, limit = self._asked(call), call.limit

        async def ask(node: Node, seconds: float) -> Got | Hit:
            found_by = Deadline(seconds)
            if call.goal is None and refinement is None and len(call.refs) <= HASHES_MAX:
                tools = self._tools(node, limit, asyncio.get_running_loop())
                if (got := await bulk_get(node, asked, tools, found_by, limit)) is not None:
                    return got
            return await timed_lookup(
                self._session, node, self._layout, self._part, call.refs, asked.lease_ms, found_by.remaining(),
                asked.first_chunk,
            )  # fmt: skip

        try:
            node, answer = await self._session.attempt("get", self._key_of(call.prompt), limit, ask, call.node)
        except KvClientError as error:
            return self._missed(asked, error)
        got = answer if isinstance(answer, Got) else await self._fetched(
            node, answer, asked, limit, call.goal, refinement
        )  # fmt: skip
        came = self._came(node, got, call)
        if refinement is not None and isinstance(answer, Hit):
            refinement.go_on(node, got.fetched.chunks, answer.lease, got.into, limit.seconds)
        return came

    def _asked(self, call: GetCall) -> Asked:
        lease_ms = min(int(call.limit.remaining() * 1000) + LEASE_MARGIN_MS, LEASE_MS_MAX)
        return Asked(
            self._layout, self._part, call.refs, call.quality, call.min_quality, lease_ms, call.out, call.first_chunk
        )  # fmt: skip

    def _tools(self, node: Node, limit: Deadline, loop: asyncio.AbstractEventLoop) -> Tools:
        session = self._session
        return Tools(
            session.executor, session.threads, self._planner.timing(node), self._profile_of(node, limit), loop
        )  # fmt: skip

    def _missed(self, asked: Asked, error: KvClientError) -> Came:
        """Nothing, for this reason; raised where the client is strict."""
        self._session.forgive("get", error)
        self._session.count_miss(error.code.value)
        return Came(asked.room(()), 0, error.code.value)

    def _came(self, node: Node, got: Got, call: GetCall) -> Came:
        """What is there. Counts what is not, and raises it where the client is strict."""
        problem = got.fetched.error
        if problem is not None:
            if isinstance(problem, ProfileMissing):
                self._lost.add(got.chunks[got.fetched.chunks :])
            self._session.failed(node, "get", problem)
            self._session.forgive("get", problem)
        reason = ""
        if got.fetched.chunks < len(call.refs):
            stopped = got.fetched.stopped
            reason = _reason(got) if stopped is None else stopped.value
            self._session.count_miss(reason if stopped is None else SLOWER)
        return Came(got.into, sum(chunk.tokens for chunk in got.chunks[: got.fetched.chunks]), reason)

    def _restored(self, call: GetCall, came: Came, refinement: AsyncRefinement | None) -> Restored[AsyncRefinement]:
        self._session.metrics.tokens_hit.inc(came.tokens)
        self._session.metrics.tokens_missed.inc(call.tokens - came.tokens)
        return Restored(codec.token_slice(came.into, 0, came.tokens), came.tokens, refinement, came.reason)

    async def _fetched(
        self, node: Node, hit: Hit, asked: Asked, limit: Deadline, goal: Goal | None,
        refinement: AsyncRefinement | None,
    ) -> Got:  # fmt: skip
        """What a lookup found, fetched."""
        chunks = good_enough(hit.chunks, asked.min_quality)
        into = asked.room(chunks)
        kept = refinement  # what came coarsely
        if goal is not None and kept is None:
            kept = AsyncRefinement(self._session, self._layout.part_layout(self._part))
        lease_ids = hit.lease.ids if hit.lease is not None else ()

        async def fetch_part(part: Wanted, room: KVArray, timing: Timing) -> Fetched:
            before = (part.chunks[0].first_token - asked.refs[0].first_token) // self._layout.chunk_tokens
            finer = any(max(chunk.quality, asked.quality) < part.quality for chunk in part.chunks)
            return await fetch(
                node, part, lease_ids[before // HASHES_MAX :], room, self._session.executor, limit, timing.received,
                self._profile_of(node, limit), timing,
                kept.keep if kept is not None and (finer or refinement is not None) else None,
            )  # fmt: skip

        async def improve(refine: Refine, pace: Callable[[Iterator[int]], RefinePace]) -> int:
            assert kept is not None
            return await kept.improve(node, refine.last, refine.quality, into, lease_ids, pace, limit)

        wants = Wanted(self._layout, self._part, chunks, asked.quality, asked.min_quality, asked.first_chunk)
        if kept is not None:
            kept.begin(wants)
        if refinement is not None:
            wants = wants if goal is not None else replace(wants, quality=asked.min_quality)
        if not chunks:
            fetched = Fetched()
        elif goal is None:
            fetched = await fetch_part(wants, into, self._planner.timing(node))
        else:
            fetched = await self._planner.fetch(goal, node, wants, into, fetch_part, improve)
        return Got(len(hit.chunks), chunks, into, fetched)

    def _profile_of(self, node: Node, limit: Deadline) -> ProfileSource:
        return lambda profile_id: self._profiles.of_object(node, profile_id, limit)


async def timed_lookup(
    session: Session, node: Node, layout: KVLayout, part: int, refs: Sequence[ChunkRef], lease_ms: int,
    timeout_s: float, first_chunk: bytes = b"",
) -> Hit:  # fmt: skip
    """`lookup`, which tells how far away the node is."""
    began = time.monotonic()
    connected = node.is_connected
    hit = await lookup(
        node, layout, part, refs, lease_ms=lease_ms, timeout_s=timeout_s, first_chunk=first_chunk
    )  # fmt: skip
    now, peer = time.monotonic(), session.peers[node.address]
    peer.latency.observe(now - began, connected=connected)
    peer.link.answered(now - began, now)
    return replace(hit, latency_s=peer.latency.expected)


def _reason(got: Got) -> str:
    """Why a get that brought less than all did, where the planner had no part in it."""
    if got.fetched.error is not None:
        return got.fetched.error.code.value
    return QUALITY if got.fetched.chunks == len(got.chunks) < got.stored else ABSENT
