"""Profiles to one node and from it, by the calls that KV travels by (`profiles.py` says as what)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from kvstore_client import profiles
from kvstore_client.connection import Node, timeout_s
from kvstore_client.deadline import Deadline
from kvstore_client.fetching import fetch
from kvstore_client.lookups import lookup
from kvstore_client.metrics import ClientMetrics
from kvstore_client.profiles import PROFILE_LAYOUT, Rows
from kvstore_client.putting import Chunk, Source, Stored, put
from kvstore_client.transports.blob import Buffers
from kvstore_client.transports.wanted import Wanted
from kvstore_codec import ChunkRef, Profile, Quality

#: Of one put stream: what was stored before a deadline passed need not be sent again.
_STREAM_CHUNKS = 64
_LEASE_MS = 60_000  # what is being loaded is not evicted meanwhile

R = TypeVar("R")


@dataclass(frozen=True)
class Placed:
    """A profile, the chunks that it is stored as, and its length."""

    profile: Profile
    refs: Sequence[ChunkRef]
    size: int


@dataclass(frozen=True)
class ProfileTransfer:
    """What a transfer needs of its client."""

    tenant_key: bytes
    executor: Executor
    metrics: ClientMetrics

    async def placed(self, profile: Profile) -> Placed:
        return await self._in_thread(lambda: self._placed(profile, len(profile.to_bytes())))

    async def holds(self, node: Node, placed: Placed, timeout: float) -> bool:
        """Whether `node` has all of the profile; to the node that is a use of it. Raises the typed error of a failed
        call."""
        hit = await lookup(node, PROFILE_LAYOUT, 0, placed.refs, lease_ms=0, timeout_s=timeout)
        return len(hit.chunks) == len(placed.refs)

    async def store(self, node: Node, placed: Placed, *, durable: bool, deadline: Deadline) -> list[Stored]:
        """Puts what `node` lacks of the profile; an answer for each chunk. Raises the typed error of a failed call."""
        refs = placed.refs
        hit = await lookup(node, PROFILE_LAYOUT, 0, refs, lease_ms=0, timeout_s=timeout_s(deadline))
        chunks = [Chunk(ref, hit.chunks[at].stored_bytes if at < len(hit.chunks) else 0) for at, ref in enumerate(refs)]
        if len(hit.chunks) == len(refs) and not durable:  # a durable put asks the node whether it is on disk
            return [Stored(chunk.ref, "have", "", False, chunk.held_bytes) for chunk in chunks]
        rows = await self._in_thread(lambda: profiles.pack(placed.profile.to_bytes()))
        source = Source(
            PROFILE_LAYOUT, 0, profiles.as_kv(rows), 0, Quality.RAW, Quality.RAW, durable, first_chunk=refs[0].hash
        )
        stored: list[Stored] = []
        for first in range(0, len(chunks), _STREAM_CHUNKS):
            some = chunks[first : first + _STREAM_CHUNKS]
            stored += await put(
                node, source, some, self.executor, 1, deadline, self.metrics.bytes_sent.inc, Buffers(0)
            )  # fmt: skip
        self.metrics.profiles.labels("stored").inc(all(chunk.outcome != "rejected" for chunk in stored))
        return stored

    async def load(self, node: Node, profile_id: bytes, deadline: Deadline) -> Placed | None:
        """The profile; None where the node does not have all of it.

        Raises ProfileDamaged, the typed error of a failed call or of a bad object."""
        start = await self._rows(node, profiles.profile_refs(profile_id, 1, self.tenant_key), 0, deadline)
        if start is None:
            return None
        size = profiles.length_in(start)
        chunks = profiles.chunks_of(size)
        refs = await self._in_thread(lambda: profiles.profile_refs(profile_id, chunks, self.tenant_key))
        rows = start if chunks == 1 else await self._rows(node, refs, 1, deadline)
        if rows is None:
            return None
        rows[: len(start)] = start
        profile = await self._in_thread(lambda: profiles.parse(profiles.unpack(rows), profile_id))
        self.metrics.profiles.labels("loaded").inc()
        return Placed(profile, refs, size)

    def _placed(self, profile: Profile, size: int) -> Placed:
        refs = profiles.profile_refs(profile.profile_id, profiles.chunks_of(size), self.tenant_key)
        return Placed(profile, refs, size)

    async def _rows(self, node: Node, refs: Sequence[ChunkRef], first: int, deadline: Deadline) -> Rows | None:
        """Room for the rows of all `refs`, filled from chunk `first` on; None where one of them is not there."""
        limit = timeout_s(deadline)
        hit = await lookup(node, PROFILE_LAYOUT, 0, refs, lease_ms=_LEASE_MS, timeout_s=limit)
        if len(hit.chunks) < len(refs):
            return None
        rows = profiles.empty_rows(len(refs))
        wanted = Wanted(PROFILE_LAYOUT, 0, hit.chunks[first:], Quality.RAW, Quality.RAW, refs[0].hash)
        into = profiles.as_kv(rows[first * PROFILE_LAYOUT.chunk_tokens :])
        lease_ids = hit.lease.ids if hit.lease is not None else ()
        fetched = await fetch(
            node, wanted, lease_ids, into, self.executor, deadline, self.metrics.bytes_received.inc
        )  # fmt: skip
        if fetched.error is not None:
            raise fetched.error
        return rows if fetched.chunks == len(wanted.chunks) else None

    async def _in_thread(self, function: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self.executor, function)
