"""Every call of the node over a real socket, as it should be made and as it should not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import kv_objects as kv
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from node_process import NodeProcess
from polling import wait_until

import kvstore_codec as codec
from kvstore.errors import Code
from kvstore.service.status import STATUS_OF_CODE, code_of
from kvstore_proto.v1 import admin_pb2
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import DATA_BYTES_MAX, FramedStoreStub

LAYOUT = kv.small_layout()
WIDE = kv.small_layout("wide", layers=80, head_dim=256)  # objects over 1 MiB: several messages each
INVALID = grpc.StatusCode.INVALID_ARGUMENT
BAD_HASH = b"\x01" * 31


def status_of(call: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    error: Any = raised.value
    assert "\n" not in error.details()
    status: grpc.StatusCode = error.code()
    return status


def nothing_staged(stub: FramedStoreStub) -> bool:
    stat = kv.stat(stub)
    return stat.staged_bytes == 0 and stat.staged_objects == 0


# What a well-behaved client does


@pytest.mark.parametrize("durable", [False, True])
def test_put_lookup_fetch(node: NodeProcess, durable: bool) -> None:
    chunks = kv.chunks(LAYOUT, 5, seed=1)
    results = kv.put(node.store, LAYOUT, chunks, durable=durable)
    assert [result.outcome for result in results] == [pb.OUTCOME_STORED] * 5
    if durable:
        assert all(result.durable for result in results)

    hashes = [chunk.hash for chunk in chunks]
    found = kv.lookup(node.store, LAYOUT, [*hashes, bytes(32)])
    assert [(chunk.tokens, chunk.stored_bytes, chunk.quality) for chunk in found] == [
        (16, len(chunk.blob), codec.Quality.RAW) for chunk in chunks
    ]
    assert kv.fetch(node.store, LAYOUT, hashes) == [chunk.blob for chunk in chunks]


def test_objects_of_many_messages(node: NodeProcess) -> None:
    chunks = kv.chunks(WIDE, 3, seed=2)
    assert len(chunks[0].blob) > 2 * DATA_BYTES_MAX
    kv.put(node.store, WIDE, chunks)
    assert kv.fetch(node.store, WIDE, [chunk.hash for chunk in chunks]) == [chunk.blob for chunk in chunks]


def test_a_stream_begins_with_small_pieces(node: NodeProcess) -> None:
    chunks = kv.chunks(WIDE, 2, seed=7)
    kv.put(node.store, WIDE, chunks)
    request = pb.FetchRequest(
        namespace_id=WIDE.namespace_id, chunk_hashes=b"".join(chunk.hash for chunk in chunks), part=0
    )
    pieces: list[list[int]] = [[], []]
    for message in node.store.Fetch(request):
        pieces[message.head.chunk_index].append(len(message.data))
    assert pieces[0][:5] == [1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20]
    assert pieces[1][:2] == [DATA_BYTES_MAX] * 2
    assert [sum(each) for each in pieces] == [len(chunk.blob) for chunk in chunks]


def test_a_second_put_sends_nothing(node: NodeProcess) -> None:
    chunks = kv.chunks(LAYOUT, 3, seed=3)
    kv.put(node.store, LAYOUT, chunks)
    stream = kv.PutStream(node.store)
    assert stream.offer(LAYOUT, chunks) == [pb.VERDICT_HAVE] * 3
    assert [result.outcome for result in stream.results()] == [pb.OUTCOME_HAVE] * 3


def test_fetch_at_a_quality_is_a_prefix_of_the_object(node: NodeProcess) -> None:
    chunks = kv.chunks(LAYOUT, 2, seed=4, quality="high")
    kv.put(node.store, LAYOUT, chunks)
    hashes = [chunk.hash for chunk in chunks]
    for quality in ("high", "medium", "low"):
        wanted = [bytes(codec.truncate(chunk.blob, quality)) for chunk in chunks]
        assert kv.fetch(node.store, LAYOUT, hashes, quality=codec.Quality.parse(quality)) == wanted
    assert len(wanted[0]) < len(chunks[0].blob)
    assert kv.fetch(node.store, LAYOUT, hashes) == [chunk.blob for chunk in chunks]


def test_lookup_and_fetch_end_at_the_first_gap(node: NodeProcess) -> None:
    chunks = kv.chunks(LAYOUT, 4, seed=5)
    kv.put(node.store, LAYOUT, chunks)
    hashes = [chunk.hash for chunk in chunks]
    gap = [*hashes[:2], bytes(32), *hashes[2:]]
    assert len(kv.lookup(node.store, LAYOUT, gap)) == 2
    assert kv.fetch(node.store, LAYOUT, gap) == [chunk.blob for chunk in chunks[:2]]
    assert kv.lookup(node.store, LAYOUT, []) == []
    assert kv.fetch(node.store, LAYOUT, []) == []


def test_a_lease_is_capped_and_shown(start_node: Callable[..., NodeProcess]) -> None:
    node = start_node("--lease-ms-max", "5000")
    chunks = kv.chunks(LAYOUT, 2, seed=6)
    kv.put(node.store, LAYOUT, chunks)
    request = pb.LookupRequest(namespace_id=LAYOUT.namespace_id, chunk_hashes=chunks[0].hash, lease_ms=2**32 - 1)
    answer = node.store.Lookup(request, timeout=kv.DEADLINE_S)
    assert answer.lease_id
    assert answer.lease_ms == 5000
    assert kv.stat(node.store).leases == 1
    leased = {entry.chunk_hash: entry.leased for entry in listed(node.store)}
    assert leased == {chunks[0].hash: True, chunks[1].hash: False}
    evicted = node.admin.Evict(admin_pb2.EvictRequest(), timeout=kv.DEADLINE_S)
    assert evicted.objects == 1, "a leased object stays"


def test_delete(node: NodeProcess) -> None:
    chunks = kv.chunks(LAYOUT, 4, seed=7)
    kv.put(node.store, LAYOUT, chunks, durable=True)
    request = pb.DeleteRequest(namespace_id=LAYOUT.namespace_id, chunk_hashes=chunks[3].hash)
    deleted = node.store.Delete(request, timeout=kv.DEADLINE_S)
    assert (deleted.objects, deleted.bytes >= len(chunks[3].blob)) == (1, True)
    assert len(kv.lookup(node.store, LAYOUT, [chunk.hash for chunk in chunks])) == 3
    whole = node.store.Delete(pb.DeleteRequest(namespace_id=LAYOUT.namespace_id), timeout=kv.DEADLINE_S)
    assert whole.objects == 3
    assert kv.stat(node.store).objects == 0


def listed(stub: FramedStoreStub, **request: Any) -> list[pb.ObjectEntry]:
    entries: list[pb.ObjectEntry] = []
    query = pb.ListRequest(**request)
    while True:
        page = stub.List(query, timeout=kv.DEADLINE_S)
        assert not query.limit or len(page.objects) <= query.limit
        entries += page.objects
        if not page.next_page_token:
            return entries
        query.page_token = page.next_page_token


def test_list_pages_through_everything_once(node: NodeProcess) -> None:
    chunks = kv.chunks(LAYOUT, 7, seed=8)
    other = kv.chunks(WIDE, 1, seed=8)
    kv.put(node.store, LAYOUT, chunks)
    kv.put(node.store, WIDE, other)
    everything = listed(node.store, limit=3)
    assert sorted(entry.chunk_hash for entry in everything) == sorted(c.hash for c in [*chunks, *other])
    one = listed(node.store, namespace_id=LAYOUT.namespace_id, hash_prefix=chunks[2].hash[:4])
    assert [entry.chunk_hash for entry in one] == [chunks[2].hash]
    assert (one[0].model, one[0].revision, one[0].tokens) == ("test-model", "r1", 16)
    assert (one[0].parent_hash, one[0].first_position) == (chunks[1].hash, 32)
    assert one[0].stored_bytes == len(chunks[2].blob)


def test_verify_and_stat(node: NodeProcess) -> None:
    chunks = kv.chunks(LAYOUT, 6, seed=9)
    kv.put(node.store, LAYOUT, chunks, durable=True)
    last = pb.VerifyResponse()
    for last in node.store.Verify(pb.VerifyRequest(), timeout=kv.DEADLINE_S):
        assert not last.damaged_hash
    assert (last.checked, last.total) == (6, 6)
    stat = kv.stat(node.store)
    tiers = {tier.tier: tier for tier in stat.tiers}
    assert stat.objects == tiers[pb.TIER_HOST].objects == tiers[pb.TIER_DISK].objects == 6
    assert tiers[pb.TIER_HOST].capacity_bytes == 64 << 20
    assert tiers[pb.TIER_HOST].used_bytes >= sum(len(chunk.blob) for chunk in chunks)
    assert stat.namespaces == 1
    assert stat.version


def test_evict_from_one_tier_keeps_the_other(node: NodeProcess) -> None:
    chunks = kv.chunks(LAYOUT, 3, seed=10)
    kv.put(node.store, LAYOUT, chunks, durable=True)
    evicted = node.admin.Evict(admin_pb2.EvictRequest(tier="host"), timeout=kv.DEADLINE_S)
    assert evicted.objects == 3
    found = kv.lookup(node.store, LAYOUT, [chunk.hash for chunk in chunks])
    assert [chunk.tier for chunk in found] == [pb.TIER_DISK] * 3
    assert kv.fetch(node.store, LAYOUT, [chunk.hash for chunk in chunks]) == [c.blob for c in chunks]
    request = admin_pb2.EvictRequest(chunk_hashes=chunks[2].hash)
    assert node.admin.Evict(request, timeout=kv.DEADLINE_S).objects >= 1
    assert len(kv.lookup(node.store, LAYOUT, [chunk.hash for chunk in chunks])) == 2


def test_health_and_reflection(node: NodeProcess) -> None:
    health = health_pb2_grpc.HealthStub(node.channel)
    for service in ("", "kvstore.v1.Store", "kvstore.v1.Admin"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=kv.DEADLINE_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(node.channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    answers = list(reflection.ServerReflectionInfo(asked, timeout=kv.DEADLINE_S))
    names = {service.name for service in answers[0].list_services_response.service}
    assert {"kvstore.v1.Store", "kvstore.v1.Admin", "grpc.health.v1.Health"} <= names


# What a careless, broken or hostile client does


def hostile_requests() -> Iterator[tuple[str, Callable[[FramedStoreStub], Any]]]:
    namespace = LAYOUT.namespace_id
    too_many = bytes(32 * 4097)

    def unary(method: str, request: Any) -> Callable[[FramedStoreStub], Any]:
        return lambda stub: getattr(stub, method)(request, timeout=kv.DEADLINE_S)

    def stream(method: str, request: Any) -> Callable[[FramedStoreStub], Any]:
        return lambda stub: list(getattr(stub, method)(request, timeout=kv.DEADLINE_S))

    yield "lookup without namespace", unary("Lookup", pb.LookupRequest(chunk_hashes=bytes(32)))
    yield "lookup of a short hash", unary("Lookup", pb.LookupRequest(namespace_id=namespace, chunk_hashes=BAD_HASH))
    yield "lookup of 4097", unary("Lookup", pb.LookupRequest(namespace_id=namespace, chunk_hashes=too_many))
    yield "lookup of part 2**32-1", unary("Lookup", pb.LookupRequest(namespace_id=namespace, part=2**32 - 1))
    yield "fetch without namespace", stream("Fetch", pb.FetchRequest(chunk_hashes=bytes(32)))
    yield "fetch of a short hash", stream("Fetch", pb.FetchRequest(namespace_id=namespace, chunk_hashes=BAD_HASH))
    yield "fetch of 4097", stream("Fetch", pb.FetchRequest(namespace_id=namespace, chunk_hashes=too_many))
    yield "fetch at quality 5", stream("Fetch", pb.FetchRequest(namespace_id=namespace, quality=5))
    yield "fetch with a long lease", stream("Fetch", pb.FetchRequest(namespace_id=namespace, lease_id=bytes(65)))
    yield "delete of everything", unary("Delete", pb.DeleteRequest())
    yield "delete of a short hash", unary("Delete", pb.DeleteRequest(namespace_id=namespace, chunk_hashes=BAD_HASH))
    yield "list of a short namespace", unary("List", pb.ListRequest(namespace_id=BAD_HASH))
    yield "list of a long prefix", unary("List", pb.ListRequest(hash_prefix=bytes(33)))
    yield "list with a forged token", unary("List", pb.ListRequest(page_token="\x00forged"))
    yield "list with a long token", unary("List", pb.ListRequest(page_token="a" * 300))
    yield "verify of a short namespace", stream("Verify", pb.VerifyRequest(namespace_id=BAD_HASH))
    yield "verify of a short hash", stream("Verify", pb.VerifyRequest(chunk_hashes=BAD_HASH))


@pytest.fixture(scope="module")
def quiet_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node shared by the tests whose requests must leave nothing behind."""
    folder = tmp_path_factory.mktemp("quiet")
    node = NodeProcess(folder, "--host-capacity", "64MiB", "--staged-bytes-max", "16MiB", "--object-bytes-max", "8MiB")
    try:
        yield node
    finally:
        node.kill()


