"""Fetch as a gRPC stream: works wherever gRPC does."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from kvstore_client.connection import Node, failures, understood
from kvstore_client.deadline import Deadline
from kvstore_client.errors import ProtocolViolation
from kvstore_client.transports.blob import Blob, Buffers
from kvstore_client.transports.wanted import Wants
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import DATA_BYTES_MAX, Framed


async def objects(
    node: Node, wanted: Wants, lease_id: bytes, deadline: Deadline, buffers: Buffers,
    count_received: Callable[[int], None],
) -> AsyncGenerator[Blob, None]:  # fmt: skip
    """Whole objects in the order of `wanted.chunks`, possibly fewer. Raises the typed error of a failed call,
    ProtocolViolation."""
    call = None
    try:
        index, received, buffer, view = 0, 0, None, memoryview(b"")
        async with failures(node):
            call = node.stub.Fetch(wanted.request(lease_id), timeout=deadline.remaining())
            async for message in call:
                received += _check_piece(node, wanted, understood(node, message), index, received, len(view))
                count_received(len(message.data))
                if not message.head.offset and len(message.data) == message.head.object_bytes:
                    yield Blob(memoryview(message.data))  # in one piece: not even copied
                else:
                    if buffer is None:
                        buffer, view = buffers.take(message.head.object_bytes)
                    _copy(message.data, view[message.head.offset : received])
                    if received < len(view):
                        continue
                    yield Blob(view, partial(buffers.give_back, buffer))
                index, received, buffer, view = index + 1, 0, None, memoryview(b"")
        if received:
            raise ProtocolViolation("a fetch ended inside an object", node=node.address)
    finally:
        if call is not None:
            call.cancel()


def _copy(data: memoryview | bytes, into: memoryview) -> None:
    """Without the interpreter's lock, which the decoders need meanwhile."""
    target: npt.NDArray[np.uint8] = np.frombuffer(into, np.uint8)
    np.copyto(target, np.frombuffer(data, np.uint8))


def _check_piece(
    node: Node, wanted: Wants, message: Framed[pb.FetchResponse], index: int, received: int, object_bytes: int
) -> int:
    """Length of a piece that continues object `index` after `received` bytes. Raises ProtocolViolation."""
    head, size = message.head, len(message.data)
    if not received:
        object_bytes = head.object_bytes
    sane = (
        index < len(wanted.chunks)
        and head.chunk_index == index
        and head.offset == received
        and 0 < size <= DATA_BYTES_MAX
        and object_bytes <= wanted.bytes_max(index)
        and received + size <= object_bytes
    )
    if not sane:
        raise ProtocolViolation(
            "a fetch sent a piece out of place", node=node.address, chunk=head.chunk_index, expected=index,
            offset=head.offset, received=received, bytes=size, object_bytes=object_bytes,
        )  # fmt: skip
    return size
