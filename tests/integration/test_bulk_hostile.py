"""The client against a bulk path that lies, babbles, stalls or breaks: a miss, or the typed error, in time."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence

import grpc
import kv_objects
import pytest
import xxhash
from bulk_liar import BulkLiar, Script
from hostile_server import HANG_S_MAX, Held, HostileServer, takes_all
from kv_objects import small_layout
from kv_strategies import bits
from polling import wait_until
from prometheus_client import CollectorRegistry

import kvstore_codec as codec
from kvstore_client import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    KvClientError,
    ObjectDamaged,
    ProtocolViolation,
    RequestRefused,
    Unavailable,
)
from kvstore_client.transports.bulk_path import Transport
from kvstore_codec import container
from kvstore_codec.container import HEADER_BYTES
from kvstore_codec.raw_chunks import RawChunks
from kvstore_proto.v1 import store_pb2, transfer_pb2
from kvstore_proto.v1.bulk import CONTROL_BYTES_MAX, VERSION, Kind, frame, header

LAYOUT = small_layout("bulk")
HELD = Held.of(LAYOUT, 3, seed=5)
DEADLINE_S, SLACK_S = 1.0, 0.5
WELL = frame(Kind.END)
FOUND = frame(Kind.FOUND, 0, kv_objects.answer_of(map(HELD.status, range(3))).SerializeToString())
FIRST = frame(Kind.OBJECT, 0, HELD.blobs[0])


def sends(data: bytes, *, before: bytes = FIRST, found: bytes = FOUND, stays: bool = False) -> Script:
    """An honest answer to the lookup, where there is one, and first object, then this. `stays`: it says nothing more,
    but does not hang up either."""

    def script(accepted: socket.socket, kind: Kind, payload: bytes) -> None:
        accepted.sendall((found if kind is Kind.GET else b"") + before + data)
        if stays:
            threading.Event().wait(HANG_S_MAX)

    return script


FOUR_OF_THREE = sends(b"".join(frame(Kind.OBJECT, at, HELD.blobs[at]) for at in (1, 2)) + FIRST)


def dribbles(accepted: socket.socket, kind: Kind, payload: bytes) -> None:
    accepted.sendall(FOUND + FIRST)
    for byte in frame(Kind.OBJECT, 1, HELD.blobs[1]):
        accepted.sendall(bytes([byte]))
        threading.Event().wait(0.2)


def damaged(blob: bytes) -> bytes:
    return blob[:-1] + bytes([blob[-1] ^ 1])


LIES: list[tuple[str, Script, type[KvClientError]]] = [
    ("unknown kind", sends(b"\x63" + bytes(15)), ProtocolViolation),
    ("a header that is none", sends(b"\xff" * 16), ProtocolViolation),
    ("a kind out of place", sends(frame(Kind.RESULTS)), ProtocolViolation),
    ("an index out of place", sends(frame(Kind.OBJECT, 2, HELD.blobs[2])), ProtocolViolation),
    ("the same object again", sends(FIRST), ProtocolViolation),
    ("an object without bytes", sends(frame(Kind.OBJECT, 1)), ProtocolViolation),
    ("more bytes than an object has", sends(header(Kind.OBJECT, 1, 1 << 39), stays=True), ProtocolViolation),
    ("a long control frame", sends(header(Kind.END, 0, CONTROL_BYTES_MAX + 1), stays=True), ProtocolViolation),
    ("an end that is no message", sends(frame(Kind.END, 0, b"\xff\xff\xff")), ProtocolViolation),
    ("places without shared memory", sends(frame(Kind.PLACES, 1, transfer_pb2.Places(
        offset=[0], object_bytes=[1]).SerializeToString())), ProtocolViolation),
    ("another answer to a lookup", sends(FOUND), ProtocolViolation),
    ("four objects of three", FOUR_OF_THREE, ProtocolViolation),
    ("a refusal", sends(frame(Kind.END, 0, transfer_pb2.Ended(status=3, details="a\nb").SerializeToString())),
     RequestRefused),
    ("hanging up inside a header", sends(FIRST[:7]), Unavailable),
    ("hanging up inside an object", sends(frame(Kind.OBJECT, 1, HELD.blobs[1])[:-9]), Unavailable),
    ("silence", sends(b"", stays=True), DeadlineExceeded),
    ("silence inside an object", sends(frame(Kind.OBJECT, 1, HELD.blobs[1])[:-9], stays=True), DeadlineExceeded),
    ("a byte at a time", dribbles, DeadlineExceeded),
    ("an object cut short", sends(frame(Kind.OBJECT, 1, HELD.blobs[1][:-1]) + WELL), ObjectDamaged),
    ("an object with more behind it", sends(frame(Kind.OBJECT, 1, HELD.blobs[1] + b"x") + WELL), ObjectDamaged),
    ("a damaged object", sends(frame(Kind.OBJECT, 1, damaged(HELD.blobs[1])) + WELL), ObjectDamaged),
]  # fmt: skip


def finds(answer: bytes, kind: Kind = Kind.FOUND) -> Script:
    """This in place of an answer to the lookup, and the objects behind it."""
    objects = b"".join(frame(Kind.OBJECT, at, blob) for at, blob in enumerate(HELD.blobs))
    return sends(objects + WELL, before=b"", found=frame(kind, 0, answer), stays=True)


def told(*statuses: kv_objects.ChunkStatus) -> Script:
    return finds(kv_objects.answer_of(statuses).SerializeToString())


ONE = HELD.status(0)
UNEQUAL = store_pb2.LookupResponse(tokens=[16, 16], quality=[0, 0], provenance=[0], stored_bytes=[1, 1])
FOUND_LIES: list[tuple[str, Script, type[KvClientError]]] = [
    ("no message", finds(b"\xff\xff\xff"), ProtocolViolation),
    ("lists of unequal length", finds(UNEQUAL.SerializeToString()), ProtocolViolation),
    ("more chunks than were asked for", told(ONE, ONE, ONE, ONE), ProtocolViolation),
    ("other tokens", told(HELD.status(0, tokens=15)), ProtocolViolation),
    ("a quality that there is not", told(HELD.status(0, quality=99)), ProtocolViolation),
    ("no bytes", told(HELD.status(0, stored_bytes=0)), ProtocolViolation),
    ("too many bytes", told(HELD.status(0, stored_bytes=1 << 60)), ProtocolViolation),
    ("objects of what it has not", told(), ProtocolViolation),
    ("objects of what is too bad", told(HELD.status(0, provenance=4)), ProtocolViolation),
    ("objects alone", sends(FIRST, before=b"", found=b"", stays=True), ProtocolViolation),
    ("an end alone", sends(WELL, before=b"", found=b"", stays=True), ProtocolViolation),
    ("a refusal", finds(transfer_pb2.Ended(status=3, details="no").SerializeToString(), Kind.END), RequestRefused),
    ("a long answer", sends(header(Kind.FOUND, 0, CONTROL_BYTES_MAX + 1), before=b"", found=b"", stays=True),
     ProtocolViolation),
    ("silence inside the answer", sends(FOUND[:-1], before=b"", found=b"", stays=True), DeadlineExceeded),
]  # fmt: skip

SIZE = len(HELD.blobs[0])
SIZE_MAX = codec.object_bytes_max(LAYOUT.chunk_tokens * LAYOUT.bytes_per_token)
MEMORY = HELD.blobs[0] + bytes(SIZE_MAX)


def places(*places: tuple[int, int], at: int = 1) -> bytes:
    """The first object's honest place, and then these."""
    told = transfer_pb2.Places(offset=[place[0] for place in places], object_bytes=[place[1] for place in places])
    honest = transfer_pb2.Places(offset=[0], object_bytes=[SIZE])
    return frame(Kind.PLACES, 0, honest.SerializeToString()) + frame(Kind.PLACES, at, told.SerializeToString())


