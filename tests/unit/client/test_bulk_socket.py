"""What a bulk socket knows of its peer without waiting for it, and how TLS receives what trickles."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import Authority

from kvstore_proto.v1.bulk import Kind, frame
from kvstore_proto.v1.bulk_socket import BulkSocket, NoProgress


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


@pytest.fixture
def tls_pair(tmp_path: Path) -> Iterator[tuple[BulkSocket, ssl.SSLSocket]]:
    authority = Authority(tmp_path / "ca")
    own = authority.certificate("127.0.0.1")
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(own.cert, own.key)
    ours, theirs = socket.socketpair()
    wrapped: list[ssl.SSLSocket] = []
    shaking = threading.Thread(target=lambda: wrapped.append(serving.wrap_socket(theirs, server_side=True)))
    shaking.start()
    trusting = ssl.create_default_context(cafile=authority.ca)
    connection = BulkSocket(trusting.wrap_socket(ours, server_hostname="127.0.0.1"), 5.0)
    shaking.join()
    with wrapped[0]:
        yield connection, wrapped[0]
        connection.close()


def test_over_tls_what_trickles_is_told_of_and_ends_in_time(tls_pair: tuple[BulkSocket, ssl.SSLSocket]) -> None:
    connection, theirs = tls_pair
    ended = threading.Event()

    def trickle() -> None:
        while not ended.wait(0.01):
            theirs.sendall(b"x")

    trickling = threading.Thread(target=trickle)
    trickling.start()
    told: list[int] = []
    ends_s = time.monotonic() + 0.3
    try:
        with pytest.raises(NoProgress):
            connection.receive_into(
                memoryview(bytearray(500)), after=told.append, until=lambda: ends_s - time.monotonic()
            )
    finally:
        ended.set()
        trickling.join()
    assert 0 < sum(told) < 500
    assert len(told) == sum(told)
    assert time.monotonic() < ends_s + 1.0


def test_over_tls_many_records_are_told_of_together(tls_pair: tuple[BulkSocket, ssl.SSLSocket]) -> None:
    connection, theirs = tls_pair
    data = bytes(range(256)) * 4096  # 64 records
    sending = threading.Thread(target=theirs.sendall, args=(data,))
    sending.start()
    received, told = bytearray(len(data)), list[int]()
    connection.receive_into(memoryview(received), after=told.append)
    sending.join()
    assert received == data
    assert sum(told) == len(data)
    assert len(told) < 64
