"""The client against a node that lies, babbles, stalls or fails: a miss, or the typed error, within the deadline."""

from __future__ import annotations

import asyncio
import logging
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import kv_objects
import numpy as np
import pytest
import xxhash
from hostile_server import (
    Answer,
    Context,
    Fetch,
    Held,
    HostileServer,
    Lookup,
    Put,
    hang,
    pieces,
    receive_data,
    results,
    takes_all,
    verdicts,
)
from kv_strategies import bits
from prometheus_client import CollectorRegistry

import kvstore_codec as codec
from kvstore_client import (
    AsyncClient,
    AsyncNamespace,
    DeadlineExceeded,
    Hit,
    KvClientError,
    ObjectDamaged,
    ObjectForeign,
    ObjectUnsupported,
    ProtocolViolation,
    PutResult,
    RequestRefused,
    ServerFailed,
    Unavailable,
)
from kvstore_client.errors import ERROR_OF_STATUS
from kvstore_codec.container import FORMAT_VERSION
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import DATA_BYTES_MAX, Framed

LAYOUT = kv_objects.small_layout()
WIDE = kv_objects.small_layout("wide", layers=80, head_dim=256)  # objects over 2 MiB: several messages each
CHUNKS, CHUNK = 4, LAYOUT.chunk_tokens
BAD = 2  # the chunk that something is wrong with
HELD = Held.of(LAYOUT, CHUNKS, seed=1)
OTHER = Held.of(LAYOUT, CHUNKS, seed=2)
WIDE_HELD = Held.of(WIDE, 8, seed=3)
DEADLINE_S, SLACK_S = 1.0, 0.5
STATUSES = list(ERROR_OF_STATUS)
PAUSE = threading.Event()


@dataclass
class Caller:
    """One client with its own metrics."""

    client: AsyncClient
    registry: CollectorRegistry

    def namespace(self, layout: codec.KVLayout = LAYOUT) -> AsyncNamespace:
        return self.client.namespace(layout)

    def counted(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"kvstore_client_{name}_total", labels) or 0.0


@asynccontextmanager
async def calling(address: str, *, strict: bool = False, deadline: float = DEADLINE_S) -> Any:
    registry = CollectorRegistry()
    async with AsyncClient(address, strict=strict, deadline=deadline, registry=registry) as client:
        yield Caller(client, registry)