PLACE_LIES = {
    "outside the memory": places((len(MEMORY), SIZE)),
    "across its end": places((len(MEMORY) - SIZE + 1, SIZE)),
    "beyond every memory": places((2**64 - 1, SIZE)),
    "without bytes": places((0, 0)),
    "of more bytes than an object has": places((0, SIZE_MAX + 1)),
    "of more objects than there are": places((0, SIZE), (0, SIZE), (0, SIZE)),
    "of none": places(),
    "of an object that had one": places((0, SIZE), at=0),
    "lists of unequal length": frame(Kind.PLACES, 0, transfer_pb2.Places(offset=[0, 0], object_bytes=[SIZE]
                                                                         ).SerializeToString()),
}  # fmt: skip


async def get(
    address: str, *, strict: bool, registry: CollectorRegistry, transport: Transport = "tcp", planned: bool = False
) -> tuple[object, int]:
    async with AsyncClient(
        address, transport=transport, strict=strict, deadline=DEADLINE_S, registry=registry
    ) as client:  # fmt: skip
        began = time.monotonic()
        ttft, prefill = (1000.0, 0.01) if planned else (None, None)
        try:
            return await client.namespace(LAYOUT).get(
                HELD.tokens, min_quality="lossless", ttft=ttft, prefill_tokens_per_s=prefill
            )
        finally:
            assert time.monotonic() - began < DEADLINE_S + SLACK_S


