"""What a bulk socket knows of its peer without waiting for it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from kvstore_proto.v1.bulk import Kind, frame
from kvstore_proto.v1.bulk_socket import BulkSocket


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
