"""`encode` and `decode`: one chunk of KV to one object and back, at any quality."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvstore_codec import arrays, container
from kvstore_codec.arrays import KVArray, Plane
from kvstore_codec.container import KV, Buffer, CodecId, Flags, NewSegment, ObjectInfo
from kvstore_codec.errors import DamagedObject, ErrorCode, ForeignObject, LayoutError
from kvstore_codec.layout import KVLayout
from kvstore_codec.quality import Quality
from kvstore_codec.segments import SegmentGroup, segment_groups


def encode(
    kv: KVArray, layout: KVLayout, *, quality: str | Quality = "high", first_position: int = 0,
    chunk_hash: bytes = bytes(32), part: int = 0, provenance: str | Quality = "raw",
) -> bytes:  # fmt: skip
    """One object from one chunk of KV.

    `kv`: at most `layout.chunk_tokens` tokens, `[layers, 2, tokens, kv_heads, head_dim]` in the layout's dtype
    (numpy, torch, DLPack; strided views are read in place), or a list of (k, v); keys after RoPE, the first at
    `first_position`. `part`: `kv` is that part's slice of the layout. `provenance`: the lowest quality of the
    cached prefix this chunk was computed on.

    Raises LayoutError (shape, dtype, arguments), ValuesError (NaN or infinities at a lossy quality).
    """
    wanted = Quality.parse(quality)
    part_layout = layout.part_layout(part)
    planes = arrays.planes(kv, part_layout)
    tokens = planes[0].shape[0]
    if not 1 <= tokens <= layout.chunk_tokens:
        raise LayoutError("a chunk has 1 to chunk_tokens tokens", tokens=tokens, chunk_tokens=layout.chunk_tokens)
    if not 0 <= first_position < 1 << 48:
        raise LayoutError("first_position must be in [0, 2**48)", first_position=first_position)
    if len(chunk_hash) != 32:
        raise LayoutError("a chunk hash has 32 bytes", bytes=len(chunk_hash))
    groups = segment_groups(part_layout, tokens)
    codec, segments = _encode_raw(planes, groups)
    return container.pack(
        segments, namespace_id=layout.namespace_id, chunk_hash=chunk_hash, part=part, tokens=tokens,
        first_position=first_position, codec=codec, dtype=layout.dtype, quality=Quality.RAW,
        provenance=Quality.parse(provenance), flags=Flags.TAIL if tokens < layout.chunk_tokens else Flags(0),
        layers=part_layout.num_layers, raw_bytes=tokens * part_layout.bytes_per_token,
    )  # fmt: skip


def decode(
    blob: Buffer, layout: KVLayout, *, quality: str | Quality | None = None, out: KVArray | None = None,
    chunk_hash: bytes | None = None, part: int | None = None,
) -> KVArray:  # fmt: skip
    """The KV of one object, or of a prefix of one that ends with a quality layer.

    `quality`: read no better than this (None: all that `blob` holds). `out`: written in place and returned; same
    forms as `encode` takes, any strides. `chunk_hash`, `part`: what the object must be.

    Raises DamagedObject, UnsupportedObject, ForeignObject (also for another namespace than `layout`'s),
    LayoutError (`out` does not fit). `out`'s contents are unspecified after an error.
    """
    info = container.inspect(blob)
    header = info.header
    if header.namespace_id != layout.namespace_id:
        raise ForeignObject("the object belongs to another namespace", found=header.namespace_id.hex()[:16])
    if chunk_hash is not None and header.chunk_hash != chunk_hash:
        raise ForeignObject("the object is another chunk", found=header.chunk_hash.hex()[:16])
    if (part is not None and header.part != part) or header.part >= layout.partition.parts:
        raise ForeignObject("the object is another part", found=header.part)
    part_layout = layout.part_layout(header.part)
    _check_against(info, layout, part_layout)
    if out is None:
        out = arrays.empty(part_layout, header.tokens)
    planes = arrays.planes(out, part_layout)
    if planes[0].shape[0] != header.tokens:
        raise LayoutError("out has another number of tokens", got=planes[0].shape[0], expected=header.tokens)
    _decode_raw(blob, info, planes)
    return out


def _encode_raw(planes: Sequence[Plane], groups: Sequence[SegmentGroup]) -> tuple[CodecId, list[NewSegment]]:
    return CodecId.RAW, [
        NewSegment(0, group.kv, group.layer_first, group.layer_count, b"".join(planes[i].tobytes() for i in group.plane_indices))
        for group in groups
    ]  # fmt: skip


def _decode_raw(blob: Buffer, info: ObjectInfo, planes: Sequence[Plane]) -> None:
    for segment in info.segments:
        payload = container.segment_bytes(blob, segment)
        group = SegmentGroup(segment.kv, segment.layer_first, segment.layer_count)
        at = 0
        for index in group.plane_indices:
            plane = planes[index]
            values = payload[at : at + plane.nbytes]
            if len(values) != plane.nbytes:
                break
            plane[...] = np.frombuffer(values, plane.dtype).reshape(plane.shape)
            at += plane.nbytes
        if at != segment.length:
            raise DamagedObject("a raw segment has the wrong length", code=ErrorCode.STRUCTURE)


def _check_against(info: ObjectInfo, layout: KVLayout, part_layout: KVLayout) -> None:
    """The header must agree with what the layout says of such an object."""
    header = info.header
    agrees = (
        header.dtype == layout.dtype
        and header.layers == part_layout.num_layers
        and header.tokens <= layout.chunk_tokens
        and header.tail == (header.tokens < layout.chunk_tokens)
        and header.raw_bytes == header.tokens * part_layout.bytes_per_token
    )
    if not agrees:
        raise DamagedObject("the object contradicts its layout", code=ErrorCode.STRUCTURE)


__all__ = ["KV", "decode", "encode"]
