"""The calls on one namespace: lookup, get, put, stream, writer, delete."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Literal, overload

import kvstore_codec as codec
from kvstore_client.arguments import check_first_token, check_lease_ms, qualities, retention
from kvstore_client.connection import Node
from kvstore_client.deadline import Deadline, checked_seconds
from kvstore_client.deleting import LostChunks, deleted
from kvstore_client.engine_hashes import EngineHashes
from kvstore_client.errors import InvalidArgument, KvClientError
from kvstore_client.following import StreamAsked
from kvstore_client.getting import Gets, timed_lookup
from kvstore_client.leasing import kept_alive, renew
from kvstore_client.lookups import good_enough, prefetch
from kvstore_client.metrics import ABSENT
from kvstore_client.namespace_profiles import NamespaceProfiles
from kvstore_client.namespace_puts import NamespacePuts, TokenIds
from kvstore_client.planned import NamespacePlanner, checked_goal
from kvstore_client.planner.costs import PrefillSeconds
from kvstore_client.planner.estimates import Speeds
from kvstore_client.planner.plan import Plan
from kvstore_client.putting import Source
from kvstore_client.refining import AsyncRefinement
from kvstore_client.results import DeleteResult, Hit, PrefetchResult, PutResult, Restored
from kvstore_client.session import Session
from kvstore_client.streaming import AsyncStream
from kvstore_client.writing import AsyncWriter
from kvstore_codec import ChunkRef, Extras, KVArray, KVLayout, Profile, Quality

LEASE_MS = 10_000


class AsyncNamespace:
    """KV of one layout (and part of it), under one set of extras. Made by `AsyncClient.namespace`."""

    def __init__(
        self, session: Session, layout: KVLayout, *, part: int, extras: Extras | None, tail: bool,
        profile: Profile | None = None, learn_statistics: bool = False,
    ) -> None:  # fmt: skip
        if not 0 <= part < layout.partition.parts:
            raise InvalidArgument("the layout has no such part", part=part, parts=layout.partition.parts)
        self.layout, self.part = layout, part
        self._part_layout = layout.part_layout(part)
        self._session, self._extras, self._tail = session, extras, tail
        self._profiles = NamespaceProfiles(session, layout, profile, learn_statistics)
        # Hashes of chunks that a get found coded with a profile that is gone: a put replaces them.
        self._lost = LostChunks(layout, part)
        self.puts = NamespacePuts(session, layout, part, self._refs, self._placement_key, self._profiles, self._lost)
        self._planner = NamespacePlanner(session, self._part_layout)
        self.gets = Gets(
            session, layout, part, self._refs, self._placement_key, self._planner, self._profiles, self._lost
        )  # fmt: skip

    async def lookup(
        self, token_ids: TokenIds, *, first_token: int = 0, lease_ms: int = LEASE_MS, deadline: float | None = None
    ) -> Hit:
        """The longest stored prefix of a prompt, held by a lease for `lease_ms` (at most; 0: no lease).

        `token_ids`: 1-D integers in [0, 2³²), or `EngineHashes`; whole chunks of them are looked up, and the rest with
        `tail`. `first_token`, a multiple of chunk_tokens: the chunks before it are not asked for; `tokens` of the hit
        counts them.
        """
        limit = self._session.begin(deadline)
        check_lease_ms(lease_ms)
        check_first_token(self.layout, first_token)
        prompt = self._refs(token_ids)
        refs = prompt[first_token // self.layout.chunk_tokens :]
        first = prompt[0] if first_token and prompt else None
        with self._session.timed("lookup"):
            _, hit, reason = await self._find("lookup", refs, lease_ms, limit, first)
        if len(hit.chunks) < len(refs):
            self._session.count_miss(reason)
        return hit

    @asynccontextmanager
    async def held(
        self, token_ids: TokenIds, *, lease_ms: int = LEASE_MS, deadline: float | None = None
    ) -> AsyncIterator[Hit]:  # fmt: skip
        """`lookup`, whose lease is renewed by heartbeat while inside and given back at the end: the chunks of the hit
        stay for as long as it takes to read them."""
        limit = self._session.begin(deadline)
        hit = await self.lookup(token_ids, lease_ms=lease_ms, deadline=deadline)
        async with kept_alive(self._session, hit.lease, limit.seconds):
            yield hit

    async def renew(self, hit: Hit, *, lease_ms: int = LEASE_MS, deadline: float | None = None) -> bool:
        """Whether the chunks of a hit are still held, from now on for `lease_ms` (at most; 0: let go of them)."""
        limit = self._session.begin(deadline)
        check_lease_ms(lease_ms)
        if hit.lease is None:
            return False
        try:
            with self._session.timed("renew"):
                return await renew(self._session, hit.lease, lease_ms, limit)
        except KvClientError as error:
            self._session.metrics.failures.labels("renew", error.code.value).inc()
            self._session.forgive("renew", error)
            return False

    async def get(
        self, token_ids: TokenIds, *, quality: str | Quality | None = None, min_quality: str | Quality = "low",
        out: KVArray | None = None, first_token: int = 0, ttft: float | None = None,
        prefill_tokens_per_s: float | PrefillSeconds | None = None, refine: bool = False, node: str = "",
        deadline: float | None = None,
    ) -> Restored[AsyncRefinement]:  # fmt: skip
        """(kv, n): the KV of the longest intact stored prefix, n tokens; n is 0 on a miss.

        `quality`: read no better than this, which is fewer bytes; None reads all that is stored. `min_quality`: what
        is worse, by its own coding or because of the prefix that it was computed on, is a miss; for exact KV ask for
        min_quality="lossless". `out`: an array to decode into, in any form that `codec.encode` takes, with room for
        some whole chunks; `kv` is a view of its first n tokens ((k, v) of each layer where `out` is only DLPack), what
        lies behind them is unspecified, and may be no numbers: clear it where an attention kernel reads beyond the last
        token. Without it, a new numpy array (or list of (k, v) where layers differ).

        `first_token`: a multiple of chunk_tokens; what is before it the caller has. `kv`, `n` and `out` are then of the
        tokens from there on, and whether the chunks before are stored makes no difference.

        `node`: the address of the node to ask first, such as that of a lookup's answer (`hit.lease.node`); without it,
        the prompt's own.

        With `ttft` and `prefill_tokens_per_s` (see `plan`) it follows the planner: each chunk at the finest quality
        that leaves the rest in time, and no more chunks where recomputing the rest is faster.

        With `refine` it reads no more than `min_quality` needs (or what the planner chooses), and the result has a
        `refinement`: what lacks to `quality` follows within another `deadline`, the prefix held by its lease meanwhile.
        Those values are written when `await refinement.apply()` says so, never before.

        Nothing else writes to `out` after this returns or is cancelled.
        """
        return await self.gets.get(
            self.gets.called(
                token_ids, quality=quality, min_quality=min_quality, out=out, first_token=first_token, ttft=ttft,
                prefill_tokens_per_s=prefill_tokens_per_s, refine=refine, node=node, deadline=deadline,
            )
        )  # fmt: skip

    async def prefetch(
        self, token_ids: TokenIds, *, quality: str | Quality | None = None, deadline: float | None = None
    ) -> PrefetchResult:  # fmt: skip
        """Tells the node that a prompt will be read at `quality` (None: as well as it is stored): it brings what its
        memory lacks there, from its disk or from the nodes upstream of it, and does not wait for that. A hint: what
        becomes of it a lookup tells.
        """
        limit = self._session.begin(deadline)
        wanted = Quality.RAW if quality is None else Quality.parse(quality)
        refs = self._refs(token_ids)
        if not refs:
            return PrefetchResult()
        try:
            with self._session.timed("prefetch"):
                _, result = await self._session.attempt(
                    "prefetch", self._placement_key(refs), limit,
                    lambda node, timeout_s: prefetch(node, self.layout, self.part, refs, wanted, timeout_s),
                )  # fmt: skip
        except KvClientError as error:
            self._session.forgive("prefetch", error)
            return PrefetchResult()
        return result

    async def plan(
        self, token_ids: TokenIds, *, ttft: float, prefill_tokens_per_s: float | PrefillSeconds,
        min_quality: str | Quality = "low", deadline: float | None = None,
    ) -> Plan:  # fmt: skip
        """What a get with these arguments would do, by what is known now: fetch each stored chunk, at which quality, or
        leave it to the engine; when that would be ready, and why.

        `ttft`: seconds from now in which all of the prompt's KV should be there. `prefill_tokens_per_s`: the engine's
        speed, as one number for every position, as a `PrefillCost`, or as a function of (first, last) that answers the
        seconds of computing those tokens of the prompt.
        """
        limit = self._session.begin(deadline)
        goal, floor = checked_goal(ttft, prefill_tokens_per_s, len(token_ids)), Quality.parse(min_quality)  # type: ignore[arg-type]
        assert goal is not None, "both are given"
        with self._session.timed("plan"):
            node, hit, _ = await self._find("plan", self._refs(token_ids), 0, limit)
        return self._planner.plan(goal, node, good_enough(hit.chunks, floor), floor)

    def speeds(self) -> dict[str, Speeds]:
        """What gets have measured lately, by address of the node: bytes a second, latency, and how fast this client
        decodes by quality. Without I/O; may be called from any thread."""
        return self._planner.speeds()

    @overload
    def put(
        self, token_ids: TokenIds, kv: KVArray, *, quality: str | Quality = ..., durable: bool = ...,
        provenance: str | Quality = ..., first_token: int = ..., retain: tuple[int, int] | None = ...,
        deadline: float | None = ..., background: Literal[False] = ..., copy: bool = ...,
    ) -> Coroutine[Any, Any, PutResult]: ...  # fmt: skip

    @overload
    def put(
        self, token_ids: TokenIds, kv: KVArray, *, quality: str | Quality = ..., durable: bool = ...,
        provenance: str | Quality = ..., first_token: int = ..., retain: tuple[int, int] | None = ...,
        deadline: float | None = ..., background: Literal[True], copy: bool = ...,
    ) -> asyncio.Task[PutResult]: ...  # fmt: skip

    def put(
        self, token_ids: TokenIds, kv: KVArray, *, quality: str | Quality = "high", durable: bool = False,
        provenance: str | Quality = "raw", first_token: int = 0, retain: tuple[int, int] | None = None,
        deadline: float | None = None, background: bool = False, copy: bool = False,
    ) -> Coroutine[Any, Any, PutResult] | asyncio.Task[PutResult]:  # fmt: skip
        """Stores the chunks that are missing, or held at a worse quality.

        `kv`: the prompt's tokens from `first_token` (a multiple of chunk_tokens) to its end, as `codec.encode` takes
        them. `durable`: answered when they are on disk, synced. `provenance`: the lowest quality of the cached prefix
        that this KV was computed on ("raw": none, or an exact one). `retain`: (priority 0–100, seconds), a hint that
        these chunks are worth keeping: for so long others go before them, and lower priorities before higher ones.

        `background`: answers a future of the result at once. `kv` is read until that is done, and may be overwritten
        then; with `copy` at once. `deadline` counts from the call, however long the put waits for those before it (30
        seconds unless given, or the client's where it is longer). Where too much is waiting already the put is dropped
        (`PutResult.dropped`): this never waits. Cancelling the future ends the put.

        Raises LayoutError (shape, dtype), ValuesError (NaN or infinities at a lossy quality), InvalidArgument; those
        that the call cannot see yet, the future raises.
        """
        asked = self.puts.asked(
            token_ids, kv, quality=quality, durable=durable, provenance=provenance, first_token=first_token,
            retain=retain, deadline=deadline, background=background,
        )  # fmt: skip
        if background:
            return self.puts.start(asked, copy=copy, start=asyncio.get_running_loop().create_task)
        return self.puts.put(asked)

    def writer(
        self, token_ids: TokenIds, *, quality: str | Quality = "high", durable: bool = False,
        provenance: str | Quality = "raw", first_token: int = 0, retain: tuple[int, int] | None = None,
        deadline: float | None = None,
    ) -> AsyncWriter:  # fmt: skip
        """A put whose KV comes layer by layer while it is computed, and which `stream` can follow meanwhile:
        `async with cache.writer(tokens) as writer: await writer.write(layer, k, v)`.

        Left normally it stores the chunks, as `put` does with these arguments (`writer.result`); left by an exception
        it aborts: its readers end, nothing is stored. `deadline`: of each of its calls; leaving it stores within that.
        """
        check_first_token(self.layout, first_token)
        source = Source(
            self.layout, self.part, None, first_token, codec.storable_quality(self._part_layout, quality),
            Quality.parse(provenance), durable, retention(retain),
        )  # fmt: skip
        refs, put_whole = self._refs(token_ids), None
        if self._profiles.are_used and not source.quality.exact:
            put_whole = functools.partial(
                self.put, token_ids, quality=quality, durable=durable, provenance=provenance, first_token=first_token,
                retain=retain,
            )  # fmt: skip
        return AsyncWriter(
            self._session, source, refs, tokens=len(token_ids) - first_token,  # type: ignore[arg-type]
            key=self._placement_key(refs) if refs else b"", put_whole=put_whole, deadline=deadline,
        )  # fmt: skip

    def stream(
        self, token_ids: TokenIds, *, wait: float = 0.0, quality: str | Quality | None = None,
        min_quality: str | Quality = "low", deadline: float | None = None,
    ) -> AsyncStream:  # fmt: skip
        """(layer, k, v) of each layer, in order, of the longest prefix that is stored or being written: k and v are
        `[tokens, kv_heads, dim]`, as `get` returns them, for the first `stream.tokens` tokens.

        `wait`: seconds for a writer to appear where less than the whole prompt is stored. The first layer comes within
        `wait` + `deadline`, each further one within `deadline`; else the stream ends. It also ends, at once, when the
        writer aborts or dies: layers handed over are good, `stream.complete` is False. Before the first one of a live
        write it goes on with what is stored alone. A live write travels at the quality that it is written at.
        """
        wanted, floor = qualities(quality, min_quality)
        limit = self._session.begin(deadline)
        asked = StreamAsked(
            self.layout, self.part, self._refs(token_ids), wanted, floor,
            checked_seconds(wait) if wait else 0.0, limit.seconds,
        )  # fmt: skip
        return AsyncStream(
            self._session, asked,
            lambda lease_ms, limit: self._find("stream", asked.refs, lease_ms, limit), self._profiles.of_object,
        )  # fmt: skip

    async def delete(self, token_ids: TokenIds | None = None, *, deadline: float | None = None) -> DeleteResult:
        """Removes a prompt's chunks from every seed, other prompts' that share them included; without `token_ids`
        the whole namespace, all parts."""
        limit = self._session.begin(deadline)
        hashes = [] if token_ids is None else [ref.hash for ref in self._refs(token_ids)]
        if token_ids is not None and not hashes:
            return DeleteResult()  # no hash would mean the whole namespace
        total = DeleteResult()
        with self._session.timed("delete"):
            for seed in self._session.connections.seeds:
                try:
                    node = self._session.connections.node(seed)
                    async for objects, freed in deleted(node, self.layout, self.part, hashes, limit):
                        total = replace(total, objects=total.objects + objects, bytes=total.bytes + freed)
                except KvClientError as error:
                    self._session.metrics.failures.labels("delete", error.code.value).inc()
                    self._session.forgive("delete", error)
                    total = replace(total, reasons=(*total.reasons, f"{seed}: {error}"))
        return total

    async def store_profile(
        self, profile: Profile, *, durable: bool = False, deadline: float | None = None
    ) -> PutResult:  # fmt: skip
        """Stores a profile of this layout under its id, where `load_profile` and every get find it. A put with a
        profile has stored it already; this is for giving out one without KV.

        The result counts its chunks (of 128 KiB); its `tokens` is 0. A transfer that the deadline cuts off goes on.
        Raises InvalidArgument (the profile does not fit the layout, or is too large).
        """
        limit = self._session.begin(deadline)
        with self._session.timed("store_profile"):
            return await self._profiles.store(profile, durable=durable, deadline=limit)

    async def load_profile(self, profile_id: bytes, *, deadline: float | None = None) -> Profile | None:
        """The profile of this layout with this id, None on a miss. The client holds it from then on, so that gets need
        not load it: worth doing where it is too large for a get's deadline. A transfer that the deadline cuts off goes
        on. Raises InvalidArgument for what is no id.
        """
        limit = self._session.begin(deadline)
        with self._session.timed("load_profile"):
            return await self._profiles.load(profile_id, limit)

    def _refs(self, token_ids: TokenIds) -> list[ChunkRef]:
        """Raises LayoutError for what are no tokens, InvalidArgument for an engine's hashes that do not fit."""
        if isinstance(token_ids, EngineHashes):
            if token_ids.chunk_tokens != self.layout.chunk_tokens:
                raise InvalidArgument(
                    "an engine's hashes must be of the layout's chunks", got=token_ids.chunk_tokens,
                    expected=self.layout.chunk_tokens,
                )  # fmt: skip
            if self._extras is not None:
                raise InvalidArgument("an engine's hashes cover adapter, salt and content: use them without extras")
            return codec.wrap_engine_hashes(self.layout, token_ids.hashes, tenant_key=self._session.tenant_key)
        return codec.chunk_refs(
            self.layout, token_ids, extras=self._extras, tenant_key=self._session.tenant_key, tail=self._tail
        )

    async def _find(
        self, call: str, refs: Sequence[ChunkRef], lease_ms: int, limit: Deadline, first: ChunkRef | None = None
    ) -> tuple[Node | None, Hit, str]:
        """(node, hit, why no more); no node where none answered. `first`: the prompt's first chunk, where `refs` are
        later ones."""
        if not refs:
            return None, Hit(), ABSENT
        first_chunk = b"" if first is None else first.hash
        try:
            node, hit = await self._session.attempt(
                call, self._placement_key([first or refs[0]]), limit,
                lambda node, timeout_s: timed_lookup(
                    self._session, node, self.layout, self.part, refs, lease_ms, timeout_s, first_chunk
                ),
            )  # fmt: skip
        except KvClientError as error:
            self._session.forgive(call, error)
            return None, Hit(), error.code.value
        return node, hit, ABSENT

    def _placement_key(self, refs: Sequence[ChunkRef]) -> bytes:
        """Prompts that share their first chunk live together, so that a prefix is on one node."""
        return self.layout.namespace_id + refs[0].hash