@pytest.mark.parametrize(("what", "request_"), [pytest.param(*case, id=case[0]) for case in hostile_requests()])
def test_a_malformed_request_is_refused_in_one_line(
    quiet_node: NodeProcess, what: str, request_: Callable[[FramedStoreStub], Any]
) -> None:
    assert status_of(lambda: request_(quiet_node.store)) is INVALID


def test_an_unknown_tier_is_refused(quiet_node: NodeProcess) -> None:
    request = admin_pb2.EvictRequest(tier="tape")
    assert status_of(lambda: quiet_node.admin.Evict(request, timeout=kv.DEADLINE_S)) is INVALID


def hostile_offers() -> Iterator[tuple[str, pb.PutRequest]]:
    chunk = kv.chunks(LAYOUT, 1, seed=20)[0]

    def changed(**fields: Any) -> pb.PutRequest:
        offer = kv.put_offer(LAYOUT, [chunk.offer()])
        for name, value in fields.items():
            setattr(offer.offer, name, value)
        return offer

    def of_object(**fields: Any) -> pb.PutRequest:
        offered = chunk.offer()
        for name, value in fields.items():
            setattr(offered, name, value)
        return kv.put_offer(LAYOUT, [offered])

    yield "data before the offer", pb.PutRequest(object_index=0)
    yield "commit before the offer", pb.PutRequest(commit=pb.PutCommit())
    yield "empty offer", kv.put_offer(LAYOUT, [])
    yield "2049 objects", kv.put_offer(LAYOUT, [chunk.offer()] * 2049)
    yield "one chunk twice", kv.put_offer(LAYOUT, [chunk.offer()] * 2)
    yield "no layout", changed(layout=b"")
    yield "garbage for a layout", changed(layout=b"\xff" * 100)
    yield "layout of 1 MiB and a byte", changed(layout=bytes((1 << 20) + 1))
    yield "foreign layout", changed(layout=WIDE.canonical_bytes)
    yield "foreign namespace", changed(namespace_id=WIDE.namespace_id)
    yield "short namespace", changed(namespace_id=BAD_HASH)
    yield "part beyond the layout", changed(part=1)
    yield "durability 7", changed(durability=7)
    yield "short hash", of_object(chunk_hash=BAD_HASH)
    yield "short parent", of_object(parent_hash=BAD_HASH)
    yield "no bytes", of_object(object_bytes=0)
    yield "2**64-1 bytes", of_object(object_bytes=2**64 - 1)
    yield "quality 9", of_object(quality=9)


