"""Raw objects, whose payload is the planes' bytes: copied and checksummed in one native pass, without the GIL."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from kvstore_codec import _native, container
from kvstore_codec.arrays import Places
from kvstore_codec.container import SEGMENT_ENTRY_BYTES, Allocate, ObjectHeader
from kvstore_codec.errors import DamagedObject, ErrorCode
from kvstore_codec.layout import KVLayout
from kvstore_codec.segments import segment_groups

#: by name, the best last; all of them make the same bytes
INSTRUCTION_SETS = {name: number for number, name in _native.instruction_sets()}
BEST = max(INSTRUCTION_SETS.values())

#: of Status (codec/native/core.hpp)
_OK, _CHECKSUM = 0, 14


def encode(
    places: Places, layout: KVLayout, header: ObjectHeader, isa: int = BEST, allocate: Allocate | None = None
) -> bytes | memoryview:  # fmt: skip
    """One object of all planes. `layout`: of the part; `header`: all but its last three fields."""
    table, payload_bytes = table_of(layout, header.tokens)
    head: Any = container.header_bytes(header, [container.HEADER_BYTES + len(table) + payload_bytes], table) + table
    planes, segments = _native_planes(places, layout, isa), len(table) // SEGMENT_ENTRY_BYTES
    if allocate is None:
        return planes.seal(head, segments)
    room = allocate(len(head) + payload_bytes)
    writable: Any = room  # any buffer will do, which the stub cannot say
    planes.seal_into(writable, head, segments)
    return room


def decode(view: memoryview, header: ObjectHeader, places: Places, layout: KVLayout, isa: int = BEST) -> None:
    """Writes the planes of a whole object with this header, each checksum compared on the way; `layout`: of the part.
    Raises DamagedObject: what is in the planes then is unspecified."""
    table, structure = container.read_table(view, header)
    buffers: Any = table, view[header.table_end :]  # any buffers will do, which the stub cannot say
    status, segment = _native_planes(places, layout, isa).write(*buffers)
    if status == _CHECKSUM:
        quality_layer, _, layer, _ = structure[segment]
        raise container.wrong_checksum(quality_layer, layer)
    if status != _OK:
        raise DamagedObject("a raw segment has the wrong length", code=ErrorCode.STRUCTURE)


def _native_planes(places: Places, layout: KVLayout, isa: int = BEST) -> _native.RawPlanes:
    """`places` as the native core takes them; keeps their memory alive."""
    return _native.RawPlanes(places, layout.itemsize, isa)


@lru_cache(256)
def table_of(layout: KVLayout, tokens: int) -> tuple[bytes, int]:
    """The segment table of a chunk of `tokens` tokens, without its checksums, and the payload's bytes."""
    entries: list[bytes] = []
    total = 0
    for group in segment_groups(layout, tokens):
        layers = layout.layers
        channels = sum(
            layers[index // 2].v_channels if index % 2 else layers[index // 2].k_channels
            for index in group.plane_indices
        )
        length = channels * tokens * layout.itemsize
        entries.append(container.table_entry(0, group.kv, group.layer_first, group.layer_count, length, 0))
        total += length
    return b"".join(entries), total
