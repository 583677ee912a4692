"""Gets of one namespace: over the bulk path lookup and objects in one request, else a lookup and then fetches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import kvstore_codec as codec
from kvstore_client.arguments import LEASE_MS_MAX
from kvstore_client.bulk_getting import Asked, Got, Tools, bulk_get
from kvstore_client.connection import Node
from kvstore_client.deadline import Deadline
from kvstore_client.deleting import LostChunks
from kvstore_client.errors import KvClientError, ProfileMissing
from kvstore_client.fetching import Fetched, ProfileSource, fetch
from kvstore_client.lookups import good_enough, lookup
from kvstore_client.metrics import ABSENT, QUALITY, SLOWER
from kvstore_client.namespace_profiles import NamespaceProfiles
from kvstore_client.pace import RefinePace, Timing
from kvstore_client.planned import Goal, NamespacePlanner
from kvstore_client.planner.refine import Refine
from kvstore_client.refining import AsyncRefinement
from kvstore_client.results import Hit
from kvstore_client.session import Session
from kvstore_client.transports.wanted import Wanted
from kvstore_codec import ChunkRef, KVArray, KVLayout, Quality
from kvstore_proto.v1.framing import HASHES_MAX

#: Beyond a get's own deadline, so that a slow clock does not evict what is being read.
LEASE_MARGIN_MS = 1_000


class Gets:
    def __init__(
        self, session: Session, layout: KVLayout, part: int, planner: NamespacePlanner, profiles: NamespaceProfiles,
        lost: LostChunks,
    ) -> None:  # fmt: skip
        self._session, self._layout, self._part = session, layout, part
        self._planner, self._profiles, self._lost = planner, profiles, lost

    async def get(
        self, refs: Sequence[ChunkRef], key: bytes, wanted: Quality, floor: Quality, out: KVArray | None,
        limit: Deadline, goal: Goal | None, refinement: AsyncRefinement | None = None, first_chunk: bytes = b"",
        first_node: str = "",
    ) -> tuple[KVArray, int, str]:  # fmt: skip
        """See AsyncNamespace.get, and Restored for the reason. `refs`: at least one; `key`: where the prompt is placed;
        `out` is sliceable. `first_chunk`: hash of the prompt's first chunk, where it is not among `refs`. `first_node`:
        the node that is asked first.

        A get that is to be refined, or follows a plan, looks up first: it needs the lease, or has to choose."""
        lease_ms = min(int(limit.remaining() * 1000) + LEASE_MARGIN_MS, LEASE_MS_MAX)
        asked = Asked(self._layout, self._part, refs, wanted, floor, lease_ms, out, first_chunk)

        async def ask(node: Node, timeout_s: float) -> Got | Hit:
            found_by = Deadline(timeout_s)
            if goal is None and refinement is None and len(refs) <= HASHES_MAX:
                tools = Tools(self._session.executor, self._planner.timing(node), self._profile_of(node, limit))
                if (got := await bulk_get(node, asked, tools, found_by, limit)) is not None:
                    return got
            return await timed_lookup(
                self._session, node, self._layout, self._part, refs, lease_ms, found_by.remaining(), first_chunk
            )  # fmt: skip

        try:
            node, answer = await self._session.attempt("get", key, limit, ask, first_node)
        except KvClientError as error:
            self._session.forgive("get", error)
            self._session.count_miss(error.code.value)
            return codec.token_slice(asked.room(()), 0, 0), 0, error.code.value
        got = answer if isinstance(answer, Got) else await self._fetched(
            node, answer, asked, limit, goal, refinement
        )  # fmt: skip
        problem = got.fetched.error
        if problem is not None:
            if isinstance(problem, ProfileMissing):
                self._lost.add(got.chunks[got.fetched.chunks :])
            self._session.failed(node, "get", problem)
            self._session.forgive("get", problem)
        reason = ""
        if got.fetched.chunks < len(refs):
            stopped = got.fetched.stopped
            reason = _reason(got) if stopped is None else stopped.value
            self._session.count_miss(reason if stopped is None else SLOWER)
        if refinement is not None and isinstance(answer, Hit):
            refinement.go_on(node, got.fetched.chunks, answer.lease, got.into, limit.seconds)
        tokens = sum(chunk.tokens for chunk in got.chunks[: got.fetched.chunks])
        return codec.token_slice(got.into, 0, tokens), tokens, reason

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
