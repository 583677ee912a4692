"""Live writes: KV that a writer sends layer by layer, handed on to whoever follows while it arrives.

A write's pieces are kept, once, until its writer's stream ends: who joins late gets everything, who reads slowly holds
up nobody. A reader keeps what it still reads after that. Nothing is stored here: the writer puts the same KV as
ordinary objects before it ends, so a reader that comes after finds those. Bytes are counted against the room of puts
in flight; nobody but their reader looks into them, who checks everything.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

from kvstore.errors import InvalidRequest, TierFull
from kvstore.index.entry import ObjectKey
from kvstore.metrics import NodeMetrics
from kvstore_codec import Quality

#: What a piece costs beyond its data, and an open write beyond its hashes: many tiny ones must not be free.
PIECE_BYTES, HASH_BYTES = 512, 32


@dataclass(frozen=True)
class LiveOpening:
    """What a writer is going to send: `layers` layers of consecutive chunks of one prefix."""

    namespace_id: bytes
    part: int
    hashes: Sequence[bytes]
    layers: int
    quality: Quality
    provenance: Quality


@dataclass(frozen=True)
class Asked:
    """What a reader wants: a prompt, of which it knows the first `stored_chunks` to be stored, at `floor` or better."""

    namespace_id: bytes
    part: int
    hashes: Sequence[bytes]
    stored_chunks: int
    floor: Quality


class Piece(NamedTuple):
    """Bytes [offset, offset + len(data)) of a layer; its first piece carries `object_bytes`, of each chunk's object."""

    layer: int
    offset: int
    object_bytes: Sequence[int]
    data: memoryview | bytes


class LiveWrite:
    """One writer's KV so far. Made by `LiveWrites.open`, ended by `LiveWrites.close`."""

    def __init__(self, opening: LiveOpening, reserve: Callable[[int], None], release: Callable[[int], None]) -> None:
        self.opening = opening
        self.closed = False
        self._reserve, self._release = reserve, release
        self._pieces: list[Piece] = []
        self._layer, self._received, self._expected = -1, 0, 0
        self._reserved_bytes, self._holders = 0, 1  # its writer
        self._changed = asyncio.Event()
        self._take(len(opening.hashes) * HASH_BYTES + PIECE_BYTES)

    def add(self, piece: Piece) -> None:
        """The next piece. Raises InvalidRequest (out of order, too long), TierFull (too much in flight)."""
        if self._received == self._expected:
            self._begin(piece)
        elif piece.object_bytes:
            raise InvalidRequest("object_bytes come with a layer's first piece", layer=piece.layer)
        if (piece.layer, piece.offset) != (self._layer, self._received):
            raise InvalidRequest(
                "a piece of a layer out of order", layer=piece.layer, offset=piece.offset,
                expected_layer=self._layer, expected=self._received,
            )  # fmt: skip
        if self._received + len(piece.data) > self._expected:
            raise InvalidRequest("a layer is longer than was declared", layer=piece.layer, declared=self._expected)
        self._take(len(piece.data) + PIECE_BYTES)
        self._received += len(piece.data)
        self._pieces.append(piece)
        self._wake()

    @property
    def complete(self) -> bool:
        """All layers have come."""
        return self._layer + 1 == self.opening.layers and self._received == self._expected

    @contextmanager
    def kept(self) -> Iterator[None]:
        """For a reader, inside: what has come stays, also when the writer is gone."""
        self._holders += 1
        try:
            yield
        finally:
            self._let_go()

    async def follow(self, chunks: int) -> AsyncGenerator[Piece, None]:
        """The pieces of the first `chunks` chunks, from the first layer on, as they come; ends with the last
        layer, or the write. To be read inside `kept`."""
        left = at = 0
        while True:
            while at < len(self._pieces):
                piece = self._pieces[at]
                at += 1
                object_bytes = piece.object_bytes[:chunks]
                left += sum(object_bytes)
                data = piece.data[:left]
                left -= len(data)
                if len(data):
                    yield piece._replace(object_bytes=object_bytes, data=data)
            if self.complete or self.closed:
                return
            await self._changed.wait()

    def close(self) -> None:
        """Its writer is gone. Idempotent."""
        if not self.closed:
            self.closed = True
            self._wake()
            self._let_go()

    def _begin(self, piece: Piece) -> None:
        if self._layer + 1 == self.opening.layers:
            raise InvalidRequest("a layer beyond the last", layer=piece.layer, layers=self.opening.layers)
        if len(piece.object_bytes) != len(self.opening.hashes) or not all(piece.object_bytes):
            raise InvalidRequest("a layer's first piece says how long each chunk's object is", layer=piece.layer)
        self._layer, self._received, self._expected = self._layer + 1, 0, sum(piece.object_bytes)

    def _take(self, size: int) -> None:
        self._reserve(size)
        self._reserved_bytes += size

    def _let_go(self) -> None:
        self._holders -= 1
        if not self._holders:
            self._release(self._reserved_bytes)
            self._reserved_bytes = 0
            self._pieces.clear()

    def _wake(self) -> None:
        waiting, self._changed = self._changed, asyncio.Event()
        waiting.set()


