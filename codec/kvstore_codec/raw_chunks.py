"""The raw objects of a prompt's chunks, read into one array: many in one native call, or one in pieces as it comes.

Read here is only what begins byte by byte as `encode`'s own object of the chunk does, but for its checksums, which are
compared, and its provenance. Of anything else, and of what is damaged, `decode` says what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

from kvstore_codec import _native, arrays, container, raw
from kvstore_codec.arrays import KVArray
from kvstore_codec.container import CodecId, Flags, ObjectHeader
from kvstore_codec.layout import KVLayout
from kvstore_codec.quality import Quality
from kvstore_codec.segments import segment_groups

#: of RawChunkReader::State (codec/native/raw_chunks.hpp)
_DONE, _OTHER, _DAMAGED = 1, 2, 3


class Chunk(Protocol):
    """A chunk of a prompt: its hash, the position of its first token, its tokens."""

    @property
    def hash(self) -> bytes: ...
    @property
    def first_token(self) -> int: ...
    @property
    def tokens(self) -> int: ...


class RawChunks:
    """Room for chunks one behind the other in `out`, whose first token is at `first_position` of the prompt. `layout`,
    `part`, `out`: as of `decode`. `floor`: the worst provenance that is read. Different chunks may be read by different
    threads.

    Raises LayoutError (`out` does not fit)."""

    def __init__(self, out: KVArray, layout: KVLayout, part: int, floor: Quality, first_position: int) -> None:
        self._layout, self._part, self._part_layout = layout, part, layout.part_layout(part)
        self._first = first_position
        places = arrays.places_to_write(out, self._part_layout)
        self._native = _native.RawChunks(places, self._part_layout.itemsize, int(floor), raw.BEST)

    @property
    def piece_bytes_min(self) -> int:
        """So many bytes hold a row of an object's payload, or all that is before it."""
        return max(self._part_layout.bytes_per_token, len(_head(self._layout, self._part, self._layout.chunk_tokens)))

    def read(self, blobs: Sequence[memoryview], chunks: Sequence[Chunk]) -> int:
        """How many of the first objects are in their places, as those chunks. Of the next one, what is in its place is
        unspecified."""
        objects: Any = [(blob, self._argument(chunk)) for blob, chunk in zip(blobs, chunks, strict=True)]
        return self._native.read(objects)

    def object_bytes(self, tokens: int) -> int:
        """Of each object of so many tokens that is read here."""
        return len(_head(self._layout, self._part, tokens)) + tokens * self._part_layout.bytes_per_token

    def reader(self, chunk: Chunk) -> RawChunkReader:
        """Of an object of `object_bytes` bytes."""
        native = _native.RawChunkReader(self._native, self._argument(chunk))
        return RawChunkReader(native, self._part_layout, chunk.tokens)

    def _argument(self, chunk: Chunk) -> tuple[bytes, bytes, int, int, int]:
        first, tokens = chunk.first_token, chunk.tokens
        return _head(self._layout, self._part, tokens), chunk.hash, first, first - self._first, tokens


class RawChunkReader:
    """One object on its way. Made by RawChunks."""

    def __init__(self, native: _native.RawChunkReader, layout: KVLayout, tokens: int) -> None:
        self._native, self._layout, self._tokens = native, layout, tokens

    @property
    def done(self) -> bool:
        """Whether the whole object is there and intact."""
        return self._native.state == _DONE

    @property
    def other(self) -> bool:
        """Whether it begins as no object of the chunk that is read here. None of it was taken."""
        return self._native.state == _OTHER

    def take(self, data: memoryview) -> int:
        """Checks and copies as much as it can of what comes next: how many bytes. What is left over is to come again,
        with what is behind it. Raises DamagedObject: what is in the chunk's place is then unspecified."""
        buffer: Any = data  # any buffer will do, which the stub cannot say
        taken = self._native.take(buffer)
        if self._native.state == _DAMAGED:
            raise container.wrong_checksum(
                0, segment_groups(self._layout, self._tokens)[self._native.segment].layer_first
            )  # fmt: skip
        return taken


@lru_cache(64)
def _head(layout: KVLayout, part: int, tokens: int) -> bytes:
    """Header and segment table of a raw object, with no checksums of segments, of any chunk and position."""
    part_layout = layout.part_layout(part)
    table, payload_bytes = raw.table_of(part_layout, tokens)
    header = ObjectHeader(
        namespace_id=layout.namespace_id, chunk_hash=bytes(32), part=part, tokens=tokens, first_position=0,
        codec=CodecId.RAW, dtype=layout.dtype, quality=Quality.RAW, provenance=Quality.RAW,
        flags=Flags.TAIL if tokens < layout.chunk_tokens else Flags(0), layers=part_layout.num_layers,
        raw_bytes=payload_bytes,
    )  # fmt: skip
    return container.header_bytes(header, [container.HEADER_BYTES + len(table) + payload_bytes], table) + table
