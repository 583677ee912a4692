"""The puts of one namespace: looked up, coded, sent, at once or in the background."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy.typing as npt

import kvstore_codec as codec
from kvstore_client.arguments import check_first_token, retention
from kvstore_client.background import Dropped
from kvstore_client.deadline import Deadline
from kvstore_client.deleting import LostChunks
from kvstore_client.engine_hashes import EngineHashes
from kvstore_client.errors import InvalidArgument, KvClientError
from kvstore_client.kv_views import of_chunk, sliceable
from kvstore_client.learning import copied
from kvstore_client.lookups import lookup
from kvstore_client.namespace_profiles import NamespaceProfiles
from kvstore_client.putting import Chunk, Source, Stored, batches, put, result_of
from kvstore_client.results import PutResult
from kvstore_client.session import Session
from kvstore_codec import ChunkRef, KVArray, KVLayout, Quality

TokenIds = Sequence[int] | npt.ArrayLike | EngineHashes
#: Of a background put that names no deadline: nobody waits for it, and it may have to wait for others.
BACKGROUND_DEADLINE_S = 30.0
#: A future of the caller's kind.
F = TypeVar("F", "asyncio.Task[PutResult]", "concurrent.futures.Future[PutResult]")


class Asked(NamedTuple):
    """A put: of what, all chunks of the prompt, by when."""

    source: Source
    prompt: Sequence[ChunkRef]
    limit: Deadline


class NamespacePuts:
    """`refs_of`: all chunks of some tokens; `key_of`: where a prompt lives. `lost`: what a get found coded with a
    profile that is gone."""

    def __init__(
        self, session: Session, layout: KVLayout, part: int, refs_of: Callable[[TokenIds], list[ChunkRef]],
        key_of: Callable[[Sequence[ChunkRef]], bytes], profiles: NamespaceProfiles, lost: LostChunks,
    ) -> None:  # fmt: skip
        self._session, self._layout, self._part = session, layout, part
        self._part_layout = layout.part_layout(part)
        self._refs_of, self._key_of, self._profiles, self._lost = refs_of, key_of, profiles, lost

    def asked(
        self, token_ids: TokenIds, kv: KVArray, *, quality: str | Quality, durable: bool, provenance: str | Quality,
        first_token: int, retain: tuple[int, int] | None, deadline: float | None, background: bool,
    ) -> Asked:  # fmt: skip
        """A put that is called now. Raises LayoutError (shape, dtype), InvalidArgument, ClientClosed."""
        limit = self._session.begin(deadline, at_least_s=BACKGROUND_DEADLINE_S if background else 0.0)
        source = Source(
            self._layout, self._part, sliceable(kv, self._part_layout), first_token,
            codec.storable_quality(self._layout, quality), Quality.parse(provenance), durable, retention(retain),
        )  # fmt: skip
        check_first_token(self._layout, first_token)
        refs = self._refs_of(token_ids)
        tokens = len(token_ids)  # type: ignore[arg-type]
        held = codec.token_count(source.kv, self._part_layout)
        if held != tokens - first_token:
            raise InvalidArgument(
                "kv must hold the tokens from first_token on", got=held, expected=tokens - first_token
            )
        return Asked(source, refs, limit)

    async def put(self, asked: Asked) -> PutResult:
        """Raises ValuesError; strict, what a node does or fails to do."""
        return await self._timed(asked, self._session.executor)

    def start(self, asked: Asked, *, copy: bool, start: Callable[[Coroutine[Any, Any, PutResult]], F]) -> F:
        """The put in the background, as the future that `start` makes of it. Any thread may call it; it waits for
        nothing. `copy`: of the KV, so that the caller's may be overwritten when this returns."""
        background, layout = self._session.background, self._part_layout
        size_bytes = codec.token_count(asked.source.kv, layout) * layout.bytes_per_token
        admitted = background.admit(size_bytes)
        try:
            if admitted and copy:
                asked = asked._replace(source=replace(asked.source, kv=copied(asked.source.kv, layout)))
            future = start(self._in_turn(asked, admitted))
        except BaseException:
            if admitted:
                background.release(size_bytes)
            raise
        if admitted:
            future.add_done_callback(lambda _: background.release(size_bytes))
        return future

    async def _in_turn(self, asked: Asked, admitted: bool) -> PutResult:
        session = self._session
        try:
            async with session.background.turn(asked.limit, admitted=admitted):
                return await self._timed(asked, session.background_executor)
        except Dropped as dropped:
            rejected = sum(ref.first_token >= asked.source.first_token for ref in asked.prompt)
            code = dropped.cause.code.value
            session.metrics.background_dropped.labels(code).inc()
            session.metrics.rejections.labels(code).inc(rejected)
            session.forgive("put", dropped.cause)
            return PutResult(rejected=rejected, reasons=(str(dropped),), dropped=True)

    async def _timed(self, asked: Asked, executor: Executor) -> PutResult:
        with self._session.timed("put"):
            before, stored = await self._put(asked.source, asked.prompt, asked.limit, executor)
        return result_of(before, stored)

    async def _put(
        self, source: Source, prompt: Sequence[ChunkRef], limit: Deadline, executor: Executor
    ) -> tuple[int | None, list[Stored]]:  # fmt: skip
        """(tokens before `source`, None unless all of them are held; an answer for each chunk of it). A failure rejects
        what was not answered before it."""
        session = self._session
        refs = [ref for ref in prompt if ref.first_token >= source.first_token]
        if not refs:
            return 0, []
        mine = {ref.hash for ref in refs}
        answered: dict[bytes, Stored] = {}
        reason, before = "", None
        try:
            node, hit = await session.attempt(
                "put", self._key_of(prompt), limit,
                lambda node, timeout_s: lookup(
                    node, self._layout, self._part, prompt, lease_ms=0, timeout_s=timeout_s
                ),
            )  # fmt: skip
            before = source.first_token if hit.tokens >= source.first_token else None
            on_disk, source = True, replace(source, first_chunk=prompt[0].hash)
            if not source.quality.exact:
                profile, on_disk = await self._profiles.for_put(node, durable=source.durable, deadline=limit)
                source = replace(source, profile=profile)
            found = await self._lost.taken_out(node, [chunk for chunk in hit.chunks if chunk.hash in mine], limit)
            held = {chunk.hash: chunk.stored_bytes for chunk in found if chunk.quality <= source.quality}
            chunks = [Chunk(ref, held.get(ref.hash, 0)) for ref in refs]
            if not source.durable:  # what is held is settled; a durable put asks the node whether it is on disk
                answered = {c.ref.hash: Stored(c.ref, "have", "", False, c.held_bytes) for c in chunks if c.held_bytes}
            unsettled = [chunk for chunk in chunks if chunk.ref.hash not in answered]
            for batch in batches(source, unsettled):
                done = await put(
                    node,
                    source,
                    batch,
                    executor,
                    session.threads,
                    limit,
                    session.metrics.bytes_sent.inc,
                    session.put_buffers,
                )
                answered |= {each.ref.hash: replace(each, durable=each.durable and on_disk) for each in done}
            if not source.quality.exact:
                await self._profiles.learn_from(
                    [of_chunk(source, chunk.ref) for chunk in unsettled if not chunk.held_bytes]
                )
        except KvClientError as error:
            session.profiles.doubt()
            session.metrics.rejections.labels(error.code.value).inc(len(refs) - len(answered))
            session.forgive("put", error)
            reason = str(error)
        session.count_rejected("put", list(answered.values()))
        return before, [answered.get(ref.hash, Stored(ref, "rejected", reason, False, 0)) for ref in refs]
