"""The Live service: a writer's layers are handed on to its readers piece by piece, as they arrive.

A write ends with its writer's stream, whatever ends that: its end, a reset connection, a cancellation, a piece out of
place, no progress for the idle limit, no room. Readers then get what has come, and see that layers are missing.
"""

from __future__ import annotations

from typing import Any

import grpc

from kvstore.engine.live import Found, LiveWrite
from kvstore.engine.node import Node
from kvstore.service import live_requests
from kvstore.service.idle import IdleLimit
from kvstore.service.streams import StreamMetrics
from kvstore_proto.v1 import live_pb2 as pb
from kvstore_proto.v1 import live_pb2_grpc as pb_grpc
from kvstore_proto.v1.framing import Framed

Context = grpc.aio.ServicerContext[Any, Any]


class LiveService(pb_grpc.LiveServicer):
    """Its calls raise InvalidRequest, StreamStalled (also for a reader that takes nothing), TierFull."""

    def __init__(self, node: Node, *, stream_idle_s: float, metrics: StreamMetrics) -> None:
        self._node, self._stream_idle_s, self._metrics = node, stream_idle_s, metrics

    async def Write(self, request_iterator: Any, context: Context) -> None:  # noqa: N802
        with IdleLimit(self._stream_idle_s) as idle:
            first = await context.read()
            if first is grpc.aio.EOF:  # type: ignore[attr-defined]
                return
            write = self._node.live.open(live_requests.opening(first.head))
            try:
                await context.write(pb.LiveWriteResponse(opened=pb.LiveOpened()))
                await self._receive(write, context, idle)
            finally:
                self._node.live.close(write)

    async def Follow(self, request: pb.FollowRequest, context: Context) -> None:  # noqa: N802
        asked = live_requests.asked(request)
        found = await self._node.live.find(asked, live_requests.wait_s(request))
        if found == "stored":
            await context.write(Framed(pb.FollowResponse(stored=pb.LiveStored())))
        elif found is not None:
            with found.write.kept():
                await self._hand_on(found, context)

    async def _receive(self, write: LiveWrite, context: Context, idle: IdleLimit) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            piece = live_requests.piece(message)
            write.add(piece)
            self._metrics.live_in.inc(len(piece.data))
            idle.progress()

    async def _hand_on(self, found: Found, context: Context) -> None:
        opening = found.write.opening
        head = pb.LiveFound(
            first_chunk=found.first_chunk, chunks=found.chunks, layers=opening.layers, quality=opening.quality,
            provenance=opening.provenance,
        )  # fmt: skip
        await self._send(context, Framed(pb.FollowResponse(found=head)))
        async for piece in found.write.follow(found.chunks):
            response = pb.FollowResponse(layer=piece.layer, offset=piece.offset, object_bytes=piece.object_bytes)
            await self._send(context, Framed(response, piece.data))
            self._metrics.live_out.inc(len(piece.data))

    async def _send(self, context: Context, message: Framed[pb.FollowResponse]) -> None:
        with IdleLimit(self._stream_idle_s):
            await context.write(message)