@pytest.mark.parametrize("planned", [False, True], ids=["one request", "lookup and fetch"])
@pytest.mark.parametrize(("script", "kind"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
async def test_a_lie_ends_the_prefix(script: Script, kind: type[KvClientError], planned: bool) -> None:
    if planned and (kind is DeadlineExceeded or script is FOUR_OF_THREE):
        pytest.skip("the same code waits as long again, or the planner does not look behind what it wants")
    registry = CollectorRegistry()
    with BulkLiar(script) as liar, HostileServer(lookup=HELD.lookup, fetch=HELD.fetch, connect=liar.connect) as server:
        kv, tokens = await get(server.address, strict=False, registry=registry, planned=planned)
        with pytest.raises(KvClientError) as caught:
            await get(server.address, strict=True, registry=registry, planned=planned)
    assert tokens == (3 if script is FOUR_OF_THREE else 1) * LAYOUT.chunk_tokens
    assert bits(kv) == bits(codec.token_slice(HELD.kv, 0, tokens))
    assert type(caught.value) is kind, caught.value
    assert len(str(caught.value).splitlines()) == 1
    assert liar.requests == [Kind.FETCH if planned else Kind.GET] * 2
    assert server.calls.count("Fetch") == 0, "what has come is not asked for again"
    assert registry.get_sample_value("kvstore_client_failures_total", {"call": "get", "reason": kind.code.value})


@pytest.mark.parametrize(("script", "kind"), [lie[1:] for lie in FOUND_LIES], ids=[lie[0] for lie in FOUND_LIES])
async def test_a_lie_about_what_there_is_is_a_miss(script: Script, kind: type[KvClientError]) -> None:
    registry = CollectorRegistry()
    with BulkLiar(script) as liar, HostileServer(lookup=HELD.lookup, fetch=HELD.fetch, connect=liar.connect) as server:
        _, tokens = await get(server.address, strict=False, registry=registry)
        with pytest.raises(KvClientError) as caught:
            await get(server.address, strict=True, registry=registry)
    assert tokens == 0
    assert type(caught.value) is kind, caught.value
    assert server.calls.count("Fetch") == 0, "who lies is not asked again"
    assert registry.get_sample_value("kvstore_client_failures_total", {"call": "get", "reason": kind.code.value})


HONEST = sends(b"".join(frame(Kind.OBJECT, at, blob) for at, blob in enumerate(HELD.blobs)) + WELL, before=b"")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("script", "kind", "chunks"),
    [(*lie[1:], 3 if lie[1] is FOUR_OF_THREE else 1) for lie in LIES] + [(*lie[1:], 0) for lie in FOUND_LIES],
    ids=[lie[0] for lie in [*LIES, *FOUND_LIES]],
)
def test_a_lie_to_a_thread_that_asks_by_itself(
    script: Script, kind: type[KvClientError], chunks: int, strict: bool
) -> None:
    """The second get of a synchronous client, which takes the connection of the first in its own thread."""
    registry = CollectorRegistry()
    with (
        BulkLiar(script, first=HONEST) as liar,
        HostileServer(lookup=HELD.lookup, fetch=HELD.fetch, connect=liar.connect) as server,
        Client(
            server.address, transport="tcp", strict=strict, deadline=DEADLINE_S, registry=registry
        ) as client,
    ):  # fmt: skip
        cache = client.namespace(LAYOUT)
        assert cache.get(HELD.tokens, deadline=30.0).n == len(HELD.tokens)
        began = time.monotonic()
        if strict:
            with pytest.raises(KvClientError) as caught:
                cache.get(HELD.tokens, min_quality="lossless")
            assert type(caught.value) is kind, caught.value
        else:
            kv, tokens = cache.get(HELD.tokens, min_quality="lossless")
            assert tokens == chunks * LAYOUT.chunk_tokens
            assert bits(kv) == bits(codec.token_slice(HELD.kv, 0, tokens))
        assert time.monotonic() - began < DEADLINE_S + SLACK_S
    assert liar.requests == [Kind.GET] * 2, "over the same connection, and not asked again"
    assert server.calls.count("Fetch") == 0
    assert registry.get_sample_value("kvstore_client_failures_total", {"call": "get", "reason": kind.code.value})


def larger_than_found(accepted: socket.socket, kind: Kind, payload: bytes) -> None:
    """As when a better object takes the place of what was looked up, before it is read."""
    smaller = kv_objects.answer_of([HELD.status(at, stored_bytes=9) for at in range(3)])
    objects = b"".join(frame(Kind.OBJECT, at, blob) for at, blob in enumerate(HELD.blobs))
    accepted.sendall(frame(Kind.FOUND, 0, smaller.SerializeToString()) + objects + WELL)


async def test_an_object_that_has_become_larger_since_it_was_looked_up_is_read() -> None:
    with BulkLiar(larger_than_found) as liar, HostileServer(connect=liar.connect) as server:
        kv, tokens = await get(server.address, strict=True, registry=CollectorRegistry())
    assert tokens == len(HELD.tokens)
    assert bits(kv) == bits(HELD.kv)


@pytest.mark.parametrize("planned", [False, True], ids=["one request", "lookup and fetch"])
@pytest.mark.parametrize("lie", PLACE_LIES.values(), ids=PLACE_LIES)
async def test_a_place_that_cannot_be_makes_all_that_was_read_in_place_a_miss(lie: bytes, planned: bool) -> None:
    registry = CollectorRegistry()
    script = sends(lie, before=b"", stays=True)
    with (
        BulkLiar(script, MEMORY) as liar,
        HostileServer(lookup=HELD.lookup, fetch=HELD.fetch, connect=liar.connect) as server,
    ):
        _, tokens = await get(server.address, strict=False, registry=registry, transport="shm", planned=planned)
        with pytest.raises(ProtocolViolation):
            await get(server.address, strict=True, registry=registry, transport="shm", planned=planned)
    assert tokens == 0
    assert server.calls.count("Fetch") == 0


LARGE = Held.of(small_layout("large", layers=64, head_dim=256), 6, seed=7)  # 2 MiB each: shared among threads


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bad", [0, 2, 5])
def test_what_lies_damaged_in_memory_ends_the_prefix(bad: int, threads: int) -> None:
    blobs = [*LARGE.blobs[:bad], damaged(LARGE.blobs[bad]), *LARGE.blobs[bad + 1 :]]
    sizes = [len(blob) for blob in blobs]
    told = transfer_pb2.Places(offset=[sum(sizes[:at]) for at in range(6)], object_bytes=sizes)
    found = kv_objects.answer_of(map(LARGE.status, range(6))).SerializeToString()
    script = sends(
        frame(Kind.PLACES, 0, told.SerializeToString()) + WELL,
        before=b"",
        found=frame(Kind.FOUND, 0, found),
        stays=True,
    )
    registry = CollectorRegistry()
    with (
        BulkLiar(script, b"".join(blobs)) as liar,
        HostileServer(connect=liar.connect) as server,
        Client(server.address, transport="shm", threads=threads, deadline=20.0, registry=registry) as client,
    ):
        kv, tokens = client.namespace(LARGE.layout).get(LARGE.tokens)
    assert tokens == bad * LARGE.layout.chunk_tokens
    assert bits(kv) == bits(codec.token_slice(LARGE.kv, 0, tokens))
    reason = ObjectDamaged.code.value
    assert registry.get_sample_value("kvstore_client_failures_total", {"call": "get", "reason": reason}) == 1


def grouped(blob: bytes) -> bytes:
    """The same object by an encoder that cuts the layers into as many segments elsewhere."""
    info = codec.inspect(blob)
    payload, entries, at, layer = blob[info.header.table_end :], [], 0, 0
    layer_bytes = len(payload) // info.header.layers
    counts = [segment.layer_count for segment in info.segments]
    for count in (counts[0] + 1, counts[1] - 1, *counts[2:]):
        size = count * layer_bytes
        checksum = xxhash.xxh3_64_intdigest(payload[at : at + size])
        entries.append(struct.pack("<BBHHHQQ", 0, 3, layer, count, 0, size, checksum))
        at, layer = at + size, layer + count
    table = b"".join(entries)
    return container.header_bytes(info.header, [HEADER_BYTES + len(table) + len(payload)], table) + table + payload


def damaged_early(blob: bytes) -> bytes:
    at = codec.parse_header(blob).table_end
    return blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :]


