"""Receiving a raw object straight into the caller's array: its payload is the planes' bytes, so nothing needs decoding.

destination = raw_destination(head, layout, out)        # head: the object's header and segment table
for buffer in destination.buffers(first, last):         # where bytes [first, last) of the payload belong
    ...                                                 # socket.recv_into(buffer)
destination.verify(received)                            # segments that are complete, while they are in a cache
destination.verify()                                    # DamagedObject: then `out` does not hold the object's KV
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from numpy.lib.stride_tricks import as_strided

from kvstore_codec import _native, arrays, container, raw
from kvstore_codec.api import check_header
from kvstore_codec.arrays import Bits, KVArray, PagedPlane, Plane
from kvstore_codec.container import Buffer, CodecId, ObjectHeader, Structure
from kvstore_codec.errors import DamagedObject, ErrorCode, LayoutError
from kvstore_codec.layout import KVLayout

#: Shorter runs of memory (on average) are not worth a buffer each: such an object is better received whole and decoded.
RUN_BYTES_MIN = 4096


def raw_destination(
    head: Buffer, layout: KVLayout, out: KVArray, *, chunk_hash: bytes | None = None, part: int | None = None
) -> RawDestination | None:
    """Where the payload of the object with this head goes in `out`; None if it is better received whole and decoded: it
    is not raw, or `out`'s memory lies in small pieces.

    `head`: at least the object's header and segment table (`header.table_end` bytes). `out`, `chunk_hash`, `part`: as
    `decode` takes them. Raises DamagedObject, UnsupportedObject (header or table), ForeignObject (not the object asked
    for), LayoutError (`out` does not fit).
    """
    header = container.parse_header(head)
    check_header(header, layout, chunk_hash=chunk_hash, part=part)
    if header.codec is not CodecId.RAW:
        return None
    part_layout = layout.part_layout(header.part)
    places = arrays.places_to_write(out, part_layout)
    if arrays.tokens_of(places) != header.tokens:
        raise LayoutError("out has another number of tokens", got=arrays.tokens_of(places), expected=header.tokens)
    table, structure = container.read_table(memoryview(head), header)
    lengths = memoryview(table).cast("Q")[1::3].tolist()
    if sum(lengths) != header.raw_bytes or header.object_bytes != header.table_end + header.raw_bytes:
        raise DamagedObject("a raw segment has the wrong length", code=ErrorCode.STRUCTURE)
    order = _payload_order(structure)
    runs = _runs_of_planes(places, order) if isinstance(places, list) else _runs_of_array(places, order)
    if runs is None or (len(runs) > 1 and header.raw_bytes < RUN_BYTES_MIN * len(runs)):
        return None
    return RawDestination(header, table, structure, runs, raw.native_planes(places, part_layout))


class RawDestination:
    """What `raw_destination` made. `header`: the object's. The object's bytes after `header.table_end` are the payload,
    `payload_bytes` of them."""

    def __init__(
        self, header: ObjectHeader, table: bytes, structure: Structure, runs: Sequence[memoryview],
        native: _native.RawPlanes,
    ) -> None:  # fmt: skip
        self.header = header
        self.payload_bytes = header.raw_bytes
        self._table: Any = table  # any buffer will do, which the stub cannot say
        self._structure, self._runs, self._native = structure, runs, native
        self._starts = list(accumulate(map(len, runs), initial=0))
        self._segment_ends = list(accumulate(memoryview(table).cast("Q")[1::3].tolist()))
        self._verified = 0

    @property
    def pieces(self) -> list[tuple[int, memoryview]]:
        """(offset in the payload, writable bytes) of every run of memory, in the payload's order."""
        return list(zip(self._starts, self._runs, strict=False))

    def buffers(self, first: int, last: int) -> list[memoryview]:
        """Writable bytes for [first, last) of the payload, in order. Raises ValueError outside of it."""
        if not 0 <= first <= last <= self.payload_bytes:
            raise ValueError(f"the payload has {self.payload_bytes} bytes: there are no [{first}, {last})")
        found: list[memoryview] = []
        index = bisect_right(self._starts, first) - 1
        while first < last:
            found.append(self._runs[index][first - self._starts[index] : last - self._starts[index]])
            first = self._starts[index + 1]
            index += 1
        return found

    def verify(self, received: int | None = None) -> None:
        """Compares the checksums, of what is in the array now, of each segment that the first `received` bytes of the
        payload complete (None: all) and that was not compared before. Raises DamagedObject."""
        complete = len(self._segment_ends) if received is None else bisect_right(self._segment_ends, received)
        if complete > self._verified:
            raw.check(*self._native.check(self._table, self._verified, complete), self._structure)
            self._verified = complete

    @property
    def verified(self) -> bool:
        """Whether every segment was compared, and is intact."""
        return self._verified == len(self._segment_ends)


def _payload_order(structure: Structure) -> list[int]:
    """Positions in K₀, V₀, K₁, V₁, … of the planes as the payload has them."""
    return [
        2 * layer + side
        for _, kv, first, count in structure
        for layer in range(first, first + count)
        for side in (0, 1)
        if kv >> side & 1
    ]


def _runs_of_array(whole: Bits, order: list[int]) -> list[memoryview] | None:
    """The planes' bytes as they lie in memory, those that follow one another as one; None where a plane's do not."""
    layer_stride, side_stride = whole.strides[:2]
    if not whole[0, 0].flags.c_contiguous or min(layer_stride, side_stride) < 0:
        return None
    plane_bytes = int(whole[0, 0].nbytes)
    elements = ((len(whole) - 1) * layer_stride + side_stride + plane_bytes) // whole.itemsize
    span = as_strided(whole, (elements,), (whole.itemsize,)).data.cast("B")
    runs: list[tuple[int, int]] = []
    for index in order:
        first = index // 2 * layer_stride + index % 2 * side_stride
        if runs and runs[-1][1] == first:
            runs[-1] = runs[-1][0], first + plane_bytes
        else:
            runs.append((first, first + plane_bytes))
    return [span[first:last] for first, last in runs]


def _runs_of_planes(planes: list[Plane], order: list[int]) -> list[memoryview] | None:
    """The same of planes that lie apart, token by token; None where the pieces are small."""
    runs: list[memoryview] = []
    for plane in (planes[index] for index in order):
        parts: Sequence[Bits]
        if isinstance(plane, PagedPlane):
            parts = [plane.pages[page, first:last] for page, first, last in plane.pieces]
        else:
            parts = [plane] if plane.flags.c_contiguous else list(plane)
        if plane.nbytes == 0:
            continue
        if not parts[0].flags.c_contiguous or (len(parts) > 1 and plane.nbytes < RUN_BYTES_MIN * len(parts)):
            return None
        runs += [part.data.cast("B") for part in parts]
    return runs
