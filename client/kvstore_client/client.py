"""The synchronous client: the asynchronous one, run on an event loop in the background. A get that needs nothing of the
loop goes without it.

All synchronous clients of a process share one loop thread; their methods may be called from any thread, also from
inside a running event loop (which they then block). After a fork() that follows the first use, calls in the child raise
InvalidArgument.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from prometheus_client import REGISTRY, CollectorRegistry

from kvstore_client.aio import DEADLINE_S, AsyncClient
from kvstore_client.background import QUEUE_BYTES_MAX
from kvstore_client.errors import InvalidArgument
from kvstore_client.namespace import LEASE_MS, AsyncNamespace
from kvstore_client.namespace_puts import TokenIds
from kvstore_client.parts import AsyncPartsNamespace
from kvstore_client.planner.costs import PrefillSeconds
from kvstore_client.planner.estimates import Speeds
from kvstore_client.planner.plan import Plan
from kvstore_client.refining import AsyncRefinement
from kvstore_client.results import DeleteResult, Hit, NodeStat, PrefetchResult, PutResult, Restored
from kvstore_client.streaming import AsyncStream
from kvstore_client.tls import TLS
from kvstore_client.transports.bulk_path import Transport
from kvstore_client.writing import AsyncWriter
from kvstore_codec import DEFAULT_TENANT_KEY, Extras, KVArray, KVLayout, Profile, Quality

if TYPE_CHECKING:
    from typing_extensions import Self

R = TypeVar("R")
_starting = threading.Lock()


class Client:
    """See AsyncClient, whose arguments and semantics these are."""

    def __init__(
        self, target: str | Sequence[str], *, deadline: float = DEADLINE_S, strict: bool = False,
        threads: int | None = None, tenant_key: bytes = DEFAULT_TENANT_KEY, registry: CollectorRegistry = REGISTRY,
        transport: Transport = "auto", background_bytes: int = QUEUE_BYTES_MAX,
        tls: TLS | None = None,
    ) -> None:  # fmt: skip
        self._async = AsyncClient(
            target, deadline=deadline, strict=strict, threads=threads, tenant_key=tenant_key, registry=registry,
            transport=transport, background_bytes=background_bytes, tls=tls,
        )  # fmt: skip

    def namespace(
        self, layout: KVLayout, *, part: int = 0, extras: Extras | None = None, tail: bool = False,
        profile: Profile | None = None, learn_statistics: bool = False,
    ) -> Namespace:  # fmt: skip
        """See AsyncClient.namespace."""
        return Namespace(
            self._async.namespace(
                layout, part=part, extras=extras, tail=tail, profile=profile, learn_statistics=learn_statistics
            )
        )  # fmt: skip

    def parts(
        self, layout: KVLayout, parts: Sequence[int] | None = None, *, extras: Extras | None = None
    ) -> PartsNamespace:
        """See AsyncClient.parts."""
        return PartsNamespace(self._async.parts(layout, parts, extras=extras))

    def stat(self, *, deadline: float | None = None) -> NodeStat:
        """See AsyncClient.stat."""
        return _run(self._async.stat(deadline=deadline))

    def close(self) -> None:
        """See AsyncClient.aclose."""
        _run(self._async.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Namespace:
    """KV of one layout. Made by `Client.namespace`; see AsyncNamespace for what its calls do and raise."""

    def __init__(self, namespace: AsyncNamespace) -> None:
        self._async = namespace

    @property
    def layout(self) -> KVLayout:
        return self._async.layout

    def lookup(
        self, token_ids: TokenIds, *, first_token: int = 0, lease_ms: int = LEASE_MS, deadline: float | None = None
    ) -> Hit:
        """The longest stored prefix of a prompt."""
        return _run(self._async.lookup(token_ids, first_token=first_token, lease_ms=lease_ms, deadline=deadline))

    @contextmanager
    def held(
        self, token_ids: TokenIds, *, lease_ms: int = LEASE_MS, deadline: float | None = None
    ) -> Iterator[Hit]:  # fmt: skip
        """`lookup`, whose lease is renewed while inside and given back at the end."""
        held = self._async.held(token_ids, lease_ms=lease_ms, deadline=deadline)
        hit = _run(_entered(held))
        try:
            yield hit
        finally:
            _run(_left(held))

    def renew(self, hit: Hit, *, lease_ms: int = LEASE_MS, deadline: float | None = None) -> bool:
        """Whether the chunks of a hit are still held, from now on for `lease_ms`."""
        return _run(self._async.renew(hit, lease_ms=lease_ms, deadline=deadline))

    def get(
        self, token_ids: TokenIds, *, quality: str | Quality | None = None, min_quality: str | Quality = "low",
        out: KVArray | None = None, first_token: int = 0, ttft: float | None = None,
        prefill_tokens_per_s: float | PrefillSeconds | None = None, refine: bool = False, node: str = "",
        deadline: float | None = None,
    ) -> Restored[Refinement]:  # fmt: skip
        """(kv, n): the KV of the longest intact stored prefix; n is 0 on a miss."""
        gets, loop = self._async.gets, _loop()
        call = gets.called(
            token_ids, quality=quality, min_quality=min_quality, out=out, first_token=first_token, ttft=ttft,
            prefill_tokens_per_s=prefill_tokens_per_s, refine=refine, node=node, deadline=deadline,
        )  # fmt: skip
        restored = gets.get_directly(call, loop)
        if restored is None:
            restored = _run(gets.get(call))
        refinement = Refinement(restored.refinement) if refine else None
        return Restored(restored.kv, restored.n, refinement, restored.reason)

    def plan(
        self, token_ids: TokenIds, *, ttft: float, prefill_tokens_per_s: float | PrefillSeconds,
        min_quality: str | Quality = "low", deadline: float | None = None,
    ) -> Plan:  # fmt: skip
        """What a get with these arguments would do, when that would be ready, and why."""
        return _run(
            self._async.plan(
                token_ids, ttft=ttft, prefill_tokens_per_s=prefill_tokens_per_s, min_quality=min_quality,
                deadline=deadline,
            )
        )  # fmt: skip

    def speeds(self) -> dict[str, Speeds]:
        """What gets have measured lately, by address of the node."""
        return self._async.speeds()

    def prefetch(
        self, token_ids: TokenIds, *, quality: str | Quality | None = None, deadline: float | None = None
    ) -> PrefetchResult:  # fmt: skip
        """Tells the node that a prompt will be read; does not wait for what it does then."""
        return _run(self._async.prefetch(token_ids, quality=quality, deadline=deadline))

    @overload
    def put(
        self, token_ids: TokenIds, kv: KVArray, *, quality: str | Quality = ..., durable: bool = ...,
        provenance: str | Quality = ..., first_token: int = ..., retain: tuple[int, int] | None = ...,
        deadline: float | None = ..., background: Literal[False] = ..., copy: bool = ...,
    ) -> PutResult: ...  # fmt: skip

    @overload
    def put(
        self, token_ids: TokenIds, kv: KVArray, *, quality: str | Quality = ..., durable: bool = ...,
        provenance: str | Quality = ..., first_token: int = ..., retain: tuple[int, int] | None = ...,
        deadline: float | None = ..., background: Literal[True], copy: bool = ...,
    ) -> Future[PutResult]: ...  # fmt: skip

    def put(
        self, token_ids: TokenIds, kv: KVArray, *, quality: str | Quality = "high", durable: bool = False,
        provenance: str | Quality = "raw", first_token: int = 0, retain: tuple[int, int] | None = None,
        deadline: float | None = None, background: bool = False, copy: bool = False,
    ) -> PutResult | Future[PutResult]:  # fmt: skip
        """Stores the chunks that are missing, or held at a worse quality; in the background, a future of the result."""
        puts = self._async.puts
        asked = puts.asked(
            token_ids, kv, quality=quality, durable=durable, provenance=provenance, first_token=first_token,
            retain=retain, deadline=deadline, background=background,
        )  # fmt: skip
        if not background:
            return _run(puts.put(asked))
        loop = _loop()
        return puts.start(asked, copy=copy, start=lambda put: asyncio.run_coroutine_threadsafe(put, loop))

    def writer(
        self, token_ids: TokenIds, *, quality: str | Quality = "high", durable: bool = False,
        provenance: str | Quality = "raw", first_token: int = 0, retain: tuple[int, int] | None = None,
        deadline: float | None = None,
    ) -> Writer:  # fmt: skip
        """A put whose KV comes layer by layer while it is computed: `with cache.writer(tokens) as writer:
        writer.write(layer, k, v)`."""
        return Writer(
            self._async.writer(
                token_ids, quality=quality, durable=durable, provenance=provenance, first_token=first_token,
                retain=retain, deadline=deadline,
            )
        )  # fmt: skip

    def stream(
        self, token_ids: TokenIds, *, wait: float = 0.0, quality: str | Quality | None = None,
        min_quality: str | Quality = "low", deadline: float | None = None,
    ) -> Stream:  # fmt: skip
        """(layer, k, v) of each layer, in order, of the longest prefix that is stored or being written."""
        return Stream(
            self._async.stream(token_ids, wait=wait, quality=quality, min_quality=min_quality, deadline=deadline)
        )  # fmt: skip

    def delete(self, token_ids: TokenIds | None = None, *, deadline: float | None = None) -> DeleteResult:
        """Removes a prompt's chunks, or the whole namespace."""
        return _run(self._async.delete(token_ids, deadline=deadline))

    def store_profile(self, profile: Profile, *, durable: bool = False, deadline: float | None = None) -> PutResult:
        """Stores a profile under its id."""
        return _run(self._async.store_profile(profile, durable=durable, deadline=deadline))

    def load_profile(self, profile_id: bytes, *, deadline: float | None = None) -> Profile | None:
        """The profile with this id; None on a miss."""
        return _run(self._async.load_profile(profile_id, deadline=deadline))


