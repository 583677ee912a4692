"""Frames of the bulk path: a bare TCP or unix socket between a client and a node, beside their gRPC channel.

A frame is a header of 16 bytes, little-endian, and its payload:

    kind: u8 · three zero bytes · index: u32 · payload length: u64

A connection starts with the client's HELLO: "KVSB", the version (u16) and the 32 bytes of a ticket from
`Transfer.Connect`. The node answers WELCOME or closes. Then the client asks, one request at a time:

    FETCH   a BulkFetch   → OBJECT (index: of the chunk; the object) or PLACES (index: of the first chunk; a Places), in
                            the order asked for, then END (an Ended); after places, RELEASE by the client → RELEASED:
                            what was read until then was in place. The client need not wait for that where it finds the
                            connection open after reading: a node ends it before it lets go of a place
    GET     a BulkGet     → FOUND (a LookupResponse), then as of FETCH; or END alone
    OFFER   a PutOffer    → VERDICTS (a PutResponse) or END; then by the client OBJECT* (index: of the offer) and COMMIT
                          → RESULTS (a PutResponse) or END
    MAP     unix sockets  → MAPPED (a SharedMemory) with the descriptor of the node's memory, or END

An END that is not well, and whatever is not said here, ends the connection.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

VERSION = 2
TICKET_BYTES = 32
CONTROL_BYTES_MAX = 4 << 20  # of a payload that is no object
_HEADER = struct.Struct("<B3xIQ")
_HELLO = struct.Struct(f"<4sH{TICKET_BYTES}s")
_MAGIC = b"KVSB"
HEADER_BYTES = _HEADER.size
HELLO_BYTES = HEADER_BYTES + _HELLO.size


class Kind(IntEnum):
    HELLO = 1
    WELCOME = 2
    FETCH = 3
    OBJECT = 4
    PLACES = 5
    END = 6
    RELEASE = 7
    RELEASED = 8
    OFFER = 9
    VERDICTS = 10
    COMMIT = 11
    RESULTS = 12
    MAP = 13
    MAPPED = 14
    GET = 15
    FOUND = 16


class Header(NamedTuple):
    kind: Kind
    index: int
    length: int


class BadFrame(Exception):
    """Bytes that are no frame, or none that may come here."""


def frame(kind: Kind, index: int = 0, payload: bytes = b"") -> bytes:
    return header(kind, index, len(payload)) + payload


def header(kind: Kind, index: int, length: int) -> bytes:
    return _HEADER.pack(kind, index, length)


def parse_header(data: bytes | bytearray | memoryview) -> Header:
    """Of exactly HEADER_BYTES bytes. Raises BadFrame for an unknown kind, and for a control frame that is too long."""
    kind, index, length = _HEADER.unpack(data)
    if bytes(data[1:4]) != bytes(3):
        raise BadFrame("bytes of a header that must be zero are not")
    try:
        known = Kind(kind)
    except ValueError:
        raise BadFrame(f"no frame has the kind {kind}") from None
    if known is not Kind.OBJECT and length > CONTROL_BYTES_MAX:
        raise BadFrame(f"a {known.name} of {length} bytes is too long")
    return Header(known, index, length)


def hello(ticket: bytes) -> bytes:
    return frame(Kind.HELLO, payload=_HELLO.pack(_MAGIC, VERSION, ticket))


def parse_hello(data: bytes | bytearray | memoryview) -> bytes:
    """The ticket of a HELLO, header included. Raises BadFrame."""
    head = parse_header(data[:HEADER_BYTES])
    if head.kind is not Kind.HELLO or head.index or head.length != _HELLO.size or len(data) != HELLO_BYTES:
        raise BadFrame("a connection starts with HELLO")
    magic, version, ticket = _HELLO.unpack(data[HEADER_BYTES:])
    if magic != _MAGIC or version != VERSION:
        raise BadFrame("another protocol, or another version of it")
    return bytes(ticket)