@pytest.mark.parametrize(("what", "offer"), [pytest.param(*case, id=case[0]) for case in hostile_offers()])
def test_a_malformed_offer_is_refused_in_one_line(quiet_node: NodeProcess, what: str, offer: pb.PutRequest) -> None:
    stream = kv.PutStream(quiet_node.store)
    stream.send(offer)
    assert status_of(stream.receive) is INVALID
    assert nothing_staged(quiet_node.store)


def hostile_streams() -> Iterator[tuple[str, Callable[[kv.PutStream, bytes], None]]]:
    def gap(stream: kv.PutStream, blob: bytes) -> None:
        stream.piece(0, 0, blob[:100])
        stream.piece(0, 101, blob[101:])

    def overlap(stream: kv.PutStream, blob: bytes) -> None:
        stream.piece(0, 0, blob[:100])
        stream.piece(0, 50, blob[50:])

    def overlong(stream: kv.PutStream, blob: bytes) -> None:
        stream.piece(0, 0, blob)
        stream.piece(0, len(blob), b"x")

    def unknown_object(stream: kv.PutStream, blob: bytes) -> None:
        stream.piece(1, 0, blob)

    def empty_piece(stream: kv.PutStream, blob: bytes) -> None:
        stream.piece(0, 0, b"")

    def fat_piece(stream: kv.PutStream, blob: bytes) -> None:
        stream.piece(0, 0, bytes(DATA_BYTES_MAX + 1))

    def second_offer(stream: kv.PutStream, blob: bytes) -> None:
        stream.send(kv.put_offer(LAYOUT, [kv.chunks(LAYOUT, 1, seed=22)[0].offer()]))

    def data_in_commit(stream: kv.PutStream, blob: bytes) -> None:
        stream.send(pb.PutRequest(commit=pb.PutCommit()), b"x")

    def ends_early(stream: kv.PutStream, blob: bytes) -> None:
        stream.piece(0, 0, blob[:100])
        stream.end()

    for function in (
        gap, overlap, overlong, unknown_object, empty_piece, fat_piece, second_offer, data_in_commit, ends_early,
    ):  # fmt: skip
        yield function.__name__, function


