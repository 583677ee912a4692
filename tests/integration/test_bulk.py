"""The bulk path of a real node process: the same values by every way, tickets, what is held for whom and how long."""

from __future__ import annotations

import asyncio
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_objects import small_layout
from kv_strategies import bits, random_kv
from node_process import KVSTORE, NodeProcess
from polling import wait_until
from prometheus_client import CollectorRegistry

import kvstore_codec as codec
from kvstore_client import AsyncClient, Client, InvalidArgument
from kvstore_client.client import _loop
from kvstore_client.fetching import decode_object
from kvstore_client.transports.bulk_path import Transport
from kvstore_proto.v1 import admin_pb2, store_pb2, transfer_pb2
from kvstore_proto.v1.bulk import HEADER_BYTES, VERSION, Kind, frame, hello, parse_header
from kvstore_proto.v1.bulk_socket import BulkSocket, ConnectionEnded
from kvstore_proto.v1.transfer_pb2_grpc import TransferStub

LAYOUT = small_layout("bulk", layers=8, head_dim=64)  # 64 KiB a chunk
CHUNKS = 24
TOKENS = list(range(CHUNKS * LAYOUT.chunk_tokens))
KV = random_kv(LAYOUT, len(TOKENS), 3)
WAITING = "kvstore_host_waiting_bytes"
METHODS = {"grpc": "Fetch", "tcp": "BulkGet", "unix": "BulkGet", "shm": "BulkGet"}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """One for all tests that leave it as it was."""
    folder = tmp_path_factory.mktemp("bulk")
    node = NodeProcess(
        folder, "--host-capacity", "4MiB", "--disk-path", str(folder / "disk"), "--disk-capacity", "256MiB",
        "--metrics-listen", "127.0.0.1:0", "--lease-ms-max", "1500",
    )  # fmt: skip
    yield node
    node.kill()


@pytest.fixture(autouse=True)
def nothing_stored(node: NodeProcess) -> Iterator[None]:
    yield
    with Client(node.address, strict=True, deadline=20.0, transport="grpc", registry=CollectorRegistry()) as client:
        client.namespace(LAYOUT).delete()


def calls(node: NodeProcess, method: str, status: str = "OK") -> int:
    found = re.search(rf'kvstore_rpc_seconds_count{{method="{method}",status="{status}"}} (\d+)', node.metrics())
    return int(found.group(1)) if found else 0


def gauge(node: NodeProcess, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)", node.metrics(), re.MULTILINE)
    assert found is not None, name
    return float(found.group(1))


def connect(node: NodeProcess, *, local: bool = False) -> socket.socket:
    """A connection that nobody has said hello on."""
    answer = ticket_of(node)
    address = next(each for each in answer.addresses if each.startswith("unix-abstract:") == local)
    if local:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect("\0" + address.removeprefix("unix-abstract:"))
        return connection
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def ticket_of(node: NodeProcess) -> transfer_pb2.ConnectResponse:
    stub = TransferStub(node.channel)  # type: ignore[no-untyped-call]
    answer: transfer_pb2.ConnectResponse = stub.Connect(transfer_pb2.ConnectRequest(version=VERSION), timeout=10)
    return answer


@contextmanager
def let_in(node: NodeProcess, *, local: bool = False) -> Iterator[BulkSocket]:
    with closing(BulkSocket(connect(node, local=local), 10.0)) as connection:
        connection.send_bytes(hello(ticket_of(node).ticket))
        connection.receive(Kind.WELCOME)
        yield connection
        connection.shutdown()


def fetch_request(*, places: bool, hold_ms: int = 60_000) -> bytes:
    refs = codec.chunk_refs(LAYOUT, TOKENS)
    request = store_pb2.FetchRequest(
        namespace_id=LAYOUT.namespace_id, chunk_hashes=b"".join(ref.hash for ref in refs)
    )  # fmt: skip
    return transfer_pb2.BulkFetch(request=request, places=places, hold_ms=hold_ms).SerializeToString()


