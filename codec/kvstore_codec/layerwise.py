"""One chunk as one object a layer, and those objects as the chunk's own.

A chunk's object has its segment table, and so its header, in front of everything: it cannot be begun before its last
layer is computed. What travels while a prompt is still being computed are objects of one layer each: ordinary objects
of the same layout cut into parts by layers (`layout_by_layers`), so identity, checksums and qualities are the format's
own. Their segments are coded as they would be in the chunk's object, so `join_layers` makes that without coding again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvstore_codec import container
from kvstore_codec.api import check_header, storable_quality
from kvstore_codec.container import Buffer, CodecId, Flags, NewSegment, ObjectHeader, ObjectInfo
from kvstore_codec.errors import DamagedObject, ErrorCode, LayoutError
from kvstore_codec.layout import KVLayout, Partition
from kvstore_codec.quality import Quality


def layout_by_layers(layout: KVLayout) -> KVLayout:
    """`layout` with a part for each (layer, head group): what objects of one layer are encoded and decoded with."""
    return replace(layout, partition=Partition(layout.num_layers, layout.partition.head_groups))


def layer_part(layout: KVLayout, part: int, layer: int) -> int:
    """Which part of `layout_by_layers(layout)` is layer `layer` of part `part` of `layout`. Raises LayoutError."""
    layers = layout.num_layers // layout.partition.layer_groups
    if not 0 <= part < layout.partition.parts or not 0 <= layer < layers:
        raise LayoutError("no such layer of no such part", part=part, layer=layer, layers=layers)
    layer_group, head_group = divmod(part, layout.partition.head_groups)
    return (layer_group * layers + layer) * layout.partition.head_groups + head_group


def join_layers(objects: Sequence[Buffer], layout: KVLayout, part: int = 0) -> bytes:
    """The object of one chunk, from the objects of its layers in their order. It decodes to the same values.

    It is the object that `encode` makes where that gives each layer segments of its own; where `encode` joins layers
    in one segment, as in small pages, this one has more of them (128 bytes a layer).

    Raises ObjectError (what `verify` and `check_header` raise; DamagedObject for layers that are not one chunk's),
    LayoutError (not one object a layer).
    """
    part_layout = layout.part_layout(part)
    if len(objects) != part_layout.num_layers:
        raise LayoutError("one object a layer is needed", got=len(objects), expected=part_layout.num_layers)
    by_layers = layout_by_layers(layout)
    infos = [container.verify(blob) for blob in objects]
    first = infos[0].header
    for layer, info in enumerate(infos):
        check_header(info.header, by_layers, chunk_hash=first.chunk_hash, part=layer_part(layout, part, layer))
        same = (info.header.tokens, info.header.first_position) == (first.tokens, first.first_position)
        if not same or info.quality != info.header.quality or info.header.codec is CodecId.PROFILE:
            raise DamagedObject("the layers are not whole objects of one chunk", code=ErrorCode.STRUCTURE, layer=layer)
    # A layer of recurrent state is exact, so the others say what the whole is.
    quality = storable_quality(part_layout, max(info.header.quality for info in infos))
    if any(storable_quality(by_layers.part_layout(info.header.part), quality) != info.quality for info in infos):
        raise DamagedObject("the layers are of different qualities", code=ErrorCode.STRUCTURE)
    header = ObjectHeader(
        namespace_id=layout.namespace_id, chunk_hash=first.chunk_hash, part=part, tokens=first.tokens,
        first_position=first.first_position, codec=_CODECS.get(quality, CodecId.CF), dtype=layout.dtype,
        quality=quality, provenance=max(info.header.provenance for info in infos),
        flags=Flags.TAIL if first.tail else Flags(0), layers=part_layout.num_layers,
        raw_bytes=first.tokens * part_layout.bytes_per_token,
    )  # fmt: skip
    return container.pack(_segments(objects, infos, max(1, quality.lossy_layers)), header)


_CODECS = {Quality.RAW: CodecId.RAW, Quality.LOSSLESS: CodecId.LOSSLESS}


def _segments(objects: Sequence[Buffer], infos: Sequence[ObjectInfo], levels: int) -> list[NewSegment]:
    """Quality-major, as the format wants them; exact state has nothing to refine."""
    segments: list[NewSegment] = []
    for level in range(levels):
        for layer, (blob, info) in enumerate(zip(objects, infos, strict=True)):
            view = memoryview(blob)
            exact = not info.header.codec.lossy
            for segment in info.segments:
                if segment.quality_layer == (0 if exact else level):
                    payload = view[segment.offset : segment.offset + segment.length]
                    held = payload if level == 0 or not exact else b""
                    segments.append(NewSegment(level, segment.kv, layer, 1, held))
    return segments