class PartsNamespace:
    """KV of several parts of a layout. Made by `Client.parts`; see AsyncPartsNamespace."""

    def __init__(self, namespace: AsyncPartsNamespace) -> None:
        self._async = namespace

    @property
    def layout(self) -> KVLayout:
        return self._async.layout

    def lookup(
        self, token_ids: TokenIds, *, first_token: int = 0, lease_ms: int = LEASE_MS, deadline: float | None = None
    ) -> Hit:
        """The longest prefix of which every part is stored."""
        return _run(self._async.lookup(token_ids, first_token=first_token, lease_ms=lease_ms, deadline=deadline))

    def get(
        self, token_ids: TokenIds, *, quality: str | Quality | None = None, min_quality: str | Quality = "low",
        out: KVArray | None = None, first_token: int = 0, ttft: float | None = None,
        prefill_tokens_per_s: float | PrefillSeconds | None = None, node: str = "", deadline: float | None = None,
    ) -> Restored[Refinement]:  # fmt: skip
        """(kv, n): as far as every part came."""
        restored = _run(
            self._async.get(
                token_ids, quality=quality, min_quality=min_quality, out=out, first_token=first_token, ttft=ttft,
                prefill_tokens_per_s=prefill_tokens_per_s, node=node, deadline=deadline,
            )
        )  # fmt: skip
        return Restored(restored.kv, restored.n, reason=restored.reason)

    def speeds(self) -> dict[str, Speeds]:
        """See AsyncPartsNamespace.speeds."""
        return self._async.speeds()

    def put(
        self, token_ids: TokenIds, kv: KVArray, *, quality: str | Quality = "high", durable: bool = False,
        provenance: str | Quality = "raw", first_token: int = 0, retain: tuple[int, int] | None = None,
        deadline: float | None = None,
    ) -> PutResult:  # fmt: skip
        """Stores the parts of chunks that are missing, or held at a worse quality."""
        return _run(
            self._async.put(
                token_ids, kv, quality=quality, durable=durable, provenance=provenance, first_token=first_token,
                retain=retain, deadline=deadline,
            )
        )  # fmt: skip


