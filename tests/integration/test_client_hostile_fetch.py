"""Objects out of place, wrong, late or never: a shorter hit, or the typed error, within the deadline."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import kv_objects
import numpy as np
import pytest
import xxhash
from hostile_calls import CHUNK, CHUNKS, HELD, LAYOUT, OTHER, STATUSES, WIDE_HELD, calling, logged, raised, timed, waits
from hostile_server import Answer, Context, Fetch, Held, HostileServer, Lookup, hang, pieces
from kv_strategies import bits

import kvstore_codec as codec
from kvstore_client import (
    DeadlineExceeded,
    KvClientError,
    ObjectDamaged,
    ObjectForeign,
    ObjectUnsupported,
    ProtocolViolation,
)
from kvstore_client.errors import ERROR_OF_STATUS
from kvstore_codec.container import FORMAT_VERSION
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import DATA_BYTES_MAX, Framed

BAD = 2  # the chunk that something is wrong with


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


def whole(*indices: int, held: Held = HELD) -> Iterator[Answer]:
    for index in indices:
        yield from pieces(index, held.blobs[index])


def as_fetch(function: Callable[[], Iterator[Answer]]) -> Fetch:
    return lambda request, context: function()


# Pieces out of place


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


# Objects that are wrong


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


# Silence and failure


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
