"""What a bulk socket knows of its peer without waiting for it, and how it receives over TLS."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from certificates import Authority

from kvstore_proto.v1.bulk import Kind, frame
from kvstore_proto.v1.bulk_socket import BulkSocket, ConnectionEnded, NoProgress


@pytest.fixture
def pair() -> Iterator[tuple[BulkSocket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with theirs:
        connection = BulkSocket(ours, 5.0)
        yield connection, theirs
        connection.close()


def test_a_silent_peer_is_there(pair: tuple[BulkSocket, socket.socket]) -> None:
    assert pair[0].is_open()
    assert pair[0].is_open()


def test_a_peer_that_shut_down_or_closed_is_not(pair: tuple[BulkSocket, socket.socket]) -> None:
    pair[1].shutdown(socket.SHUT_RDWR)
    assert not pair[0].is_open()
    pair[1].close()
    assert not pair[0].is_open()


def test_what_came_is_left_to_be_received(pair: tuple[BulkSocket, socket.socket]) -> None:
    pair[1].sendall(frame(Kind.RELEASED))
    assert not pair[0].is_open()
    assert pair[0].receive(Kind.RELEASED).kind is Kind.RELEASED
    assert pair[0].is_open()


# Over TLS, where a read gives no more than a record


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(a client's, a server's)"""
    authority = Authority(tmp_path_factory.mktemp("tls") / "authority")
    own = authority.certificate("here")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(own.cert, own.key)
    return ssl.create_default_context(cafile=str(authority.ca)), server


@pytest.fixture
def tls_pair(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> Iterator[tuple[BulkSocket, ssl.SSLSocket]]:
    client, server = contexts
    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(1) as threads:
        accepting = threads.submit(server.wrap_socket, theirs, server_side=True)
        connection = BulkSocket(client.wrap_socket(ours, server_hostname="127.0.0.1"), 5.0)
        with accepting.result(5) as accepted:
            yield connection, accepted
            connection.close()


@pytest.mark.parametrize("pieces", [[100_000], [1, 16_383, 16_384, 16_385, 50_847], [10_000] * 10])
def test_records_make_what_was_sent_whatever_their_sizes(
    tls_pair: tuple[BulkSocket, ssl.SSLSocket], pieces: list[int]
) -> None:
    connection, theirs = tls_pair
    data = bytes(range(250)) * 400
    with ThreadPoolExecutor(1) as threads:

        def send() -> None:
            at = 0
            for size in pieces:
                theirs.sendall(data[at : at + size])
                at += size
            theirs.sendall(b"more")

        sending = threads.submit(send)
        found = bytearray(len(data))
        told: list[int] = []
        connection.receive_into(memoryview(found), after=told.append, until=lambda: 5.0)
        sending.result(5)
    assert found == data
    assert sum(told) == len(data)
    rest = bytearray(4)
    connection.receive_into(memoryview(rest))
    assert rest == b"more", "nothing of what is behind it was taken"


def test_records_that_are_here_are_told_before_more_is_waited_for(tls_pair: tuple[BulkSocket, ssl.SSLSocket]) -> None:
    """And silence behind them ends in time, as silence."""
    connection, theirs = tls_pair
    told: list[int] = []
    with ThreadPoolExecutor(1) as threads:
        sending = threads.submit(theirs.sendall, bytes(40_000))
        began = time.monotonic()
        with pytest.raises(NoProgress):
            connection.receive_into(
                memoryview(bytearray(100_000)), after=told.append, until=lambda: 0.3 - (time.monotonic() - began)
            )
        sending.result(5)
    assert 0.25 < time.monotonic() - began < 2.0
    assert sum(told) == 40_000


def test_records_that_end_early_are_an_ended_connection(tls_pair: tuple[BulkSocket, ssl.SSLSocket]) -> None:
    connection, theirs = tls_pair
    with ThreadPoolExecutor(1) as threads:
        sending = threads.submit(theirs.sendall, bytes(40_000))
        sending.add_done_callback(lambda _: socket.socket.shutdown(theirs, socket.SHUT_RDWR))
        with pytest.raises(ConnectionEnded):
            connection.receive_into(memoryview(bytearray(100_000)))


@pytest.mark.parametrize("pause_s", [0.0, 0.01])
def test_records_of_a_byte_do_not_outlast_the_time(
    tls_pair: tuple[BulkSocket, ssl.SSLSocket], pause_s: float
) -> None:  # fmt: skip
    """However fast they come, and however slowly."""
    connection, theirs = tls_pair
    ended, told = threading.Event(), list[int]()

    def trickle() -> None:
        with contextlib.suppress(OSError):  # nobody receives any more
            while not ended.wait(pause_s):
                for _ in range(1 if pause_s else 100):
                    theirs.sendall(b"x")

    with ThreadPoolExecutor(1) as threads:
        trickling = threads.submit(trickle)
        ends_s = time.monotonic() + 0.3
        with pytest.raises(NoProgress):
            connection.receive_into(
                memoryview(bytearray(10_000_000)), after=told.append, until=lambda: ends_s - time.monotonic()
            )
        late_s = time.monotonic() - ends_s
        ended.set()
        connection.shutdown()
        trickling.result(5)
    assert sum(told) > 0
    assert late_s < 0.5