@pytest.mark.parametrize("transport", ["grpc", "tcp", "unix", "shm"])
@pytest.mark.parametrize("quality", ["raw", "high"])
def test_every_way_brings_the_same_values(node: NodeProcess, transport: Transport, quality: str) -> None:
    """Memory is smaller than the prompt, so that some objects come from disk."""
    registry = CollectorRegistry()
    before = calls(node, METHODS[transport]), calls(node, "BulkPut")
    with (
        Client(node.address, strict=True, deadline=20.0, transport=transport, registry=registry) as client,
        Client(node.address, strict=True, deadline=20.0, transport="grpc", registry=registry) as plain,
    ):
        cache, reference = client.namespace(LAYOUT), plain.namespace(LAYOUT)
        stored = cache.put(TOKENS, KV, quality=quality)
        assert (stored.stored, stored.rejected) == (CHUNKS, 0)
        got, tokens = cache.get(TOKENS)
        expected, _ = reference.get(TOKENS)
        again = cache.put(TOKENS, KV, quality=quality)
        low, _ = cache.get(TOKENS, quality="low") if quality == "high" else (None, 0)
        low_expected, _ = reference.get(TOKENS, quality="low") if quality == "high" else (None, 0)
    assert tokens == len(TOKENS)
    assert bits(got) == bits(expected)
    assert again.have == CHUNKS
    if quality == "raw":
        assert bits(got) == bits(KV)
    else:
        assert bits(low) == bits(low_expected) != bits(got)
    assert calls(node, METHODS[transport]) > before[0]
    if transport != "grpc":
        assert calls(node, "BulkPut") == before[1] + 1
    failures = [sample for metric in registry.collect() for sample in metric.samples if "failures" in sample.name]
    assert not [sample for sample in failures if sample.value and sample.name.endswith("_total")]


async def test_the_best_way_is_found_in_the_background(node: NodeProcess) -> None:
    async with AsyncClient(
        node.address, strict=True, deadline=20.0, transport="auto", registry=CollectorRegistry()
    ) as client:
        cache, before, puts = client.namespace(LAYOUT), calls(node, "BulkGet"), calls(node, "Put")
        await cache.put(TOKENS[:64], codec.token_slice(KV, 0, 64), quality="raw")
        wait_until(lambda: calls(node, "Put") == puts + 1, "the first call does not wait for it")
        for _ in range(1000):
            kv, tokens = await cache.get(TOKENS[:64])
            assert tokens == 64
            assert bits(kv) == bits(codec.token_slice(KV, 0, 64))
            if calls(node, "BulkGet") > before:
                break
            await asyncio.sleep(0.01)
        assert calls(node, "BulkMap") >= 1, "on one machine it is shared memory"


def test_a_node_without_a_bulk_path_is_used_over_grpc(start_node: Callable[..., NodeProcess]) -> None:
    node = start_node("--bulk-listen", "none", "--metrics-listen", "127.0.0.1:0")
    with Client(node.address, strict=True, transport="shm", registry=CollectorRegistry()) as client:
        cache = client.namespace(LAYOUT)
        cache.put(TOKENS[:32], codec.token_slice(KV, 0, 32), quality="raw")
        assert cache.get(TOKENS[:32])[1] == 32
    wait_until(lambda: calls(node, "Fetch") == calls(node, "Put") == 1, "both went over gRPC")


def test_a_bulk_path_where_it_was_asked_for(start_node: Callable[..., NodeProcess], tmp_path: Path) -> None:
    path = tmp_path / "bulk.sock"
    node = start_node("--bulk-listen", f"unix:{path}", "--metrics-listen", "127.0.0.1:0")
    assert list(ticket_of(node).addresses) == [f"unix:{path}"]
    with Client(node.address, strict=True, transport="unix", registry=CollectorRegistry()) as client:
        client.namespace(LAYOUT).put(TOKENS[:32], codec.token_slice(KV, 0, 32), quality="raw")
    assert calls(node, "BulkPut") == 1
    assert node.stop() == 0
    assert not path.exists()