class Refinement:
    """Made by `Namespace.get` with `refine=True`; see AsyncRefinement."""

    def __init__(self, refinement: AsyncRefinement) -> None:
        self._async = refinement

    @property
    def tokens(self) -> int:
        return self._async.tokens

    @property
    def done(self) -> bool:
        return self._async.done

    @property
    def reason(self) -> str:
        return self._async.reason

    def wait(self, timeout: float | None = None) -> bool:
        """Until nothing more will come, or for so many seconds. Whether all is here."""
        return _run(self._async.wait(timeout))

    def apply(self, out: KVArray | None = None, *, deadline: float | None = None) -> tuple[KVArray, int]:
        """(kv, n) with the best values that have come by now, in the get's own array or in another."""
        return _run(self._async.apply(out, deadline=deadline))

    def close(self) -> None:
        """Ends what is on its way."""
        _run(self._async.aclose())


class Writer:
    """Made by `Namespace.writer`; see AsyncWriter."""

    def __init__(self, writer: AsyncWriter) -> None:
        self._async = writer

    @property
    def result(self) -> PutResult | None:
        return self._async.result

    def write(self, layer: int, k: Any, v: Any) -> None:
        """The next layer."""
        _run(self._async.write(layer, k, v))

    def __enter__(self) -> Self:
        _run(self._async.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _run(self._async.__aexit__(kind, error, trace))


class Stream:
    """Made by `Namespace.stream`; see AsyncStream."""

    def __init__(self, stream: AsyncStream) -> None:
        self._async = stream

    @property
    def tokens(self) -> int:
        return self._async.tokens

    @property
    def layers(self) -> int:
        return self._async.layers

    @property
    def complete(self) -> bool:
        return self._async.complete

    @property
    def reason(self) -> str:
        return self._async.reason

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[int, Any, Any]:
        try:
            return _run(self._async.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def close(self) -> None:
        """Lets go of what is still on its way."""
        _run(self._async.aclose())


async def _entered(context: AbstractAsyncContextManager[R]) -> R:
    return await context.__aenter__()


async def _left(context: AbstractAsyncContextManager[Any]) -> None:
    await context.__aexit__(None, None, None)


def _loop() -> asyncio.AbstractEventLoop:
    """One for the process: gRPC's asynchronous core serves several loops badly."""
    with _starting:  # a cache alone would let two threads start one each
        loop, process_id = _started_loop()
    if process_id != os.getpid():  # the thread stayed behind, and gRPC with it: a call would wait for ever
        raise InvalidArgument("a client was used before this process was forked: spawn it, or fork before first use")
    return loop


@cache
def _started_loop() -> tuple[asyncio.AbstractEventLoop, int]:
    """In a daemon thread, so that a process may end without closing its clients."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="kvstore-client", daemon=True).start()
    return loop, os.getpid()


def _run(coroutine: Coroutine[Any, Any, R]) -> R:
    try:
        loop = _loop()
    except InvalidArgument:
        coroutine.close()
        raise
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        return future.result()
    except BaseException:  # an interrupt of the waiting thread: the call is not wanted any more
        future.cancel()
        raise