@pytest.mark.parametrize(("what", "misuse"), [pytest.param(*case, id=case[0]) for case in hostile_streams()])
def test_a_put_out_of_place_leaves_nothing(
    quiet_node: NodeProcess, what: str, misuse: Callable[[kv.PutStream, bytes], None]
) -> None:
    chunk = kv.chunks(LAYOUT, 1, seed=21)[0]
    stream = kv.PutStream(quiet_node.store)
    assert stream.offer(LAYOUT, [chunk]) == [pb.VERDICT_SEND]
    misuse(stream, chunk.blob)
    assert status_of(stream.receive) is INVALID
    assert nothing_staged(quiet_node.store)
    assert kv.lookup(quiet_node.store, LAYOUT, [chunk.hash]) == []


def damaged(chunk: kv.StoredChunk) -> bytes:
    return chunk.blob[:-1] + bytes([chunk.blob[-1] ^ 1])


def test_bad_objects_are_rejected_and_good_ones_kept(quiet_node: NodeProcess) -> None:
    chunks = kv.chunks(LAYOUT, 4, seed=23)
    foreign = kv.chunks(LAYOUT, 1, seed=24)[0]
    stream = kv.PutStream(quiet_node.store)
    assert stream.offer(LAYOUT, chunks) == [pb.VERDICT_SEND] * 4
    stream.whole(0, chunks[0].blob)
    stream.whole(1, damaged(chunks[1]))
    stream.whole(2, foreign.blob)
    stream.piece(3, 0, chunks[3].blob[:-1])
    results = stream.results()
    assert [result.outcome for result in results] == [pb.OUTCOME_STORED] + [pb.OUTCOME_REJECTED] * 3
    assert all(result.reason and "\n" not in result.reason for result in results[1:])
    for index, chunk in enumerate(chunks):
        assert len(kv.lookup(quiet_node.store, LAYOUT, [chunk.hash])) == (1 if index == 0 else 0)
    assert nothing_staged(quiet_node.store)


