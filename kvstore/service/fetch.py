"""Fetch: stored objects as one ordered stream of pieces, paced by the reader.

`context.write` returns when the transport took the piece, so a slow reader holds little here: the object on its way and
the next, which is read from its tier meanwhile; of what memory holds, two batches. A chunk that is not there ends the
stream: what follows it could not be used as a prefix.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc

from kvstore.engine.node import Node
from kvstore.service import requests
from kvstore.service.chain import ChainReader
from kvstore.service.idle import IdleLimit
from kvstore.service.streams import StreamMetrics
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import DATA_BYTES_MAX, Framed

BATCH_BYTES = 4 << 20  # read at once, of what memory holds
#: A stream begins with a piece of this size, and each next one is twice as large: a reader sees bytes by the piece,
#: and may have to know soon how fast they come (docs/design/0034).
FIRST_PIECE_BYTES = 1 << 16
Context = grpc.aio.ServicerContext[Any, Any]


async def fetch(
    node: Node, request: pb.FetchRequest, context: Context, *, stream_idle_s: float, metrics: StreamMetrics
) -> None:
    """Raises InvalidRequest, StreamStalled (the reader took nothing for `stream_idle_s`), and the node's errors."""
    chain = ChainReader(node, *requests.fetch(request), BATCH_BYTES, 1, requests.held_bytes(request))
    batch, index = chain.at_once(), 0
    upcoming: asyncio.Future[list[memoryview]] | None = None
    try:
        while batch or not chain.is_read:
            upcoming = None if chain.is_read else asyncio.ensure_future(chain.batch())
            for stored in batch:
                await _send(context, index, stored, stream_idle_s, metrics)
                index += 1
            batch = [] if upcoming is None else await upcoming
            if not batch:
                break
    finally:
        if upcoming is not None:
            upcoming.cancel()
            await asyncio.wait([upcoming])
        await chain.aclose()


async def _send(context: Context, index: int, stored: memoryview, stream_idle_s: float, metrics: StreamMetrics) -> None:
    with IdleLimit(stream_idle_s) as idle:
        for offset, data in _pieces(stored, FIRST_PIECE_BYTES if index == 0 else DATA_BYTES_MAX):
            object_bytes = len(stored) if offset == 0 else 0
            head = pb.FetchResponse(chunk_index=index, object_bytes=object_bytes, offset=offset)
            await context.write(Framed(head, data))
            idle.progress()
            metrics.fetched_bytes.inc(len(data))


def _pieces(stored: memoryview, size: int) -> Iterator[tuple[int, memoryview]]:
    """(offset, piece): the first of `size` bytes, larger ones behind it; what is hardly larger in one."""
    offset, size = 0, size if len(stored) > 4 * size else DATA_BYTES_MAX
    while offset < len(stored):
        yield offset, stored[offset : offset + size]
        offset, size = offset + size, min(2 * size, DATA_BYTES_MAX)
