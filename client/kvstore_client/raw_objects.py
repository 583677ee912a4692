"""The raw objects of a get, checked and copied into their places: many in one native call, or in pieces as they come.

A piece is small enough to be in the processor's caches still when it is copied, and meanwhile the next arrives.
Nothing that a node sends is trusted, as in `fetching.py`: what is none of the objects that the codec reads this way
(kvstore_codec.raw_chunks) is left for the general one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore_client.coder import DeadlineCoder
from kvstore_client.connection import Node
from kvstore_client.deadline import Deadline
from kvstore_client.errors import KvClientError, from_codec
from kvstore_client.fetching import Fetched
from kvstore_client.pace import Timing
from kvstore_client.transports.blob import Blob
from kvstore_client.transports.bulk_connection import BulkConnection
from kvstore_client.transports.wanted import Wanted
from kvstore_codec import KVArray, ObjectError, Quality
from kvstore_codec.raw_chunks import RawChunks

#: Received at once.
PIECE_BYTES = 512 << 10
#: Copied between two looks at the clock.
BATCH_BYTES = 4 << 20


class Arrived(NamedTuple):
    """An object, received and copied; `error`: what was wrong with it. Or, where that cannot be done here, only begun:
    `left` are its first bytes, the rest is still to be received. `copying_s`: seconds that it waited for us."""

    left: memoryview
    error: KvClientError | None
    copying_s: float


class RawObjects:
    """Of the chunks of `wanted`, into `into`, which starts with the first of them. `coder`: says when to stop.
    `decode`: the general way. Raises LayoutError where `into` does not fit."""

    def __init__(
        self, node: Node, wanted: Wanted, into: KVArray, timing: Timing, coder: DeadlineCoder,
        decode: Callable[[int, Blob], None],
    ) -> None:  # fmt: skip
        self._node, self._wanted, self._timing, self._coder, self._decode = node, wanted, timing, coder, decode
        first = wanted.chunks[0].first_token
        self._chunks = RawChunks(into, wanted.layout, wanted.part, wanted.min_quality, first)
        self._token_elements = wanted.layout.part_layout(wanted.part).elements_per_token
        self._buffer: npt.NDArray[np.uint8] | None = None
        self._piece = memoryview(b"")

    def close(self) -> None:
        if self._buffer is not None:
            self._node.bulk.buffers.give_back(self._buffer)
            self._buffer = None

    def are(self, index: int, size: int) -> bool:
        """Whether an object of so many bytes, of chunk `index`, is one for `receive`."""
        chunk = self._wanted.chunks[index]
        return chunk.quality is Quality.RAW and size == self._chunks.object_bytes(chunk.tokens)

    def receive(self, connection: BulkConnection, index: int, size: int, deadline: Deadline) -> Arrived:
        """The object of chunk `index`, which is to come now. Raises what ends the connection."""
        if self._buffer is None:
            # What is left over of a piece, less than the least that can be taken, stays before the next.
            self._buffer, self._piece = self._node.bulk.buffers.take(PIECE_BYTES + self._chunks.piece_bytes_min)
        chunk, piece = self._wanted.chunks[index], self._piece
        reader = self._chunks.reader(chunk)
        error: KvClientError | None = None
        copying_s, here, to_come = 0.0, 0, size
        while to_come:
            more = min(PIECE_BYTES, to_come)
            connection.receive_into(piece[here : here + more], deadline, self._timing.received)
            here, to_come = here + more, to_come - more
            began = time.perf_counter()
            try:
                taken = reader.take(piece[:here])
            except ObjectError as damage:
                error = from_codec(damage, self._node.address)
                break
            copying_s += time.perf_counter() - began
            if reader.other:
                return Arrived(piece[:here], None, copying_s)
            piece[: here - taken] = piece[taken:here]
            here -= taken
        while to_come:  # let pass
            more = min(PIECE_BYTES, to_come)
            connection.receive_into(piece[:more], deadline, self._timing.received)
            to_come -= more
        if error is None:
            assert reader.done, "it has the length of one"
            self._timing.copied(chunk.tokens * self._token_elements, copying_s)
        return Arrived(piece[:0], error, copying_s)

    def copy(self, first: int, blobs: Sequence[Blob]) -> Fetched:
        """Of the objects from chunk `first` on: how many came out well, up to the first that did not. Any thread may
        call it."""
        done = 0
        try:
            while done < len(blobs):
                self._coder.check()
                some = done + _count(blobs[done:], BATCH_BYTES)
                done += self._copied(first + done, blobs[done:some])
                if done < some:
                    self._decode(first + done, blobs[done])
                    done += 1
        except KvClientError as error:
            return Fetched(done, error)
        return Fetched(done)

    def _copied(self, first: int, blobs: Sequence[Blob]) -> int:
        chunks = self._wanted.chunks[first : first + len(blobs)]
        began = time.perf_counter()
        done = self._chunks.read([blob.data for blob in blobs], chunks)
        if done:
            tokens = sum(chunk.tokens for chunk in chunks[:done])
            self._timing.copied(tokens * self._token_elements, time.perf_counter() - began)
        return done


def _count(blobs: Sequence[Blob], bytes_max: int) -> int:
    """How many of the first have so many bytes together; at least one."""
    total = 0
    for count, blob in enumerate(blobs):
        total += len(blob.data)
        if count and total > bytes_max:
            return count
    return len(blobs)