def test_what_has_no_room_is_refused_before_it_is_sent(quiet_node: NodeProcess) -> None:
    chunk = kv.chunks(LAYOUT, 1, seed=25)[0]
    offered = chunk.offer()
    offered.object_bytes = 9 << 20  # over --object-bytes-max
    stream = kv.PutStream(quiet_node.store)
    stream.send(kv.put_offer(LAYOUT, [offered]))
    assert list(stream.receive().verdicts.verdicts) == [pb.VERDICT_REFUSED]
    assert nothing_staged(quiet_node.store)
    stream.cancel()


def test_puts_in_flight_are_bounded(quiet_node: NodeProcess) -> None:
    offers = [chunk.offer() for chunk in kv.chunks(WIDE, 3, seed=26)]
    for offer in offers:
        offer.object_bytes = 7 << 20
    stream = kv.PutStream(quiet_node.store)
    stream.send(kv.put_offer(WIDE, offers))
    verdicts = list(stream.receive().verdicts.verdicts)
    assert verdicts == [pb.VERDICT_SEND, pb.VERDICT_SEND, pb.VERDICT_REFUSED]
    assert kv.stat(quiet_node.store).staged_bytes <= 16 << 20
    stream.cancel()
    wait_until(lambda: nothing_staged(quiet_node.store), "staged bytes come back after a cancel")


def test_a_cancelled_put_leaves_nothing(quiet_node: NodeProcess) -> None:
    chunks = kv.chunks(WIDE, 1, seed=27)
    stream = kv.PutStream(quiet_node.store)
    assert stream.offer(WIDE, chunks) == [pb.VERDICT_SEND]
    stream.piece(0, 0, chunks[0].blob[:DATA_BYTES_MAX])
    assert not nothing_staged(quiet_node.store)
    stream.cancel()
    wait_until(lambda: nothing_staged(quiet_node.store), "staged bytes come back after a cancel")
    assert kv.lookup(quiet_node.store, WIDE, [chunks[0].hash]) == []


