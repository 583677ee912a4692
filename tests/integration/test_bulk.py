"""The bulk path of a real node process: the same values by every way, who is let in, and how a way is found."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from bulk_peer import CHUNKS, KV, LAYOUT, TOKENS, calls, connect, gauge, let_in, ticket_of
from kv_strategies import bits
from node_process import KVSTORE, NodeProcess
from polling import wait_until
from prometheus_client import CollectorRegistry

import kvstore_codec as codec
from kvstore_client import AsyncClient, Client, InvalidArgument
from kvstore_client.client import _loop
from kvstore_client.transports.bulk_path import Transport
from kvstore_proto.v1 import transfer_pb2
from kvstore_proto.v1.bulk import HEADER_BYTES, Kind, hello, parse_header
from kvstore_proto.v1.bulk_socket import ConnectionEnded

METHODS = {"grpc": "Fetch", "tcp": "BulkGet", "unix": "BulkGet", "shm": "BulkGet"}
pytestmark = pytest.mark.usefixtures("nothing_stored")


@pytest.mark.parametrize("transport", ["grpc", "tcp", "unix", "shm"])
@pytest.mark.parametrize("quality", ["raw", "high"])
def test_every_way_brings_the_same_values(bulk_node: NodeProcess, transport: Transport, quality: str) -> None:
    """Memory is smaller than the prompt, so that some objects come from disk."""
    registry = CollectorRegistry()
    before = calls(bulk_node, METHODS[transport]), calls(bulk_node, "BulkPut")
    with (
        Client(bulk_node.address, strict=True, deadline=20.0, transport=transport, registry=registry) as client,
        Client(bulk_node.address, strict=True, deadline=20.0, transport="grpc", registry=registry) as plain,
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
    assert calls(bulk_node, METHODS[transport]) > before[0]
    if transport != "grpc":
        assert calls(bulk_node, "BulkPut") == before[1] + 1
    failures = [sample for metric in registry.collect() for sample in metric.samples if "failures" in sample.name]
    assert not [sample for sample in failures if sample.value and sample.name.endswith("_total")]


async def test_the_best_way_is_found_in_the_background(bulk_node: NodeProcess) -> None:
    async with AsyncClient(
        bulk_node.address, strict=True, deadline=20.0, transport="auto", registry=CollectorRegistry()
    ) as client:
        cache, before, puts = client.namespace(LAYOUT), calls(bulk_node, "BulkGet"), calls(bulk_node, "Put")
        await cache.put(TOKENS[:64], codec.token_slice(KV, 0, 64), quality="raw")
        wait_until(lambda: calls(bulk_node, "Put") == puts + 1, "the first call does not wait for it")
        for _ in range(1000):
            kv, tokens = await cache.get(TOKENS[:64])
            assert tokens == 64
            assert bits(kv) == bits(codec.token_slice(KV, 0, 64))
            if calls(bulk_node, "BulkGet") > before:
                break
            await asyncio.sleep(0.01)
        assert calls(bulk_node, "BulkMap") >= 1, "on one machine it is shared memory"


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
def test_who_has_no_ticket_is_not_let_in(bulk_node: NodeProcess, opening: bytes) -> None:
    with connect(bulk_node) as connection:
        connection.sendall(opening)
        with suppress(ConnectionResetError):  # what it had not read was lost
            assert connection.recv(1) == b"", "closed without a word, at once or when the time for a hello is over"
    assert bulk_node.process.poll() is None


def test_a_ticket_opens_one_connection(bulk_node: NodeProcess) -> None:
    ticket = ticket_of(bulk_node).ticket
    with connect(bulk_node) as first, connect(bulk_node) as second:
        first.sendall(hello(ticket))
        assert parse_header(first.recv(HEADER_BYTES, socket.MSG_WAITALL)).kind is Kind.WELCOME
        second.sendall(hello(ticket))
        assert second.recv(1) == b""
    assert gauge(bulk_node, 'kvstore_bulk_refused_total{reason="ticket"}') >= 1


def test_memory_is_shared_over_unix_sockets_only(bulk_node: NodeProcess) -> None:
    with let_in(bulk_node) as connection:
        connection.send(Kind.MAP, 0)
        ended = transfer_pb2.Ended.FromString(connection.payload(connection.receive(Kind.END)))
        assert ended.code == "invalid_request"
        assert "unix" in ended.details
        with pytest.raises(ConnectionEnded):
            connection.receive(Kind.MAPPED)


def test_shared_memory_is_for_reading(bulk_node: NodeProcess) -> None:
    with let_in(bulk_node, local=True) as connection:
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


def test_a_get_goes_past_the_event_loop_once_a_connection_is_there(bulk_node: NodeProcess) -> None:
    """A thread that blocks asks for itself: whatever the client's loop does, which all clients of a process share."""
    released = threading.Event()
    with Client(bulk_node.address, strict=True, deadline=20.0, transport="shm", registry=CollectorRegistry()) as client:
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
