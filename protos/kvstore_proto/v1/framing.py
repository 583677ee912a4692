"""Frames bulk messages (`FetchResponse`, `PutRequest`) without copying their data through protobuf.

Both messages end in `bytes data = 15`. A `Framed` pairs the small head message with the data as a buffer: the
serialiser joins head, tag, length and data (the one copy gRPC needs anyway), the parser hands out a memoryview
of the received bytes. The bytes on the wire are exactly protobuf's, so a peer that uses the generated classes
interoperates; a message whose fields come in another order takes the ordinary parser.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import Message

from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1 import store_pb2_grpc as pb_grpc

#: Of `data` in one message: 1 MiB of KV with its header and checksums is one message, not one and a bit.
DATA_BYTES_MAX = (1 << 20) + (1 << 16)
MESSAGE_BYTES_MAX = DATA_BYTES_MAX + (3 << 20)  # an offer with a 1 MB layout and 2048 objects fits as well
HASHES_MAX = 4096  # chunks in one Lookup, Fetch, Delete, Verify or Evict: 1 M tokens at 256 a chunk
OFFERED_OBJECTS_MAX = 2048  # in one PutOffer
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
]

_DATA_TAG = 15 << 3 | 2
_EMPTY = memoryview(b"")
M = TypeVar("M", bound=Message)


@dataclass(frozen=True)
class Framed(Generic[M]):
    """A message whose `data` field is left empty in `head` and stands beside it."""

    head: M
    data: memoryview | bytes = _EMPTY


def serialize(framed: Framed[Any]) -> bytes:
    head = framed.head.SerializeToString()
    size = len(framed.data)
    return b"".join((head, bytes((_DATA_TAG,)), _varint(size), framed.data)) if size else head


def parser(message_type: type[M]) -> Callable[[bytes], Framed[M]]:
    """A gRPC deserialiser; raises protobuf's DecodeError for bytes that are no such message."""

    def parse(wire: bytes) -> Framed[M]:
        start = _data_at_end(wire)
        head = message_type()
        if start is not None:
            head_end, data_start = start
            head.ParseFromString(wire[:head_end])
            return Framed(head, memoryview(wire)[data_start:])
        head.ParseFromString(wire)
        data = head.data  # type: ignore[attr-defined]
        head.ClearField("data")
        return Framed(head, data)

    return parse


parse_fetch_response = parser(pb.FetchResponse)
parse_put_request = parser(pb.PutRequest)


class FramedStoreStub(pb_grpc.StoreStub):
    """The generated stub, with Fetch yielding and Put taking `Framed` messages."""

    def __init__(self, channel: Any) -> None:
        super().__init__(channel)
        self.Fetch = channel.unary_stream(
            "/kvstore.v1.Store/Fetch",
            request_serializer=pb.FetchRequest.SerializeToString,
            response_deserializer=parse_fetch_response,
        )
        self.Put = channel.stream_stream(
            "/kvstore.v1.Store/Put",
            request_serializer=serialize,
            response_deserializer=pb.PutResponse.FromString,
        )


def add_framed_store_servicer(servicer: pb_grpc.StoreServicer, server: Any) -> None:
    """Registers `servicer`, whose Fetch yields and whose Put receives `Framed` messages."""
    pb_grpc.add_StoreServicer_to_server(servicer, _Reframed(server))


class _Reframed:
    """Passes the generated registration on, with Fetch and Put's codecs exchanged."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        # The generated code registers the same handlers twice (generic, then by name); by name is enough.
        pass

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        handlers = dict(handlers)
        fetch, put = handlers["Fetch"], handlers["Put"]
        handlers["Fetch"] = grpc.unary_stream_rpc_method_handler(
            fetch.unary_stream, request_deserializer=fetch.request_deserializer, response_serializer=serialize
        )
        handlers["Put"] = grpc.stream_stream_rpc_method_handler(
            put.stream_stream, request_deserializer=parse_put_request, response_serializer=put.response_serializer
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))


def _data_at_end(wire: bytes) -> tuple[int, int] | None:
    """(end of head, start of data) if the message is head fields, then one data field to the very end."""
    at, size = 0, len(wire)
    while at < size:
        tag = wire[at]
        if tag >= 0x80:  # field numbers over 15: not one of ours
            return None
        if tag == _DATA_TAG:
            length, data_start = _read_varint(wire, at + 1)
            return (at, data_start) if data_start >= 0 and data_start + length == size else None
        kind = tag & 7
        value, at = _read_varint(wire, at + 1)
        if at < 0:
            return None
        if kind == 2:
            at += value
        elif kind != 0:
            return None
    return None


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(wire: bytes, at: int) -> tuple[int, int]:
    """(value, next position); position −1 if the bytes end or the number is too long."""
    value = 0
    for shift in range(0, 35, 7):
        if at >= len(wire):
            break
        byte = wire[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    return 0, -1