async def timed(call: Awaitable[Any]) -> Any:
    """The call's answer, which must come by the deadline, whatever the server does."""
    began = time.monotonic()
    try:
        return await call
    finally:
        took_s = time.monotonic() - began
        assert took_s < DEADLINE_S + SLACK_S, f"took {took_s:.2f} s"


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The client's log lines; nothing else may have complained, but for gRPC about bytes that are no message, and about
    its own poller, which the loops of one process share: now and then one finds taken what it was woken for."""
    loud = [
        record for record in caplog.records
        if record.levelno >= logging.WARNING and "PollerCompletionQueue" not in record.getMessage()
    ]  # fmt: skip
    strangers = [record for record in loud if record.name not in ("kvstore_client", "grpc._common")]
    assert not strangers, strangers
    return [record.getMessage() for record in loud if record.name == "kvstore_client"]


async def get_both_ways(
    fetch: Fetch, kind: type[KvClientError], intact: int, caplog: pytest.LogCaptureFixture, *,
    held: Held = HELD, lookup: Lookup | None = None, **arguments: Any,
) -> None:  # fmt: skip
    """A get of `held` that must end after `intact` chunks; and must raise `kind` where the client is strict."""
    with HostileServer(lookup=lookup or held.lookup, fetch=fetch) as server:
        async with calling(server.address) as lenient, calling(server.address, strict=True) as strict:
            (kv, tokens), error = await asyncio.gather(
                timed(lenient.namespace(held.layout).get(held.tokens, **arguments)),
                raised(strict.namespace(held.layout).get(held.tokens, **arguments)),
            )
            again = await lenient.namespace(held.layout).get(held.tokens, deadline=0.2, **arguments)
    assert type(error) is kind, error
    assert len(str(error).splitlines()) == 1
    assert server.address in str(error) or kind is DeadlineExceeded
    assert tokens == intact * CHUNK
    assert bits(kv) == bits(codec.token_slice(held.kv, 0, tokens))
    assert again[1] <= tokens
    assert lenient.counted("failures", call="get", reason=kind.code.value) == 2
    missed = 2 if tokens < len(held.tokens) else 0
    assert lenient.counted("misses", reason=kind.code.value) == missed
    assert lenient.counted("tokens", outcome="hit") == tokens + again[1]
    (line,) = logged(caplog)
    assert line.startswith(f"get: {kind.code.value}: ")


async def raised(call: Awaitable[Any]) -> KvClientError:
    with pytest.raises(KvClientError) as caught:
        await timed(call)
    return caught.value


def whole(*indices: int, held: Held = HELD) -> Iterator[Answer]:
    for index in indices:
        yield from pieces(index, held.blobs[index])


def as_fetch(function: Callable[[], Iterator[Answer]]) -> Fetch:
    return lambda request, context: function()


async def test_an_honest_server_of_this_kind_is_a_hit(caplog: pytest.LogCaptureFixture) -> None:
    """Or else the misses below would prove nothing."""
    with HostileServer(lookup=HELD.lookup, fetch=HELD.fetch, put=takes_all) as server:
        async with calling(server.address, strict=True) as caller:
            kv, tokens = await caller.namespace().get(HELD.tokens)
            stored = await caller.namespace().put(OTHER.tokens, OTHER.kv, quality="raw")
    assert tokens == len(HELD.tokens)
    assert bits(kv) == bits(HELD.kv)
    assert (stored.stored, stored.rejected) == (CHUNKS, 0)
    assert logged(caplog) == []


# Lookup


def lies() -> Iterator[tuple[str, list[kv_objects.ChunkStatus]]]:
    raw_bytes = CHUNK * LAYOUT.bytes_per_token
    too_large = codec.object_bytes_max(raw_bytes) + 1
    honest = HELD.status(0)
    yield "more chunks than asked for", [*map(HELD.status, range(CHUNKS)), HELD.status(0)]
    yield "no tokens", [honest, HELD.status(1, tokens=0)]
    yield "a token less", [honest, HELD.status(1, tokens=CHUNK - 1)]
    yield "2**32 - 1 tokens", [honest, HELD.status(1, tokens=2**32 - 1)]
    yield "unknown quality", [honest, HELD.status(1, quality=5)]
    yield "unknown provenance", [honest, HELD.status(1, provenance=2**32 - 1)]
    yield "no bytes", [honest, HELD.status(1, stored_bytes=0)]
    yield "more bytes than an object has", [honest, HELD.status(1, stored_bytes=too_large)]
    yield "2**64 - 1 bytes", [honest, HELD.status(1, stored_bytes=2**64 - 1)]
    yield "an empty status", [kv_objects.ChunkStatus()]


def calls(namespace: AsyncNamespace) -> list[tuple[str, Awaitable[Any]]]:
    return [
        ("lookup", namespace.lookup(HELD.tokens)),
        ("get", namespace.get(HELD.tokens)),
        ("put", namespace.put(HELD.tokens, HELD.kv)),
    ]


async def look_up_both_ways(lookup: Lookup, kind: type[KvClientError], caplog: pytest.LogCaptureFixture) -> None:
    """Each call that starts with a lookup, of a client that is strict and of one that is not."""
    with HostileServer(lookup=lookup, fetch=HELD.fetch) as server:
        async with calling(server.address) as lenient, calling(server.address, strict=True) as strict:
            hit, (kv, tokens), put, *errors = await asyncio.gather(
                *(timed(call) for _, call in calls(lenient.namespace())),
                *(raised(call) for _, call in calls(strict.namespace())),
            )
    assert [type(error) for error in errors] == [kind] * 3, errors
    assert hit == Hit()
    assert (kv.shape[2], tokens) == (0, 0)
    assert put == PutResult(rejected=CHUNKS, reasons=put.reasons)
    assert len(put.reasons) == len(put.reasons[0].splitlines()) == 1
    assert server.calls.count("Fetch") == server.calls.count("Put") == 0
    reason = kind.code.value
    for call in ("lookup", "get", "put"):
        assert lenient.counted("failures", call=call, reason=reason) == 1
    assert lenient.counted("misses", reason=reason) == 2
    assert lenient.counted("rejected_chunks", reason=reason) == CHUNKS
    assert sorted(line.split(": ")[0] for line in logged(caplog)) == ["get", "lookup", "put"]


@pytest.mark.parametrize(("what", "chunks"), [pytest.param(*lie, id=lie[0]) for lie in lies()])
async def test_a_lookup_that_lies(
    what: str, chunks: list[kv_objects.ChunkStatus], caplog: pytest.LogCaptureFixture
) -> None:
    answer = kv_objects.answer_of(chunks)
    await look_up_both_ways(lambda request, context: answer, ProtocolViolation, caplog)


async def test_a_lookup_of_garbage(caplog: pytest.LogCaptureFixture) -> None:
    await look_up_both_ways(lambda request, context: b"\xff" * 100, ProtocolViolation, caplog)


@pytest.mark.slow
async def test_a_lookup_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    def lookup(request: pb.LookupRequest, context: Context) -> Answer:
        hang(context)
        return pb.LookupResponse()

    await look_up_both_ways(lookup, DeadlineExceeded, caplog)


@pytest.mark.parametrize("status", STATUSES, ids=lambda status: status.name)
async def test_a_lookup_that_fails(status: grpc.StatusCode, caplog: pytest.LogCaptureFixture) -> None:
    def lookup(request: pb.LookupRequest, context: Context) -> Answer:
        context.abort(status, "not\ntoday")
        raise AssertionError("abort returned")

    await look_up_both_ways(lookup, ERROR_OF_STATUS[status], caplog)


async def test_no_answer_of_an_unknown_tier_is_refused() -> None:
    """A later version may have tiers that this one does not know; they change nothing."""
    answer = kv_objects.answer_of([HELD.status(0, tier=99)])
    with HostileServer(lookup=lambda request, context: answer) as server:
        async with calling(server.address, strict=True) as caller:
            hit = await caller.namespace().lookup(HELD.tokens)
    assert [chunk.tier for chunk in hit.chunks] == ["unknown"]


@pytest.mark.slow
async def test_many_slow_lookups_of_one_prompt_share_its_deadline() -> None:
    """A prompt of more chunks than one lookup takes; every lookup alone is in time."""
    layout = kv_objects.small_layout("long", layers=1, head_dim=2)
    tokens = np.arange(4096 * 3 * layout.chunk_tokens)

    def lookup(request: pb.LookupRequest, context: Context) -> Answer:
        waits(context, DEADLINE_S * 0.7)
        one = kv_objects.ChunkStatus(tokens=layout.chunk_tokens, stored_bytes=500, tier=pb.TIER_HOST)
        return kv_objects.answer_of([one] * (len(request.chunk_hashes) // 32))

    with HostileServer(lookup=lookup) as server:
        async with calling(server.address, strict=True) as caller:
            error = await raised(caller.namespace(layout).lookup(tokens))
    assert type(error) is DeadlineExceeded


def waits(context: Context, seconds: float) -> None:
    end = time.monotonic() + seconds
    while context.is_active() and time.monotonic() < end:
        PAUSE.wait(0.01)


# Fetch: pieces out of place


def fetches_out_of_place() -> Iterator[tuple[str, int, Callable[[], Iterator[Answer]]]]:
    blob = HELD.blobs[BAD]

    def of_bad(*sent: tuple[int, int, int, bytes]) -> Iterator[Answer]:
        yield from whole(*range(BAD))
        for index, offset, object_bytes, data in sent:
            yield Framed(pb.FetchResponse(chunk_index=index, offset=offset, object_bytes=object_bytes), data)

    size = len(blob)
    yield "another index", BAD, lambda: of_bad((BAD + 1, 0, size, blob))
    yield "an index again", BAD, lambda: of_bad((BAD - 1, 0, len(HELD.blobs[BAD - 1]), HELD.blobs[BAD - 1]))
    yield "index 2**32 - 1", BAD, lambda: of_bad((2**32 - 1, 0, size, blob))
    yield "a gap", BAD, lambda: of_bad((BAD, 0, size, blob[:100]), (BAD, 101, 0, blob[101:]))
    yield "an overlap", BAD, lambda: of_bad((BAD, 0, size, blob[:100]), (BAD, 50, 0, blob[50:]))
    yield "a start in the middle", BAD, lambda: of_bad((BAD, 100, size, blob[100:]))
    yield "an index that changes inside", BAD, lambda: of_bad((BAD, 0, size, blob[:100]), (3, 100, 0, blob[100:]))
    yield "an object that starts again inside", BAD, lambda: of_bad((BAD, 0, size, blob[:100]), (BAD, 0, size, blob))
    yield "a byte over in its last piece", BAD, lambda: of_bad((BAD, 0, size, blob[:9]), (BAD, 9, 0, blob[9:] + b"x"))
    yield "a byte after its end", BAD + 1, lambda: of_bad((BAD, 0, size, blob), (BAD, size, 0, b"x"))
    yield "more than it said", BAD, lambda: of_bad((BAD, 0, 100, blob))
    yield "no length", BAD, lambda: of_bad((BAD, 0, 0, blob))
    too_large = codec.object_bytes_max(CHUNK * LAYOUT.bytes_per_token) + 1
    yield "more than an object has", BAD, lambda: of_bad((BAD, 0, too_large, blob))
    yield "2**64 - 1 bytes", BAD, lambda: of_bad((BAD, 0, 2**64 - 1, blob))
    yield "an empty piece", BAD, lambda: of_bad((BAD, 0, size, b""))
    yield "an empty piece inside", BAD, lambda: of_bad((BAD, 0, size, blob[:100]), (BAD, 100, 0, b""))
    yield "an end inside an object", BAD, lambda: of_bad((BAD, 0, size, blob[:-1]))
    yield "nothing but an empty message", 0, lambda: iter([b""])
    yield "garbage", BAD, lambda: (message for message in [*whole(*range(BAD)), b"\xff" * 100])
    yield "a chunk too many", CHUNKS, lambda: (message for message in [*whole(*range(CHUNKS)), *pieces(CHUNKS, blob)])


@pytest.mark.parametrize(
    ("what", "intact", "fetch"), [pytest.param(*case, id=case[0]) for case in fetches_out_of_place()]
)
async def test_a_fetch_out_of_place(
    what: str, intact: int, fetch: Callable[[], Iterator[Answer]], caplog: pytest.LogCaptureFixture
) -> None:
    await get_both_ways(as_fetch(fetch), ProtocolViolation, intact, caplog)


async def test_an_object_that_has_become_larger_since_it_was_looked_up_is_read() -> None:
    def smaller(request: pb.LookupRequest, context: Context) -> pb.LookupResponse:
        return kv_objects.answer_of([HELD.status(index, stored_bytes=9) for index in range(CHUNKS)])

    with HostileServer(lookup=smaller, fetch=HELD.fetch) as server:
        async with calling(server.address, strict=True) as caller:
            kv, tokens = await caller.namespace().get(HELD.tokens)
    assert tokens == len(HELD.tokens)
    assert bits(kv) == bits(HELD.kv)


async def test_a_piece_over_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    def fetch() -> Iterator[Answer]:
        yield from pieces(0, WIDE_HELD.blobs[0], size=DATA_BYTES_MAX + 1)

    await get_both_ways(as_fetch(fetch), ProtocolViolation, 0, caplog, held=WIDE_HELD)


async def test_an_object_in_pieces_of_one_byte_is_slow_but_fine() -> None:
    def fetch() -> Iterator[Answer]:
        yield from pieces(0, HELD.blobs[0], size=1)

    with HostileServer(lookup=HELD.lookup, fetch=as_fetch(fetch)) as server:
        async with calling(server.address, strict=True, deadline=20.0) as caller:
            kv, tokens = await caller.namespace().get(HELD.tokens[:CHUNK])
    assert tokens == CHUNK
    assert bits(kv) == bits(codec.token_slice(HELD.kv, 0, CHUNK))


async def test_a_fetch_that_ends_early_at_a_chunk_is_a_shorter_hit(caplog: pytest.LogCaptureFixture) -> None:
    """As the protocol says of a chunk that went away after the lookup; no error, also where the client is strict."""
    with HostileServer(lookup=HELD.lookup, fetch=as_fetch(lambda: whole(*range(BAD)))) as server:
        async with calling(server.address, strict=True) as caller:
            kv, tokens = await timed(caller.namespace().get(HELD.tokens))
    assert tokens == BAD * CHUNK
    assert bits(kv) == bits(codec.token_slice(HELD.kv, 0, tokens))
    assert caller.counted("misses", reason="absent") == 1
    assert logged(caplog) == []


# Fetch: objects that are wrong


def with_header(blob: bytes, offset: int, value: bytes) -> bytes:
    """The object with other bytes in its header, and the header's checksum made right again."""
    changed = bytearray(blob)
    changed[offset : offset + len(value)] = value
    checked = codec.HEADER_BYTES - 8
    changed[checked : codec.HEADER_BYTES] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(changed[:checked])))
    return bytes(changed)


