"""Put: offer → verdicts → pieces of the wanted objects → commit → results.

The stage that an offer opens is aborted on every way out but a finished commit: end of stream, cancellation,
deadline, a piece out of place, or a sender that sends nothing for the idle limit. Abort after commit is a no-op.

While the next piece is received, a thread copies the last: into fresh memory a MiB takes most of a millisecond, in
which the event loop answers lookups.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np

from kvstore.engine.node import Node, Offer, Stage
from kvstore.errors import InvalidRequest
from kvstore.service import requests, wire
from kvstore.service.idle import IdleLimit
from kvstore.service.streams import StreamMetrics
from kvstore_codec import Quality
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import Framed

Context = grpc.aio.ServicerContext[Any, Any]
COPIED_HERE_BYTES_MAX = 64 << 10  # a smaller piece is copied sooner than a thread is asked to


async def put(node: Node, context: Context, *, stream_idle_s: float, metrics: StreamMetrics) -> None:
    """Raises InvalidRequest (a stream that is no put), StreamStalled, and the node's errors."""
    with IdleLimit(stream_idle_s):
        offer = requests.put_offer((await _receive(context)).head)
    stage = node.offer(
        offer.namespace_id,
        offer.layout,
        offer.part,
        [
            Offer(offered.chunk_hash, offered.parent_hash, offered.object_bytes, Quality(offered.quality))
            for offered in offer.objects
        ],
        offer.first_chunk_hash,
    )
    try:
        with IdleLimit(stream_idle_s) as idle:
            await context.write(wire.verdicts(stage.verdicts))
            await _fill(stage, len(offer.objects), context, idle, metrics)
        results = await node.commit(
            stage, durable=offer.durability == pb.DURABILITY_DISK, retain=requests.retention(offer)
        )
    finally:
        node.abort(stage)
    await context.write(wire.results(results))


async def _fill(stage: Stage, objects: int, context: Context, idle: IdleLimit, metrics: StreamMetrics) -> None:
    copying: asyncio.Future[None] | None = None
    loop = asyncio.get_running_loop()
    while (piece := requests.put_piece(await _receive(context), objects)) is not None:
        index, offset, data = piece
        if copying is not None:
            await copying  # so that no more than two pieces are held
            copying = None
        if len(data) <= COPIED_HERE_BYTES_MAX:
            stage.write(index, offset, data)
        else:
            copying = loop.run_in_executor(None, _copy, stage.room(index, offset, len(data)), data)
        metrics.put_bytes.inc(len(data))
        idle.progress()
    if copying is not None:
        await copying


def _copy(room: memoryview, data: memoryview | bytes) -> None:
    """Lets other threads run meanwhile, which an assignment to a memoryview does not."""
    np.copyto(np.frombuffer(room, np.uint8), np.frombuffer(data, np.uint8))


async def _receive(context: Context) -> Framed[pb.PutRequest]:
    message = await context.read()
    if message is grpc.aio.EOF:  # type: ignore[attr-defined]
        raise InvalidRequest("the put ended before its commit")
    framed: Framed[pb.PutRequest] = message
    return framed