def test_beside_a_unix_socket_there_is_another(start_node: Callable[..., NodeProcess], tmp_path: Path) -> None:
    node = start_node(listen=f"unix:{tmp_path / 'node.sock'}")
    assert f"unix:{tmp_path / 'node.sock'}.bulk" in ticket_of(node).addresses


def test_an_address_that_is_taken_is_refused_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [KVSTORE, "serve", "--listen", "127.0.0.1:0", "--bulk-listen", f"127.0.0.1:{port}"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("kvstore:")]
    assert "pass another --bulk-listen" in line


def test_an_unknown_transport_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="shm"):
        Client("127.0.0.1:1", transport="carrier-pigeon")  # type: ignore[arg-type]


def test_a_node_that_is_killed_is_found_again(start_node: Callable[..., NodeProcess], tmp_path: Path) -> None:
    flags = ("--disk-path", str(tmp_path / "disk"), "--metrics-listen", "127.0.0.1:0")
    node = start_node(*flags)
    with Client(node.address, deadline=2.0, transport="shm", registry=CollectorRegistry()) as client:
        cache = client.namespace(LAYOUT)
        assert cache.put(TOKENS, KV, quality="raw", durable=True, deadline=20.0).durable
        assert cache.get(TOKENS)[1] == len(TOKENS)
        node.kill()
        assert cache.get(TOKENS)[1] == 0
        node = start_node(*flags, listen=node.address)
        wait_until(lambda: cache.get(TOKENS)[1] == len(TOKENS), "the node is found again")
        kv, tokens = cache.get(TOKENS)
        assert tokens == len(TOKENS)
        assert bits(kv) == bits(KV)
        wait_until(
            lambda: cache.get(TOKENS[:16])[1] == 16 and calls(node, "BulkGet") >= 1,
            "its bulk path is found again, some seconds after it was looked for in vain",
            deadline_s=30.0,
        )


@pytest.mark.parametrize(
    "opening",
    [b"", b"GET / HTTP/1.1\r\n\r\n" + bytes(64), hello(bytes(32)), os.urandom(200), hello(bytes(32))[:20]],
    ids=["nothing", "http", "no ticket", "noise", "half"],
)
def test_who_has_no_ticket_is_not_let_in(node: NodeProcess, opening: bytes) -> None:
    with connect(node) as connection:
        connection.sendall(opening)
        with suppress(ConnectionResetError):  # what it had not read was lost
            assert connection.recv(1) == b"", "closed without a word, at once or when the time for a hello is over"
    assert node.process.poll() is None


def test_a_ticket_opens_one_connection(node: NodeProcess) -> None:
    ticket = ticket_of(node).ticket
    with connect(node) as first, connect(node) as second:
        first.sendall(hello(ticket))
        assert parse_header(first.recv(HEADER_BYTES, socket.MSG_WAITALL)).kind is Kind.WELCOME
        second.sendall(hello(ticket))
        assert second.recv(1) == b""
    assert gauge(node, 'kvstore_bulk_refused_total{reason="ticket"}') >= 1


def test_memory_is_shared_over_unix_sockets_only(node: NodeProcess) -> None:
    with let_in(node) as connection:
        connection.send(Kind.MAP, 0)
        ended = transfer_pb2.Ended.FromString(connection.payload(connection.receive(Kind.END)))
        assert ended.code == "invalid_request"
        assert "unix" in ended.details
        with pytest.raises(ConnectionEnded):
            connection.receive(Kind.MAPPED)