def object_of(layout: codec.KVLayout = LAYOUT, *, tokens: int = CHUNK, **changes: Any) -> bytes:
    """The bad chunk as it should be, but for `changes`."""
    ref = HELD.refs[BAD]
    kv = codec.token_slice(HELD.kv, ref.first_token, ref.first_token + tokens)
    honest: dict[str, Any] = {"quality": "raw", "first_position": ref.first_token, "chunk_hash": ref.hash}
    blob: bytes = codec.encode(kv, layout, **(honest | changes))
    return blob


def bad_objects() -> Iterator[tuple[str, type[KvClientError], bytes]]:
    blob = HELD.blobs[BAD]
    flips = {"magic": 0, "namespace": 20, "header": codec.HEADER_BYTES - 20, "table": codec.HEADER_BYTES + 5}
    for what, at in (flips | {"payload": len(blob) // 2, "last byte": len(blob) - 1}).items():
        yield f"a bit of its {what} flipped", ObjectDamaged, blob[:at] + bytes([blob[at] ^ 4]) + blob[at + 1 :]
    yield "garbage", ObjectDamaged, np.random.default_rng(0).bytes(len(blob))
    yield "zeros", ObjectDamaged, bytes(len(blob))
    yield "a single byte", ObjectDamaged, blob[:1]
    yield "its header only", ObjectDamaged, blob[: codec.HEADER_BYTES]
    yield "cut short", ObjectDamaged, blob[:-1]
    other = kv_objects.small_layout("another-model")
    yield "of another namespace", ObjectForeign, object_of(other)
    yield "of another chunk", ObjectForeign, object_of(chunk_hash=HELD.refs[0].hash)
    yield "of another prompt", ObjectForeign, OTHER.blobs[BAD]
    yield "of another position", ObjectForeign, object_of(first_position=0)
    yield "of fewer tokens", ObjectForeign, object_of(tokens=CHUNK - 1)
    yield "of a later version", ObjectUnsupported, with_header(blob, 4, struct.pack("<H", FORMAT_VERSION + 1))


@pytest.mark.parametrize(("what", "kind", "blob"), [pytest.param(*case, id=case[0]) for case in bad_objects()])
async def test_a_bad_object(
    what: str, kind: type[KvClientError], blob: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    def fetch() -> Iterator[Answer]:
        yield from whole(*range(BAD))
        yield from pieces(BAD, blob)
        yield from whole(BAD + 1)

    await get_both_ways(as_fetch(fetch), kind, BAD, caplog)


def test_the_header_of_the_later_version_is_otherwise_right() -> None:
    assert with_header(HELD.blobs[0], 4, struct.pack("<H", FORMAT_VERSION)) == HELD.blobs[0]


@pytest.mark.parametrize(
    ("what", "changes"), [("quality", {"quality": "low"}), ("provenance", {"provenance": "medium"})]
)
async def test_less_quality_than_the_lookup_declared(
    what: str, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def fetch() -> Iterator[Answer]:
        yield from whole(*range(BAD))
        yield from pieces(BAD, object_of(**changes))

    await get_both_ways(as_fetch(fetch), ObjectForeign, BAD, caplog, min_quality="high")


@pytest.mark.parametrize("seed", range(4))
async def test_random_bytes_are_never_values(seed: int) -> None:
    """Bits flipped anywhere: what is returned is exact, whatever is returned."""
    rng = np.random.default_rng(seed)

    def fetch(request: pb.FetchRequest, context: Context) -> Iterator[Answer]:
        for index, blob in enumerate(HELD.blobs):
            damaged = bytearray(blob)
            for at in rng.integers(0, len(blob), int(rng.integers(0, 3))):
                damaged[at] ^= 1 << int(rng.integers(0, 8))
            yield from pieces(index, bytes(damaged))

    with HostileServer(lookup=HELD.lookup, fetch=fetch) as server:
        async with calling(server.address) as caller:
            for _ in range(20):
                kv, tokens = await caller.namespace().get(HELD.tokens)
                assert bits(kv) == bits(codec.token_slice(HELD.kv, 0, tokens))


# Fetch: silence and failure


def stalls() -> Iterator[tuple[str, int, Fetch]]:
    def at_once(request: pb.FetchRequest, context: Context) -> Iterator[Answer]:
        hang(context)
        yield from ()

    def after_chunks(request: pb.FetchRequest, context: Context) -> Iterator[Answer]:
        yield from whole(*range(BAD))
        hang(context)

    def inside_a_chunk(request: pb.FetchRequest, context: Context) -> Iterator[Answer]:
        yield from whole(*range(BAD))
        yield next(pieces(BAD, HELD.blobs[BAD], size=100))
        hang(context)

    def after_everything(request: pb.FetchRequest, context: Context) -> Iterator[Answer]:
        yield from whole(*range(CHUNKS))
        hang(context)

    def a_byte_at_a_time(request: pb.FetchRequest, context: Context) -> Iterator[Answer]:
        yield from whole(*range(BAD))
        for piece in pieces(BAD, HELD.blobs[BAD], size=1):
            waits(context, 0.01)
            yield piece

    for intact, stall in (
        (0, at_once), (BAD, after_chunks), (BAD, inside_a_chunk), (CHUNKS, after_everything), (BAD, a_byte_at_a_time),
    ):  # fmt: skip
        yield stall.__name__, intact, stall


@pytest.mark.slow
@pytest.mark.parametrize(("what", "intact", "fetch"), [pytest.param(*case, id=case[0]) for case in stalls()])
async def test_a_fetch_that_stalls(what: str, intact: int, fetch: Fetch, caplog: pytest.LogCaptureFixture) -> None:
    await get_both_ways(fetch, DeadlineExceeded, intact, caplog)


@pytest.mark.parametrize("status", STATUSES, ids=lambda status: status.name)
@pytest.mark.parametrize("intact", [0, BAD])
async def test_a_fetch_that_fails(
    intact: int, status: grpc.StatusCode, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    def fetch(request: pb.FetchRequest, context: Context) -> Iterator[Answer]:
        yield from whole(*range(intact))
        context.abort(status, "not\ntoday")

    await get_both_ways(fetch, ERROR_OF_STATUS[status], intact, caplog)


# Put


async def put_both_ways(
    put: Put, kind: type[KvClientError], caplog: pytest.LogCaptureFixture, *, held: Held = HELD
) -> None:
    with HostileServer(put=put) as server:
        async with calling(server.address) as lenient, calling(server.address, strict=True) as strict:
            result, error = await asyncio.gather(
                timed(lenient.namespace(held.layout).put(held.tokens, held.kv, quality="raw")),
                raised(strict.namespace(held.layout).put(held.tokens, held.kv, quality="raw")),
            )
            await lenient.namespace(held.layout).put(held.tokens, held.kv, quality="raw", deadline=0.3)
    chunks = len(held.refs)
    assert type(error) is kind, error
    assert result == PutResult(rejected=chunks, reasons=result.reasons)
    assert len(result.reasons) == len(result.reasons[0].splitlines()) == 1
    assert lenient.counted("rejected_chunks", reason=kind.code.value) == 2 * chunks
    (line,) = logged(caplog)
    assert line.startswith(f"put: {kind.code.value}: ")


def put_answers() -> Iterator[tuple[str, list[Answer]]]:
    """What is answered to the offer, and what to the commit."""
    send = verdicts([pb.VERDICT_SEND] * CHUNKS)
    stored = results([pb.OUTCOME_STORED] * CHUNKS)
    yield "a verdict too few", [verdicts([pb.VERDICT_SEND] * (CHUNKS - 1)), stored]
    yield "a verdict too many", [verdicts([pb.VERDICT_SEND] * (CHUNKS + 1)), stored]
    yield "no verdicts", [verdicts([]), stored]
    yield "a verdict unspecified", [verdicts([0] * CHUNKS), stored]
    yield "an unknown verdict", [verdicts([99] * CHUNKS), stored]
    yield "an empty answer to the offer", [b"", stored]
    yield "garbage for verdicts", [b"\xff" * 100, stored]
    yield "results for verdicts", [stored, stored]
    yield "an end after the offer", []
    yield "verdicts for results", [send, send]
    yield "a result too few", [send, results([pb.OUTCOME_STORED] * (CHUNKS - 1))]
    yield "a result too many", [send, results([pb.OUTCOME_STORED] * (CHUNKS + 1))]
    yield "an unknown outcome", [send, results([99] * CHUNKS)]
    yield "an outcome unspecified", [send, results([0] * CHUNKS)]
    yield "an empty answer to the commit", [send, b""]
    yield "garbage for results", [send, b"\xff" * 100]
    yield "an end after the commit", [send]


def answering(answers: list[Answer]) -> Put:
    def put(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
        next(requests)
        for index, answer in enumerate(answers):
            if index:
                receive_data(requests)
            yield answer
        if answers:
            receive_data(requests)

    return put


@pytest.mark.parametrize(("what", "answers"), [pytest.param(*case, id=case[0]) for case in put_answers()])
async def test_a_put_answered_out_of_place(
    what: str, answers: list[Answer], caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    await put_both_ways(answering(answers), ProtocolViolation, caplog)


async def test_results_before_the_verdicts_end_nothing_early(caplog: pytest.LogCaptureFixture) -> None:
    """Both answers at once: what was not sent is not believed to be stored."""

    def put(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
        next(requests)
        yield results([pb.OUTCOME_STORED] * CHUNKS)
        yield verdicts([pb.VERDICT_SEND] * CHUNKS)

    await put_both_ways(put, ProtocolViolation, caplog)


@pytest.mark.slow
async def test_a_put_that_hangs_at_the_offer(caplog: pytest.LogCaptureFixture) -> None:
    def put(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
        next(requests)
        hang(context)
        yield from ()

    await put_both_ways(put, DeadlineExceeded, caplog)


@pytest.mark.slow
async def test_a_put_whose_data_is_not_read(caplog: pytest.LogCaptureFixture) -> None:
    """Many MB, so that flow control stops the writer."""

    def put(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
        yield verdicts([pb.VERDICT_SEND] * len(next(requests).head.offer.objects))
        hang(context)

    await put_both_ways(put, DeadlineExceeded, caplog, held=WIDE_HELD)


@pytest.mark.slow
async def test_a_put_that_hangs_at_the_commit(caplog: pytest.LogCaptureFixture) -> None:
    def put(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
        yield verdicts([pb.VERDICT_SEND] * len(next(requests).head.offer.objects))
        receive_data(requests)
        hang(context)

    await put_both_ways(put, DeadlineExceeded, caplog)


async def test_a_put_that_ends_well_before_its_data_did(caplog: pytest.LogCaptureFixture) -> None:
    def put(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
        yield verdicts([pb.VERDICT_SEND] * len(next(requests).head.offer.objects))
        next(requests)

    await put_both_ways(put, ProtocolViolation, caplog, held=WIDE_HELD)


@pytest.mark.parametrize("status", STATUSES, ids=lambda status: status.name)
@pytest.mark.parametrize("when", ["offer", "data", "commit"])
async def test_a_put_that_fails(when: str, status: grpc.StatusCode, caplog: pytest.LogCaptureFixture) -> None:
    def put(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
        count = len(next(requests).head.offer.objects)
        if when != "offer":
            yield verdicts([pb.VERDICT_SEND] * count)
        if when == "data":
            next(requests)
        if when == "commit":
            receive_data(requests)
        context.abort(status, "not\ntoday")

    held = WIDE_HELD if when == "data" else HELD  # of many MB: the writer still writes
    await put_both_ways(put, ERROR_OF_STATUS[status], caplog, held=held)


async def test_chunks_that_a_node_turns_down_are_rejected_not_errors(caplog: pytest.LogCaptureFixture) -> None:
    """Refused before or rejected after they are sent: an answer, counted and logged, also where the client is
    strict."""

    def put(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
        next(requests)
        yield verdicts([pb.VERDICT_SEND, pb.VERDICT_SEND, pb.VERDICT_REFUSED, pb.VERDICT_HAVE])
        assert receive_data(requests) == len(HELD.blobs[0]) + len(HELD.blobs[1])
        outcomes = [pb.OUTCOME_STORED, pb.OUTCOME_REJECTED, pb.OUTCOME_REJECTED, pb.OUTCOME_HAVE]
        yield pb.PutResponse(results=pb.PutResults(results=[
            pb.ObjectResult(outcome=outcome, reason="no\nroom\x1b[31m " + "x" * 10_000) for outcome in outcomes
        ]))  # fmt: skip

    with HostileServer(put=put) as server:
        async with calling(server.address, strict=True) as caller:
            result = await timed(caller.namespace().put(HELD.tokens, HELD.kv, quality="raw"))
    assert (result.stored, result.rejected, result.have, result.tokens) == (1, 2, 1, CHUNK)
    (reason,) = result.reasons
    assert reason.startswith("no room")
    assert reason.isprintable()
    assert len(reason) < 400
    assert caller.counted("rejected_chunks", reason="refused") == 2
    (line,) = logged(caplog)
    assert line.startswith("put: refused: no room")


# The rest of the calls, and a server that goes away


@pytest.mark.parametrize("status", STATUSES, ids=lambda status: status.name)
async def test_a_delete_that_fails(status: grpc.StatusCode, caplog: pytest.LogCaptureFixture) -> None:
    def delete(request: pb.DeleteRequest, context: Context) -> Answer:
        context.abort(status, "not\ntoday")
        raise AssertionError("abort returned")

    kind = ERROR_OF_STATUS[status]
    with HostileServer(delete=delete) as server:
        async with calling(server.address) as lenient, calling(server.address, strict=True) as strict:
            result, error = await asyncio.gather(
                timed(lenient.namespace().delete(HELD.tokens)), raised(strict.namespace().delete(HELD.tokens))
            )
    assert type(error) is kind
    assert (result.objects, result.bytes, len(result.reasons)) == (0, 0, 1)
    assert lenient.counted("failures", call="delete", reason=kind.code.value) == 1
    (line,) = logged(caplog)
    assert line.startswith(f"delete: {kind.code.value}: ")


async def test_garbage_for_delete_and_stat() -> None:
    garbage = b"\xff" * 100
    with HostileServer(delete=lambda _, __: garbage, stat=lambda _, __: garbage) as server:
        async with calling(server.address, strict=True) as caller:
            assert type(await raised(caller.namespace().delete(HELD.tokens))) is ProtocolViolation
            assert type(await raised(caller.client.stat())) is ProtocolViolation


async def test_a_stat_raises_also_where_the_client_is_not_strict() -> None:
    def stat(request: pb.StatRequest, context: Context) -> Answer:
        context.abort(grpc.StatusCode.INTERNAL, "not today")
        raise AssertionError("abort returned")

    with HostileServer(stat=stat) as server:
        async with calling(server.address) as caller:
            assert type(await raised(caller.client.stat())) is ServerFailed


async def test_a_server_of_something_else(caplog: pytest.LogCaptureFixture) -> None:
    """A port where gRPC is spoken, but not our service."""
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    async with calling(address) as lenient, calling(address, strict=True) as strict:
        assert (await timed(lenient.namespace().get(HELD.tokens)))[1] == 0
        assert type(await raised(strict.namespace().get(HELD.tokens))) is RequestRefused
    server.stop(None).wait()
    assert lenient.counted("misses", reason="refused") == 1


@pytest.mark.parametrize(
    ("spoken", "kinds"), [(b"HTTP/1.1 400 Bad Request\r\n\r\n", {Unavailable}), (b"", {DeadlineExceeded, Unavailable})]
)
async def test_a_port_where_something_else_or_nothing_is_spoken(spoken: bytes, kinds: set[type[KvClientError]]) -> None:
    handlers: list[asyncio.Task[Any]] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.append(task)
        try:
            while await reader.read(1 << 16):
                if spoken:
                    writer.write(spoken)
                    break
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with calling(address) as lenient, calling(address, strict=True) as strict:
            (_, tokens), error = await asyncio.gather(
                timed(lenient.namespace().get(HELD.tokens)), raised(strict.namespace().get(HELD.tokens))
            )
        await asyncio.gather(*handlers, return_exceptions=True)
    assert tokens == 0
    assert type(error) in kinds, error
