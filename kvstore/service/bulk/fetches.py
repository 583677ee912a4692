"""FETCH and GET of a bulk connection: what is stored of a chain, as objects on the socket or as places in memory.

The event loop says what there is, a batch at a time; while one batch is on its way, the next is read. What memory holds
is one batch for little more than one object.
"""

from __future__ import annotations

import concurrent.futures
import math
from collections.abc import Coroutine, Iterator
from typing import Any, Protocol, TypeVar

from kvstore.engine.node import LookupResult, Node
from kvstore.service import requests, wire
from kvstore.service.chain import ChainReader
from kvstore.service.streams import StreamMetrics
from kvstore_codec import Quality
from kvstore_proto.v1 import transfer_pb2
from kvstore_proto.v1.bulk import Kind, frame, header
from kvstore_proto.v1.bulk_socket import BulkSocket

#: What is read ahead of the socket: two of these at most are held, of objects that are sent.
BATCH_BYTES = 16 << 20
R = TypeVar("R")


class OnLoop(Protocol):
    """Starts a coroutine on the event loop of the node, from another thread. Raises ConnectionEnded where it has
    stopped."""

    def __call__(self, coroutine: Coroutine[Any, Any, R], /) -> concurrent.futures.Future[R]: ...


class Fetches:
    """Answers those of one connection. All raise InvalidRequest, DecodeError, ConnectionEnded, NoProgress."""

    def __init__(self, node: Node, socket: BulkSocket, start: OnLoop, metrics: StreamMetrics) -> None:
        self._node, self._socket, self._start, self._metrics = node, socket, start, metrics

    def fetch(self, asked: transfer_pb2.BulkFetch, *, places: bool) -> list[memoryview]:
        """The objects whose places were told: to be held until the client releases them. `places`: they may be."""
        chain = ChainReader(
            self._node, *requests.fetch(asked.request), _batch_bytes(places), BATCH_BYTES,
            requests.held_bytes(asked.request),
        )  # fmt: skip
        return self._answer(chain, [], b"", places)

    def get(self, asked: transfer_pb2.BulkGet, *, places: bool) -> list[memoryview]:
        """As `fetch`."""
        lookup = requests.lookup(asked.lookup)
        chain = ChainReader(
            self._node, lookup.keys(), requests.quality(asked.quality), lookup.first_chunk,
            _batch_bytes(places), BATCH_BYTES,
        )  # fmt: skip
        found, batch = self._start(_found(chain, lookup, requests.quality(asked.min_quality))).result()
        try:
            answer = frame(Kind.FOUND, 0, wire.lookup_response(found).SerializeToString())
            return self._answer(chain, batch, answer, places)
        finally:
            if found.lease_id:
                self._start(_let_go(self._node, found.lease_id))

    def _answer(self, chain: ChainReader, batch: list[memoryview], before: bytes, places: bool) -> list[memoryview]:
        held: list[memoryview] = []
        outgoing: list[bytes | memoryview] = [before]
        index = 0
        upcoming: concurrent.futures.Future[list[memoryview]] | None = None
        try:
            while True:
                upcoming = None if chain.is_read else self._start(chain.batch())
                outgoing += self._frames(index, batch, held if places else None)
                index += len(batch)
                self._metrics.fetched_bytes.inc(sum(map(len, batch)))
                if upcoming is None:
                    break
                self._socket.send_buffers(outgoing)
                batch, outgoing = upcoming.result(), []
                if not batch:
                    break
            self._socket.send_buffers([*outgoing, frame(Kind.END)])
        finally:
            if upcoming is not None:
                upcoming.cancel()
                concurrent.futures.wait([upcoming])
            if chain.slow is not None:
                self._start(chain.aclose()).result()
        return held

    def _frames(
        self, index: int, batch: list[memoryview], held: list[memoryview] | None
    ) -> Iterator[bytes | memoryview]:
        """Of the objects from `index` on; those that places are told of are added to `held`, if it is given."""
        placed = transfer_pb2.Places()
        for at, stored in enumerate(batch, index):
            offset = self._node.place_of(stored) if held is not None else None
            if offset is not None and held is not None:
                placed.offset.append(offset)
                placed.object_bytes.append(len(stored))
                held.append(stored)
                continue
            yield from _told(placed, at)
            yield header(Kind.OBJECT, at, len(stored))
            yield stored
        yield from _told(placed, index + len(batch))


def _told(placed: transfer_pb2.Places, end: int) -> Iterator[bytes]:
    """The frame of places up to object `end`, if there are any; they are forgotten then."""
    if placed.offset:
        yield frame(Kind.PLACES, end - len(placed.offset), placed.SerializeToString())
        placed.Clear()


def _batch_bytes(places: bool) -> float:
    """Of what is in memory: telling where takes none."""
    return math.inf if places else BATCH_BYTES


async def _found(chain: ChainReader, lookup: requests.Lookup, floor: Quality) -> tuple[LookupResult, list[memoryview]]:
    """What there is, and what memory holds of it, about a batch. The chain ends before what is worse than `floor`."""
    found = await chain.node.find(*lookup)
    effective = map(max, found.qualities, found.provenances)
    good = next((at for at, quality in enumerate(effective) if quality > floor), len(found))
    chain.keys = chain.keys[:good]
    return found, chain.at_once()


async def _let_go(node: Node, lease_id: bytes) -> None:
    node.renew(lease_id, 0)