@pytest.mark.parametrize("way", ["received", "in place", "first in place", "first received"])
@pytest.mark.parametrize("bad", [None, 0, 2, 3, 4])
def test_objects_of_another_encoder_are_read_too(way: str, bad: int | None) -> None:
    """Raw ones between those that are read in pieces or together; some come, others lie in memory. And where one is
    damaged, it is known which."""
    assert grouped(LARGE.blobs[0]) != LARGE.blobs[0]
    assert len(grouped(LARGE.blobs[0])) == len(LARGE.blobs[0])
    blobs = [grouped(blob) if at % 2 else blob for at, blob in enumerate(LARGE.blobs)]
    if bad is not None:
        blobs[bad] = damaged_early(blobs[bad])
    sizes = [len(blob) for blob in blobs]
    received = {"received": range(6), "in place": range(0), "first in place": range(3, 6), "first received": range(3)}[
        way
    ]
    answer = b""
    for at in range(6):
        if at in received:
            answer += frame(Kind.OBJECT, at, blobs[at])
        elif at - 1 in received or at == 0:
            lying = range(at, 6) if way != "first in place" else range(at, 3)
            told = transfer_pb2.Places(
                offset=[sum(sizes[:each]) for each in lying], object_bytes=[sizes[each] for each in lying]
            )
            answer += frame(Kind.PLACES, at, told.SerializeToString())
    found = kv_objects.answer_of(map(LARGE.status, range(6))).SerializeToString()
    registry = CollectorRegistry()
    with (
        BulkLiar(
            sends(answer + WELL, before=b"", found=frame(Kind.FOUND, 0, found), stays=True), b"".join(blobs)
        ) as liar,
        HostileServer(connect=liar.connect) as server,
        Client(server.address, transport="shm", deadline=20.0, registry=registry) as client,
    ):
        kv, tokens = client.namespace(LARGE.layout).get(LARGE.tokens)
    assert tokens == (6 if bad is None else bad) * LARGE.layout.chunk_tokens
    assert bits(kv) == bits(codec.token_slice(LARGE.kv, 0, tokens))
    failures = {"call": "get", "reason": ObjectDamaged.code.value}
    assert (registry.get_sample_value("kvstore_client_failures_total", failures) or 0) == (bad is not None)


