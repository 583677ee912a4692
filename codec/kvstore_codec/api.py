"""`encode` and `decode`: one chunk of KV to one object and back, at any quality.

Every quality is coded segment by segment; segments are independent, so `threads` of them run at a time (the C++
core releases the GIL).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvstore_codec import arrays, container
from kvstore_codec.arrays import KVArray, Plane
from kvstore_codec.container import Buffer, CodecId, Flags, NewSegment, ObjectHeader, ObjectInfo, SegmentInfo
from kvstore_codec.errors import DamagedObject, ErrorCode, ForeignObject, LayoutError
from kvstore_codec.layout import KVLayout
from kvstore_codec.native import NATIVE
from kvstore_codec.quality import Quality
from kvstore_codec.rope import rotation_for
from kvstore_codec.segments import CodedPlane, SegmentCoder, SegmentGroup, segment_groups

#: Base step ("low") of keys and values in units of the plane's rms. Each quality divides the step by 3; these put
#: `medium` below fp8's loss on SmolLM2 (docs/performance.md). Values tolerate a coarser grid at equal loss than keys.
STEP_FACTOR_K = 0.75
STEP_FACTOR_V = 0.75 * 0.67
#: Tokens at positions before this one carry most of the loss when quantised and are stored as they are.
SINK_POSITIONS = 4
#: At most one token in so many is a drain token (about 1 % are, in real caches).
DRAIN_TOKENS_DIVISOR = 2

T = TypeVar("T")
R = TypeVar("R")


def encode(
    kv: KVArray, layout: KVLayout, *, quality: str | Quality = "high", first_position: int = 0,
    chunk_hash: bytes = bytes(32), part: int = 0, provenance: str | Quality = "raw", threads: int = 1,
    coder: SegmentCoder = NATIVE,
) -> bytes:  # fmt: skip
    """One object from one chunk of KV.

    `kv`: at most `layout.chunk_tokens` tokens, `[layers, 2, tokens, kv_heads, head_dim]` in the layout's dtype
    (numpy, torch, DLPack; strided views are read in place), or a list of (k, v); keys after RoPE, the first at
    `first_position`. `part`: `kv` is that part's slice of the layout. `provenance`: the lowest quality of the
    cached prefix this chunk was computed on. A dtype that a quality cannot code (fp8 and integers at lossy ones,
    integers at "lossless") is stored "raw", which is exact.

    Raises LayoutError (shape, dtype, arguments), ValuesError (NaN or infinities at a lossy quality).
    """
    part_layout = layout.part_layout(part)
    planes = arrays.planes(kv, part_layout)
    tokens = planes[0].shape[0]
    if not 1 <= tokens <= layout.chunk_tokens:
        raise LayoutError("a chunk has 1 to chunk_tokens tokens", tokens=tokens, chunk_tokens=layout.chunk_tokens)
    if not 0 <= first_position < 1 << 48:
        raise LayoutError("first_position must be in [0, 2**48)", first_position=first_position)
    if len(chunk_hash) != 32:
        raise LayoutError("a chunk hash has 32 bytes", bytes=len(chunk_hash))
    quality = storable_quality(layout, quality)
    codec = {Quality.RAW: CodecId.RAW, Quality.LOSSLESS: CodecId.LOSSLESS}.get(quality, CodecId.CF)
    sinks = _sinks(first_position, tokens)

    def payloads(group: SegmentGroup) -> list[bytes]:
        chosen = [planes[index] for index in group.plane_indices]
        if codec is CodecId.RAW:
            return [b"".join(plane.tobytes() for plane in chosen)]
        if codec is CodecId.LOSSLESS:
            return [coder.encode_lossless(chosen, layout.dtype)]
        drains = [
            coder.drain_tokens(planes[2 * layer], planes[2 * layer + 1], sinks, layout.dtype)
            for layer in range(group.layer_first, group.layer_first + group.layer_count)
        ]
        coded = _coded_planes(planes, group, part_layout, first_position)
        return coder.encode_lossy(coded, _union(drains, sinks, tokens), sinks, layout.dtype, quality.lossy_layers)

    groups = segment_groups(part_layout, tokens)
    coded = _map(payloads, groups, threads)
    segments = [
        NewSegment(level, group.kv, group.layer_first, group.layer_count, layers[level])
        for level in range(len(coded[0]))
        for group, layers in zip(groups, coded, strict=True)
    ]
    return container.pack(
        segments, namespace_id=layout.namespace_id, chunk_hash=chunk_hash, part=part, tokens=tokens,
        first_position=first_position, codec=codec, dtype=layout.dtype, quality=quality,
        provenance=Quality.parse(provenance), flags=Flags.TAIL if tokens < layout.chunk_tokens else Flags(0),
        layers=part_layout.num_layers, raw_bytes=tokens * part_layout.bytes_per_token,
    )  # fmt: skip


def decode(
    blob: Buffer, layout: KVLayout, *, quality: str | Quality | None = None, out: KVArray | None = None,
    chunk_hash: bytes | None = None, part: int | None = None, threads: int = 1, coder: SegmentCoder = NATIVE,
) -> KVArray:  # fmt: skip
    """The KV of one object, or of a prefix of one that ends with a quality layer.

    `quality`: read no better than this (None: all that `blob` holds). `out`: written in place and returned; same
    forms as `encode` takes, any strides. `chunk_hash`, `part`: what the object must be.

    Raises DamagedObject, UnsupportedObject, ForeignObject (also for another namespace than `layout`'s),
    LayoutError (`out` does not fit). `out`'s contents are unspecified after an error.
    """
    if quality is not None:
        blob = container.truncate(blob, quality)
    info = container.inspect(blob)
    header = info.header
    check_header(header, layout, chunk_hash=chunk_hash, part=part)
    part_layout = layout.part_layout(header.part)
    if out is None:
        out = arrays.empty(part_layout, header.tokens)
    planes = arrays.planes_to_write(out, part_layout)
    if planes[0].shape[0] != header.tokens:
        raise LayoutError("out has another number of tokens", got=planes[0].shape[0], expected=header.tokens)

    def restore(layers: Sequence[SegmentInfo]) -> None:
        payloads = [container.segment_bytes(blob, segment) for segment in layers]
        group = SegmentGroup(layers[0].kv, layers[0].layer_first, layers[0].layer_count)
        chosen = [planes[index] for index in group.plane_indices]
        if header.codec is CodecId.RAW:
            _copy_raw(payloads[0], chosen)
        elif header.codec is CodecId.LOSSLESS:
            coder.decode_lossless(payloads[0], chosen, header.dtype)
        else:
            coded = _coded_planes(planes, group, part_layout, header.first_position)
            coder.decode_lossy(payloads, coded, _sinks(header.first_position, header.tokens), header.dtype)

    _map(restore, _by_group(info), threads)
    return out


def storable_quality(layout: KVLayout, quality: str | Quality) -> Quality:
    """The quality that `encode` stores when asked for `quality`: at least as good, as the dtype allows."""
    wanted = Quality.parse(quality)
    if layout.dtype in ("bfloat16", "float16", "float32"):
        return wanted
    if layout.dtype.startswith("float8"):
        return min(wanted, Quality.LOSSLESS)
    return Quality.RAW


def check_header(
    header: ObjectHeader, layout: KVLayout, *, chunk_hash: bytes | None = None, part: int | None = None
) -> None:
    """That an object with this header is one of `layout`, and the chunk and part asked for (None: any).

    Raises ForeignObject (another namespace, chunk or part), DamagedObject (contradicts the layout).
    """
    if header.namespace_id != layout.namespace_id:
        raise ForeignObject("the object belongs to another namespace", found=header.namespace_id.hex()[:16])
    if chunk_hash is not None and header.chunk_hash != chunk_hash:
        raise ForeignObject("the object is another chunk", found=header.chunk_hash.hex()[:16])
    if (part is not None and header.part != part) or header.part >= layout.partition.parts:
        raise ForeignObject("the object is another part", found=header.part)
    part_layout = layout.part_layout(header.part)
    agrees = (
        header.dtype == layout.dtype
        and header.quality == storable_quality(layout, header.quality)
        and header.layers == part_layout.num_layers
        and header.tokens <= layout.chunk_tokens
        and header.tail == (header.tokens < layout.chunk_tokens)
        and header.raw_bytes == header.tokens * part_layout.bytes_per_token
    )
    if not agrees:
        raise DamagedObject("the object contradicts its layout", code=ErrorCode.STRUCTURE)


def _coded_planes(
    planes: Sequence[Plane], group: SegmentGroup, layout: KVLayout, first_position: int
) -> list[CodedPlane]:
    tokens = planes[0].shape[0]
    coded = []
    for index in group.plane_indices:
        layer, is_value = divmod(index, 2)
        rotation = None if is_value else rotation_for(layout.layers[layer], first_position, tokens)
        coded.append(CodedPlane(planes[index], rotation, STEP_FACTOR_V if is_value else STEP_FACTOR_K))
    return coded


def _sinks(first_position: int, tokens: int) -> int:
    return max(0, min(tokens, SINK_POSITIONS - first_position))


def _union(drains: Sequence[npt.NDArray[np.uint16]], sinks: int, tokens: int) -> npt.NDArray[np.uint16]:
    """Drain tokens of a group of layers: any layer's. None if they are not few: the step of the others would then be
    measured on too little."""
    union = np.unique(np.concatenate(drains))
    return union if len(union) * DRAIN_TOKENS_DIVISOR <= tokens - sinks else union[:0]


def _by_group(info: ObjectInfo) -> list[list[SegmentInfo]]:
    """Segments of the same planes, one list a group, quality layers in order."""
    groups: dict[tuple[object, int, int], list[SegmentInfo]] = {}
    for segment in info.segments:
        groups.setdefault(segment.planes, []).append(segment)
    return list(groups.values())


def _copy_raw(payload: memoryview, planes: Sequence[Plane]) -> None:
    if len(payload) != sum(plane.nbytes for plane in planes):
        raise DamagedObject("a raw segment has the wrong length", code=ErrorCode.STRUCTURE)
    at = 0
    for plane in planes:
        values = np.frombuffer(payload[at : at + plane.nbytes], plane.dtype)
        plane[...] = values.reshape(plane.shape)
        at += plane.nbytes


def _map(function: Callable[[T], R], items: Sequence[T], threads: int) -> list[R]:
    if threads <= 1 or len(items) <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items)), "kvstore-codec") as pool:
        return list(pool.map(function, items))