def test_shared_memory_is_for_reading(node: NodeProcess) -> None:
    with let_in(node, local=True) as connection:
        connection.send(Kind.MAP, 0)
        payload, descriptor = connection.receive_descriptor(Kind.MAPPED)
    try:
        size = transfer_pb2.SharedMemory.FromString(payload).bytes
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(descriptor, b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        assert os.fstat(descriptor).st_mode & 0o222 == 0, "nobody opens it for more by mistake"
    finally:
        os.close(descriptor)


# A get: lookup and objects in one request


def get_request(*, places: bool, min_quality: str = "low", quality: str = "raw", lease_ms: int = 60_000) -> bytes:
    refs = codec.chunk_refs(LAYOUT, TOKENS)
    lookup = store_pb2.LookupRequest(
        namespace_id=LAYOUT.namespace_id, chunk_hashes=b"".join(ref.hash for ref in refs), lease_ms=lease_ms
    )
    return transfer_pb2.BulkGet(
        lookup=lookup, quality=codec.Quality.parse(quality), min_quality=codec.Quality.parse(min_quality),
        places=places, hold_ms=60_000,
    ).SerializeToString()  # fmt: skip


def frames(connection: BulkSocket) -> list[tuple[Kind, int, bytes]]:
    """Of one answer, up to its END."""
    came: list[tuple[Kind, int, bytes]] = []
    while not came or came[-1][0] is not Kind.END:
        found = connection.receive(Kind.FOUND, Kind.OBJECT, Kind.PLACES, Kind.END)
        came.append((found.kind, found.index, connection.payload(found)))
    return came


def put_some(node: NodeProcess, tokens: int, quality: str = "raw") -> None:
    with Client(node.address, strict=True, deadline=20.0, registry=CollectorRegistry()) as client:
        kv = codec.token_slice(KV, 0, tokens)
        client.namespace(LAYOUT).put(TOKENS[:tokens], kv, quality=quality, durable=True)


def test_a_get_answers_what_there_is_and_brings_it(node: NodeProcess) -> None:
    put_some(node, 64)
    for evict in (False, True):
        if evict:
            node.admin.Evict(admin_pb2.EvictRequest(tier="host"), timeout=10)
        with let_in(node) as connection:
            connection.send(Kind.GET, 0, get_request(places=False))
            (kind, _, payload), *objects, (_, _, ended) = frames(connection)
            found = store_pb2.LookupResponse.FromString(payload)
            assert kind is Kind.FOUND
            assert list(found.tokens) == [16] * 4
            assert found.lease_id
            assert [(kind, index) for kind, index, _ in objects] == [(Kind.OBJECT, index) for index in range(4)]
            assert [len(blob) for _, _, blob in objects] == list(found.stored_bytes)
            assert ended == b""
            connection.send(Kind.GET, 0, get_request(places=False))
            assert len(frames(connection)) == 6, "the connection is good for more"
    wait_until(lambda: gauge(node, "kvstore_leases") == 0, "a get's lease ends with it")


def test_a_get_brings_no_more_than_is_good_enough(node: NodeProcess) -> None:
    put_some(node, 32, "raw")
    put_some(node, 64, "medium")
    with let_in(node) as connection:
        for floor, objects in (("raw", 2), ("high", 2), ("medium", 4), ("low", 4)):
            connection.send(Kind.GET, 0, get_request(places=False, min_quality=floor))
            (_, _, payload), *came = frames(connection)
            assert len(store_pb2.LookupResponse.FromString(payload).tokens) == 4
            assert [kind for kind, _, _ in came] == [Kind.OBJECT] * objects + [Kind.END]


def test_a_get_of_nothing_finds_nothing(node: NodeProcess) -> None:
    with let_in(node) as connection:
        connection.send(Kind.GET, 0, get_request(places=False))
        assert frames(connection) == [(Kind.FOUND, 0, b""), (Kind.END, 0, b"")]


def test_all_places_of_a_get_are_one_frame(node: NodeProcess) -> None:
    put_some(node, 256)
    with let_in(node, local=True) as connection:
        connection.send(Kind.MAP, 0)
        os.close(connection.receive_descriptor(Kind.MAPPED)[1])
        connection.send(Kind.GET, 0, get_request(places=True))
        (_, _, payload), (kind, index, told), (ended, _, _) = frames(connection)
        places = transfer_pb2.Places.FromString(told)
        assert (kind, index, ended) == (Kind.PLACES, 0, Kind.END)
        assert list(places.object_bytes) == list(store_pb2.LookupResponse.FromString(payload).stored_bytes)
        node.admin.Evict(admin_pb2.EvictRequest(tier="host"), timeout=10)
        assert gauge(node, WAITING) > 0, "they are held"
        release(connection)
    wait_until(lambda: gauge(node, WAITING) == 0, "the memory is free")


@pytest.mark.parametrize(
    "lies",
    [{"namespace_id": b"short"}, {"chunk_hashes": b"x"}, {"part": 1 << 30}, {"first_chunk_hash": b"x"}],
    ids=["namespace", "hashes", "part", "first chunk"],
)
def test_a_get_that_asks_for_nonsense_is_refused(node: NodeProcess, lies: dict[str, Any]) -> None:
    asked = transfer_pb2.BulkGet.FromString(get_request(places=False))
    for name, value in lies.items():
        setattr(asked.lookup, name, value)
    with let_in(node) as connection:
        connection.send(Kind.GET, 0, asked.SerializeToString())
        ended = transfer_pb2.Ended.FromString(connection.payload(connection.receive(Kind.END)))
        assert ended.code == "invalid_request"
    for name in ("quality", "min_quality"):
        asked = transfer_pb2.BulkGet.FromString(get_request(places=False))
        setattr(asked, name, 99)
        with let_in(node) as connection:
            connection.send(Kind.GET, 0, asked.SerializeToString())
            assert connection.receive(Kind.END)


# What is read in place


def test_what_is_read_in_place_stays_until_it_is_released(node: NodeProcess) -> None:
    with places(node, hold_ms=60_000) as connection:
        assert gauge(node, WAITING) > 0
        release(connection)
        wait_until(lambda: gauge(node, WAITING) == 0, "the memory is free")
        connection.send(Kind.FETCH, 0, fetch_request(places=True))
        assert connection.receive(Kind.PLACES, Kind.OBJECT), "and the connection is good for more"


def test_a_reader_that_goes_away_holds_nothing(node: NodeProcess) -> None:
    with places(node, hold_ms=60_000):
        assert gauge(node, WAITING) > 0
    wait_until(lambda: gauge(node, WAITING) == 0, "the memory is free")


@pytest.mark.parametrize("hold_ms", [300, 3_600_000])
def test_a_reader_that_forgets_holds_nothing_past_its_lease(node: NodeProcess, hold_ms: int) -> None:
    """Its own limit or the node's, whichever is shorter; and what it reads later is not confirmed."""
    with places(node, hold_ms) as connection:
        wait_until(lambda: gauge(node, WAITING) == 0, "the memory is free")
        with pytest.raises(ConnectionEnded):
            release(connection)


def test_a_reader_killed_while_it_reads_holds_nothing(node: NodeProcess) -> None:
    script = """
        import os, signal, sys
        sys.path[:0] = sys.argv[2:]
        import kvstore_client.receiving as receiving
        from test_bulk import KV, LAYOUT, TOKENS, Client
        def dies(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        receiving.decode_object = dies
        with Client(sys.argv[1], transport="shm", deadline=20.0) as client:
            client.namespace(LAYOUT).get(TOKENS[:256])
    """
    with Client(node.address, strict=True, deadline=20.0, registry=CollectorRegistry()) as client:
        client.namespace(LAYOUT).put(TOKENS[:256], codec.token_slice(KV, 0, 256), quality="raw", durable=True)
    here = Path(__file__).parent
    command = [sys.executable, "-c", textwrap.dedent(script), node.address, str(here), str(here.parent / "support")]
    ended = subprocess.run(command, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    node.admin.Evict(admin_pb2.EvictRequest(tier="host"), timeout=10)
    wait_until(lambda: gauge(node, WAITING) == 0, "the memory is free")
    wait_until(lambda: gauge(node, "kvstore_bulk_connections") == 0, "its connections have ended")


def test_what_was_read_too_slowly_is_a_miss(node: NodeProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node took the memory back while the client, stopped for a while, was reading it."""
    with Client(node.address, deadline=20.0, transport="shm", registry=CollectorRegistry()) as client:
        cache = client.namespace(LAYOUT)
        cache.put(TOKENS[:256], codec.token_slice(KV, 0, 256), quality="raw")
        assert cache.get(TOKENS[:256])[1] == 256

        def slowly(*arguments: Any) -> None:
            threading.Event().wait(2.0)
            decode_object(*arguments)

        monkeypatch.setattr("kvstore_client.receiving.decode_object", slowly)
        assert cache.get(TOKENS[:256])[1] == 0
        monkeypatch.undo()
        assert cache.get(TOKENS[:256])[1] == 256


def release(connection: BulkSocket) -> None:
    connection.send(Kind.RELEASE, 0)
    connection.receive(Kind.RELEASED)


@contextmanager
def places(node: NodeProcess, hold_ms: int) -> Iterator[BulkSocket]:
    """A connection that has been told where objects are, and has not let go; they have been evicted since."""
    with Client(node.address, strict=True, deadline=20.0, registry=CollectorRegistry()) as client:
        client.namespace(LAYOUT).put(TOKENS[:256], codec.token_slice(KV, 0, 256), quality="raw", durable=True)
    with let_in(node, local=True) as connection:
        connection.send(Kind.MAP, 0)
        os.close(connection.receive_descriptor(Kind.MAPPED)[1])
        connection.send(Kind.FETCH, 0, fetch_request(places=True, hold_ms=hold_ms))
        while (found := connection.receive(Kind.PLACES, Kind.END)).kind is Kind.PLACES:
            connection.payload(found)
        connection.payload(found)
        node.admin.Evict(admin_pb2.EvictRequest(tier="host"), timeout=10)
        yield connection


def test_a_get_goes_past_the_event_loop_once_a_connection_is_there(node: NodeProcess) -> None:
    """A thread that blocks asks for itself: whatever the client's loop does, which all clients of a process share."""
    released = threading.Event()
    with Client(node.address, strict=True, deadline=20.0, transport="shm", registry=CollectorRegistry()) as client:
        cache = client.namespace(LAYOUT)
        cache.put(TOKENS[:256], codec.token_slice(KV, 0, 256), quality="raw")
        _loop().call_soon_threadsafe(released.wait, 20.0)
        try:
            kv, tokens = cache.get(TOKENS[:256])
            assert not released.is_set()
        finally:
            released.set()
    assert tokens == 256
    assert bits(kv) == bits(codec.token_slice(KV, 0, 256))


def test_a_get_in_the_calling_thread_can_be_interrupted(start_node: Callable[..., NodeProcess]) -> None:
    node = start_node()
    with Client(node.address, deadline=20.0, transport="tcp", registry=CollectorRegistry()) as client:
        cache = client.namespace(LAYOUT)
        cache.put(TOKENS[:256], codec.token_slice(KV, 0, 256), quality="raw")
        node.process.send_signal(signal.SIGSTOP)
        try:
            threading.Timer(0.3, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                cache.get(TOKENS[:256])
        finally:
            node.process.send_signal(signal.SIGCONT)
        assert cache.get(TOKENS[:256])[1] == 256


# Puts


def test_a_put_that_breaks_off_leaves_nothing(node: NodeProcess) -> None:
    refs = codec.chunk_refs(LAYOUT, TOKENS[:32])
    blobs = [
        codec.encode(codec.token_slice(KV, ref.first_token, ref.first_token + 16), LAYOUT, quality="raw",
                     first_position=ref.first_token, chunk_hash=ref.hash)
        for ref in refs
    ]  # fmt: skip
    offer = store_pb2.PutOffer(
        namespace_id=LAYOUT.namespace_id, layout=LAYOUT.canonical_bytes,
        objects=[
            store_pb2.ObjectOffer(chunk_hash=ref.hash, parent_hash=ref.parent, object_bytes=len(blob))
            for ref, blob in zip(refs, blobs, strict=True)
        ],
    )  # fmt: skip
    offered = frame(Kind.OFFER, 0, store_pb2.PutRequest(offer=offer).SerializeToString())
    first = frame(Kind.OBJECT, 0, blobs[0])
    for sent in (
        b"", first, first + frame(Kind.OBJECT, 1, blobs[1])[:-1], first + first, frame(Kind.OBJECT, 1, blobs[1]),
        frame(Kind.OBJECT, 0, blobs[0] + b"x"), first + b"\xff" * 16,
    ):  # fmt: skip
        with let_in(node) as connection:
            connection.send_bytes(offered)
            connection.payload(connection.receive(Kind.VERDICTS))
            connection.send_bytes(sent)
        wait_until(lambda: gauge(node, "kvstore_staged_bytes") == 0, "nothing is staged")
    with Client(node.address, strict=True, registry=CollectorRegistry()) as client:
        assert client.stat().objects == 0
        assert client.stat().tiers[0].used_bytes == 0
    with let_in(node) as connection:
        connection.send_bytes(offered)
        connection.payload(connection.receive(Kind.VERDICTS))
        connection.send_bytes(first + frame(Kind.COMMIT))
        answer = store_pb2.PutResponse.FromString(connection.payload(connection.receive(Kind.RESULTS)))
    outcomes = [result.outcome for result in answer.results.results]
    assert outcomes == [store_pb2.OUTCOME_STORED, store_pb2.OUTCOME_REJECTED], "what came counts"


def test_a_put_of_a_damaged_object_stores_the_others(node: NodeProcess) -> None:
    refs = codec.chunk_refs(LAYOUT, TOKENS[:48])
    blobs = [
        codec.encode(codec.token_slice(KV, ref.first_token, ref.first_token + 16), LAYOUT, quality="raw",
                     first_position=ref.first_token, chunk_hash=ref.hash)
        for ref in refs
    ]  # fmt: skip
    offer = store_pb2.PutOffer(
        namespace_id=LAYOUT.namespace_id, layout=LAYOUT.canonical_bytes,
        objects=[
            store_pb2.ObjectOffer(chunk_hash=ref.hash, parent_hash=ref.parent, object_bytes=len(blob))
            for ref, blob in zip(refs, blobs, strict=True)
        ],
    )  # fmt: skip
    blobs[1] = blobs[1][:-1] + bytes([blobs[1][-1] ^ 1])
    with let_in(node) as connection:
        connection.send(Kind.OFFER, 0, store_pb2.PutRequest(offer=offer).SerializeToString())
        connection.payload(connection.receive(Kind.VERDICTS))
        for index, blob in enumerate(blobs):
            connection.send(Kind.OBJECT, index, blob)
        connection.send(Kind.COMMIT, 0)
        answer = store_pb2.PutResponse.FromString(connection.payload(connection.receive(Kind.RESULTS)))
    outcomes = [result.outcome for result in answer.results.results]
    assert outcomes == [store_pb2.OUTCOME_STORED, store_pb2.OUTCOME_REJECTED, store_pb2.OUTCOME_STORED]
    assert "checksum" in answer.results.results[1].reason
    assert gauge(node, 'kvstore_integrity_failures_total{code="checksum_mismatch",tier="put"}') == 1
    assert gauge(node, "kvstore_staged_bytes") == gauge(node, WAITING) == 0
    with Client(node.address, strict=True, registry=CollectorRegistry()) as client:
        kv, tokens = client.namespace(LAYOUT).get(TOKENS[:48])
        assert client.stat().objects == 2
    assert tokens == 16
    assert bits(kv) == bits(codec.token_slice(KV, 0, 16))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=300), kind=st.sampled_from(Kind), index=st.integers(0, 2**32 - 1))
def test_no_bytes_of_a_peer_end_the_node(node: NodeProcess, noise: bytes, kind: Kind, index: int) -> None:
    for sent in (noise, frame(kind, index, noise)):
        with let_in(node) as connection:
            connection.send_bytes(sent)
    assert node.process.poll() is None
    with Client(node.address, strict=True, deadline=20.0, registry=CollectorRegistry()) as client:
        assert client.stat().staged_bytes == 0