def test_a_put_past_its_deadline_leaves_nothing(quiet_node: NodeProcess) -> None:
    chunks = kv.chunks(LAYOUT, 1, seed=28)
    stream = kv.PutStream(quiet_node.store, timeout=0.5)
    assert stream.offer(LAYOUT, chunks) == [pb.VERDICT_SEND]
    assert status_of(stream.receive) is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: nothing_staged(quiet_node.store), "staged bytes come back after the deadline")


def test_a_stalled_put_is_aborted(start_node: Callable[..., NodeProcess]) -> None:
    node = start_node("--stream-idle-s", "0.3")
    chunks = kv.chunks(LAYOUT, 1, seed=29)
    stream = kv.PutStream(node.store)
    assert stream.offer(LAYOUT, chunks) == [pb.VERDICT_SEND]
    with pytest.raises(grpc.RpcError) as raised:
        stream.receive()
    error: Any = raised.value
    assert code_of(error.code(), error.trailing_metadata()) is Code.STREAM_STALLED
    assert nothing_staged(node.store)


def test_a_reader_that_stops_reading_is_dropped(start_node: Callable[..., NodeProcess]) -> None:
    node = start_node("--stream-idle-s", "0.3", "--metrics-listen", "127.0.0.1:0")
    chunks = kv.chunks(WIDE, 8, seed=30)  # more than the transport buffers on its own
    kv.put(node.store, WIDE, chunks)
    request = pb.FetchRequest(namespace_id=WIDE.namespace_id, chunk_hashes=b"".join(chunk.hash for chunk in chunks))
    stream = node.store.Fetch(request, timeout=kv.DEADLINE_S)
    next(stream)
    dropped = 'kvstore_rpc_seconds_count{method="Fetch",status="ABORTED"} 1.0'
    wait_until(lambda: dropped in node.metrics(), "the node gives up on the reader")
    assert status_of(lambda: list(stream)) is grpc.StatusCode.ABORTED


def test_a_message_over_the_limit_is_refused(quiet_node: NodeProcess) -> None:
    with grpc.insecure_channel(quiet_node.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        request = pb.LookupRequest(namespace_id=LAYOUT.namespace_id, chunk_hashes=bytes(8 << 20))
        call = FramedStoreStub(channel).Lookup
        assert status_of(lambda: call(request, timeout=kv.DEADLINE_S)) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_garbage_bytes_are_an_error_and_the_node_lives(quiet_node: NodeProcess) -> None:
    raw = quiet_node.channel.stream_stream("/kvstore.v1.Store/Put", bytes, bytes)
    for seed in range(20):
        garbage = os.urandom(1 + seed * 50)
        with pytest.raises(grpc.RpcError):
            list(raw(iter([garbage]), timeout=kv.DEADLINE_S))
    assert kv.stat(quiet_node.store).version
    assert nothing_staged(quiet_node.store)


def test_a_peer_with_plain_protobuf_interoperates(node: NodeProcess) -> None:
    from kvstore_proto.v1.store_pb2_grpc import StoreStub

    chunks = kv.chunks(LAYOUT, 1, seed=31)
    kv.put(node.store, LAYOUT, chunks)
    request = pb.FetchRequest(namespace_id=LAYOUT.namespace_id, chunk_hashes=chunks[0].hash)
    stub = StoreStub(node.channel)  # type: ignore[no-untyped-call]
    pieces = list(stub.Fetch(request, timeout=kv.DEADLINE_S))
    assert [(piece.object_bytes, piece.data) for piece in pieces] == [(len(chunks[0].blob), chunks[0].blob)]


@pytest.mark.parametrize("code", list(Code))
def test_every_error_code_survives_the_wire_both_ways(code: Code) -> None:
    status = STATUS_OF_CODE[code]
    assert code_of(status, (("kvstore-code", code.value),)) is code
    assert code_of(grpc.StatusCode.OK, (("kvstore-code", code.value),)) is None


def test_codes_of_later_versions_are_no_code() -> None:
    assert code_of(grpc.StatusCode.INTERNAL, (("kvstore-code", "of the future"),)) is None
    assert code_of(grpc.StatusCode.UNAVAILABLE, ()) is None
