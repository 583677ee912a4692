"""Put: offer → verdicts → pieces of the wanted objects → commit → results.

The stage that an offer opens is aborted on every way out but a finished commit: end of stream, cancellation,
deadline, a piece out of place, or a sender that sends nothing for the idle limit. Abort after commit is a no-op.

While the next piece is received, a thread copies the last: into fresh memory a MiB takes most of a millisecond, in
which the event loop answers lookups. It is checked there as well, while it is in that thread's caches.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np

from kvstore.engine.commit import Arrival
from kvstore.engine.node import Node, Offer, Stage
from kvstore.engine.stage import Checked
from kvstore.errors import InvalidRequest
from kvstore.service import requests, wire
from kvstore.service.idle import IdleLimit
from kvstore.service.streams import StreamMetrics
from kvstore_codec import Quality
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import Framed

Context = grpc.aio.ServicerContext[Any, Any]
TAKEN_HERE_BYTES_MAX = 64 << 10  # a smaller object is copied and checked sooner than a thread is asked to


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
    copying: asyncio.Future[Checked | None] | None = None
    arrivals: dict[int, Arrival] = {}
    index, loop = 0, asyncio.get_running_loop()
    try:
        while True:
            piece = requests.put_piece(await _receive(context), objects)
            if copying is not None:
                _note(stage, index, await copying, arrivals)  # so that no more than two pieces are held
                copying = None
            if piece is None:
                return
            index, offset, data = piece
            end = offset + len(data)
            if stage.offers[index].object_bytes <= TAKEN_HERE_BYTES_MAX:
                stage.write(index, offset, data)
                _note(stage, index, _arrival(stage, index, arrivals).to(end), arrivals)
            else:
                copying = loop.run_in_executor(
                    None, _copy, stage.room(index, offset, len(data)), data, _arrival(stage, index, arrivals), end
                )
            metrics.put_bytes.inc(len(data))
            idle.progress()
    finally:
        arrivals.clear()  # an error keeps this frame, and memory that somebody sees is not free


def _arrival(stage: Stage, index: int, arrivals: dict[int, Arrival]) -> Arrival:
    if index not in arrivals:
        arrivals[index] = Arrival(stage.buffer(index), stage, stage.offers[index])
    return arrivals[index]


def _copy(room: memoryview, data: memoryview | bytes, arrival: Arrival, end: int) -> Checked | None:
    """Lets other threads run meanwhile, which an assignment to a memoryview does not."""
    np.copyto(np.frombuffer(room, np.uint8), np.frombuffer(data, np.uint8))
    return arrival.to(end)


def _note(stage: Stage, index: int, checked: Checked | None, arrivals: dict[int, Arrival]) -> None:
    """Of an object that may have come whole."""
    if checked is not None:
        stage.arrived(index, checked)
        del arrivals[index]


async def _receive(context: Context) -> Framed[pb.PutRequest]:
    message = await context.read()
    if message is grpc.aio.EOF:  # type: ignore[attr-defined]
        raise InvalidRequest("the put ended before its commit")
    framed: Framed[pb.PutRequest] = message
    return framed