@dataclass(frozen=True)
class Found:
    """A live write of chunks [first_chunk, first_chunk + chunks) of what was asked."""

    write: LiveWrite
    first_chunk: int
    chunks: int

    @property
    def end(self) -> int:
        return self.first_chunk + self.chunks


class LiveWrites:
    """All live writes of a node, and who waits for one. `reserve`: whether there is room for so many bytes."""

    def __init__(
        self, reserve: Callable[[int], bool], release: Callable[[int], None],
        is_stored: Callable[[ObjectKey, Quality], bool], metrics: NodeMetrics,
    ) -> None:  # fmt: skip
        self._reserve, self._release, self._is_stored, self._metrics = reserve, release, is_stored, metrics
        self.held_bytes = 0  # reserved by all of them
        self._by_first: dict[ObjectKey, list[LiveWrite]] = {}
        self._changed = asyncio.Event()
        self._stopped = False

    def __len__(self) -> int:
        return sum(map(len, self._by_first.values()))

    def open(self, opening: LiveOpening) -> LiveWrite:
        """Raises TierFull."""
        write = LiveWrite(opening, self._reserve_or_refuse, self._give_back)
        self._by_first.setdefault(_first_key(opening), []).append(write)
        self.wake()
        return write

    def close(self, write: LiveWrite) -> None:
        """Ends a write: for its readers too, unless it is complete."""
        write.close()
        key = _first_key(write.opening)
        self._by_first[key].remove(write)
        if not self._by_first[key]:
            del self._by_first[key]
        self._metrics.live_writes.labels("complete" if write.complete else "aborted").inc()

    def wake(self) -> None:
        """Something was stored, or begun to be written: those who wait look again."""
        waiting, self._changed = self._changed, asyncio.Event()
        waiting.set()

    def stop_waiting(self) -> None:
        """The node is going away: nobody waits for a writer any more."""
        self._stopped = True
        self.wake()

    async def find(self, asked: Asked, wait_s: float) -> Found | Literal["stored"] | None:
        """A live write that goes on where what the reader has ends; "stored" where the next chunk has been stored
        meanwhile; None where neither is so within `wait_s`."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + wait_s
        while True:
            found = self._look(asked)
            left_s = end_s - loop.time()
            if found is not None or self._stopped or left_s <= 0:
                result = "absent" if found is None else "stored" if found == "stored" else "found"
                self._metrics.live_follows.labels(result).inc()
                return found
            try:
                await asyncio.wait_for(self._changed.wait(), left_s)
            except asyncio.TimeoutError:
                continue  # one last look

    def _look(self, asked: Asked) -> Found | Literal["stored"] | None:
        next_chunk = asked.stored_chunks
        if next_chunk >= len(asked.hashes):
            return None
        if self._is_stored(ObjectKey(asked.namespace_id, asked.hashes[next_chunk], asked.part), asked.floor):
            return "stored"
        candidates = [
            Found(write, first, _common(write.opening.hashes, asked.hashes[first:]))
            for first in range(next_chunk + 1)
            for write in self._by_first.get(ObjectKey(asked.namespace_id, asked.hashes[first], asked.part), ())
            if max(write.opening.quality, write.opening.provenance) <= asked.floor
        ]
        # The one that comes furthest; of several, the one that repeats least of what is stored.
        best = max(candidates, key=lambda found: (found.end, found.first_chunk), default=None)
        return best if best is not None and best.end > next_chunk else None

    def _reserve_or_refuse(self, size: int) -> None:
        if not self._reserve(size):
            self._metrics.live_writes.labels("refused").inc()
            raise TierFull("too much is in flight: a live write has no room", bytes=size)
        self.held_bytes += size

    def _give_back(self, size: int) -> None:
        self.held_bytes -= size
        self._release(size)


def _first_key(opening: LiveOpening) -> ObjectKey:
    return ObjectKey(opening.namespace_id, opening.hashes[0], opening.part)


def _common(mine: Sequence[bytes], theirs: Sequence[bytes]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(mine, theirs, strict=False)))