def test_what_is_copied_together_ends_with_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two batches; what was copied before counts."""
    read = RawChunks.read
    batches: list[int] = []

    def slowly(chunks: RawChunks, blobs: Sequence[memoryview], refs: Sequence[codec.ChunkRef]) -> int:
        batches.append(len(blobs))
        threading.Event().wait(0.6)
        return read(chunks, blobs, refs)

    monkeypatch.setattr(RawChunks, "read", slowly)
    sizes = [len(blob) for blob in LARGE.blobs]
    told = transfer_pb2.Places(offset=[sum(sizes[:at]) for at in range(6)], object_bytes=sizes)
    found = frame(Kind.FOUND, 0, kv_objects.answer_of(map(LARGE.status, range(6))).SerializeToString())
    script = sends(frame(Kind.PLACES, 0, told.SerializeToString()) + WELL, before=b"", found=found, stays=True)
    with (
        BulkLiar(script, b"".join(LARGE.blobs)) as liar,
        HostileServer(connect=liar.connect) as server,
        Client(
            server.address, transport="shm", threads=1, deadline=DEADLINE_S, registry=CollectorRegistry()
        ) as client,
    ):  # fmt: skip
        began = time.monotonic()
        assert client.namespace(LARGE.layout).get(LARGE.tokens).n < len(LARGE.tokens)
        assert time.monotonic() - began < DEADLINE_S + 0.6 + SLACK_S
    assert len(batches) == 2
    assert max(batches) < 3, "4 MiB at most"


def hangs_up(accepted: socket.socket, kind: Kind, payload: bytes) -> None:
    return


async def test_a_path_that_breaks_before_it_brought_anything_is_left_for_grpc() -> None:
    registry = CollectorRegistry()
    with (
        BulkLiar(hangs_up) as liar,
        HostileServer(lookup=HELD.lookup, fetch=HELD.fetch, put=takes_all, connect=liar.connect) as server,
    ):
        kv, tokens = await get(server.address, strict=True, registry=registry)
        async with AsyncClient(server.address, transport="tcp", strict=True, registry=registry) as client:
            other = Held.of(LAYOUT, 2, seed=99)
            stored = await client.namespace(LAYOUT).put(other.tokens, other.kv, quality="raw")
    assert tokens == len(HELD.tokens)
    assert bits(kv) == bits(HELD.kv)
    assert stored.stored == 2
    assert liar.requests == [Kind.GET, Kind.FETCH, Kind.OFFER], "a broken connection may be an old one"
    failed = {"call": "bulk", "reason": Unavailable.code.value}
    assert registry.get_sample_value("kvstore_client_failures_total", failed) == 3


@pytest.mark.parametrize(
    "answer",
    [
        lambda request, context: transfer_pb2.ConnectResponse(),
        lambda request, context: transfer_pb2.ConnectResponse(version=VERSION, ticket=b"short", addresses=[":1"]),
        lambda request, context: transfer_pb2.ConnectResponse(
            version=VERSION, ticket=bytes(32), addresses=["", "x", ":x"]
        ),
        lambda request, context: transfer_pb2.ConnectResponse(
            version=VERSION, ticket=bytes(32), addresses=["unix:/nowhere"]
        ),
        lambda request, context: transfer_pb2.ConnectResponse(version=VERSION - 1, ticket=bytes(32), addresses=[":1"]),
        lambda request, context: b"\xff\xff",
        lambda request, context: context.abort(grpc.StatusCode.INTERNAL, "no"),
    ],
    ids=["none", "no ticket", "no addresses", "nobody there", "another version", "no message", "failure"],
)
async def test_without_a_bulk_path_there_is_grpc(answer: Callable[..., transfer_pb2.ConnectResponse]) -> None:
    with HostileServer(lookup=HELD.lookup, fetch=HELD.fetch, connect=answer) as server:
        for transport in ("tcp", "shm", "auto"):
            async with AsyncClient(
                server.address, transport=transport, strict=True, registry=CollectorRegistry()
            ) as client:  # fmt: skip
                kv, tokens = await client.namespace(LAYOUT).get(HELD.tokens)
                assert tokens == len(HELD.tokens)
                assert bits(kv) == bits(HELD.kv)


async def test_a_cancelled_get_hangs_up_and_writes_nothing_more() -> None:
    out = codec.empty(LAYOUT, len(HELD.tokens))
    hung_up = threading.Event()

    def waits(accepted: socket.socket, kind: Kind, payload: bytes) -> None:
        accepted.sendall(FOUND + FIRST)
        accepted.recv(1)
        hung_up.set()

    with BulkLiar(waits) as liar, HostileServer(lookup=HELD.lookup, connect=liar.connect) as server:
        async with AsyncClient(server.address, transport="tcp", registry=CollectorRegistry()) as client:
            getting = asyncio.ensure_future(client.namespace(LAYOUT).get(HELD.tokens, out=out, deadline=30.0))
            await asyncio.to_thread(wait_until, lambda: bool(liar.requests), "the request is there")
            getting.cancel()
            await asyncio.wait([getting])
            out[...] = 0
            assert await asyncio.to_thread(hung_up.wait, 5.0)
    assert not out.any()
