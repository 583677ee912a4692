"""A gRPC server that only moves bytes: the least that any transfer over gRPC can cost.

`Send` streams as many bytes as asked for in messages of 1 MiB, `Sink` counts those it is sent, `Answer` is one message
each way. No serialiser on either side, no tiers, no checksums. Prints one JSON line with its address when it is ready.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import grpc

from kvstore_proto.v1.framing import CHANNEL_OPTIONS, DATA_BYTES_MAX

SERVICE = "bench.BareStream"
_LENGTH = 8  # bytes of a number on the wire
_PIECE = os.urandom(DATA_BYTES_MAX)


class BareClient:
    """What a synchronous gRPC client pays for moving bytes. `channel`: a grpc.Channel."""

    def __init__(self, channel: Any, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._sink = channel.stream_unary(f"/{SERVICE}/Sink")
        self._send = channel.unary_stream(f"/{SERVICE}/Send")
        self._answer = channel.unary_unary(f"/{SERVICE}/Answer")

    def sink(self, pieces: Iterable[bytes]) -> int:
        """Bytes that the server counted."""
        return int.from_bytes(self._sink(iter(pieces), timeout=self._timeout_s), "little")

    def send(self, total: int) -> Iterator[bytes]:
        pieces: Iterator[bytes] = self._send(total.to_bytes(_LENGTH, "little"), timeout=self._timeout_s)
        return pieces

    def answer(self, request_bytes: int, answer_bytes: int) -> bytes:
        """One call, of a request of that size, 8 bytes at least."""
        request = answer_bytes.to_bytes(_LENGTH, "little") + bytes(request_bytes - _LENGTH)
        answer: bytes = self._answer(request, timeout=self._timeout_s)
        return answer


async def _sink(pieces: AsyncIterator[bytes], context: Any) -> bytes:
    total = 0
    async for piece in pieces:
        total += len(piece)
    return total.to_bytes(_LENGTH, "little")


async def _send(request: bytes, context: Any) -> AsyncIterator[bytes]:
    whole, rest = divmod(int.from_bytes(request, "little"), DATA_BYTES_MAX)
    for _ in range(whole):
        yield _PIECE
    if rest:
        yield _PIECE[:rest]


async def _answer(request: bytes, context: Any) -> bytes:
    return bytes(int.from_bytes(request[:_LENGTH], "little"))


async def _serve() -> None:
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    methods = {
        "Sink": grpc.stream_unary_rpc_method_handler(_sink),
        "Send": grpc.unary_stream_rpc_method_handler(_send),
        "Answer": grpc.unary_unary_rpc_method_handler(_answer),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"addresses": [f"127.0.0.1:{port}"]}), flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve())
