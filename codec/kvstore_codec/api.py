"""`encode` and `decode`: one chunk of KV to one object and back, at any quality.

Every quality is coded segment by segment; segments are independent, so the coder works on `threads` of them at a time
(the C++ core releases the GIL).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

from kvstore_codec import arrays, container, raw
from kvstore_codec.arrays import KVArray, Plane
from kvstore_codec.container import KV, Allocate, Buffer, CodecId, Flags, NewSegment, ObjectHeader
from kvstore_codec.errors import DamagedObject, ErrorCode, ForeignObject, LayoutError, ProfileMissing
from kvstore_codec.layout import KVLayout, LayerSpec
from kvstore_codec.native import NATIVE
from kvstore_codec.profile import Profile, ProfileGroup
from kvstore_codec.quality import Quality
from kvstore_codec.rope import Rotation, rotation_for
from kvstore_codec.segments import (
    NO_DRAINS,
    CodedPlane,
    LossySegment,
    SegmentCoder,
    SegmentGroup,
    is_state,
    segment_groups,
)

#: Base step ("low") of keys and values in units of the plane's rms. Each quality divides the step by 3; these put
#: `medium` below fp8's loss on SmolLM2 (docs/performance.md). Values get a finer grid than keys, for
#: the same loss.
STEP_FACTOR_K = 0.75
STEP_FACTOR_V = 0.75 * 0.67
STEP_MIN, STEP_MAX = 2.0**-8, 2.0**8
#: Tokens at positions before this one carry most of the loss when quantised and are stored as they are.
SINK_POSITIONS = 4

_EXACT_CODECS = {Quality.RAW: CodecId.RAW, Quality.LOSSLESS: CodecId.LOSSLESS}


@overload
def encode(
    kv: KVArray, layout: KVLayout, *, quality: str | Quality = "high", first_position: int = 0,
    chunk_hash: bytes = bytes(32), part: int = 0, provenance: str | Quality = "raw", profile: Profile | None = None,
    step: float = 1.0, threads: int = 1, coder: SegmentCoder = NATIVE, allocate: None = None,
) -> bytes: ...  # fmt: skip
@overload
def encode(
    kv: KVArray, layout: KVLayout, *, quality: str | Quality = "high", first_position: int = 0,
    chunk_hash: bytes = bytes(32), part: int = 0, provenance: str | Quality = "raw", profile: Profile | None = None,
    step: float = 1.0, threads: int = 1, coder: SegmentCoder = NATIVE, allocate: Allocate,
) -> memoryview: ...  # fmt: skip
def encode(
    kv: KVArray, layout: KVLayout, *, quality: str | Quality = "high", first_position: int = 0,
    chunk_hash: bytes = bytes(32), part: int = 0, provenance: str | Quality = "raw", profile: Profile | None = None,
    step: float = 1.0, threads: int = 1, coder: SegmentCoder = NATIVE, allocate: Allocate | None = None,
) -> bytes | memoryview:  # fmt: skip
    """One object from one chunk of KV.

    `kv`: at most `layout.chunk_tokens` tokens, `[layers, 2, tokens, kv_heads, head_dim]` in the layout's dtype
    (numpy, torch, DLPack; strided views are read in place), a list of (k, v), or `PagedKV`; keys after RoPE, the first
    at `first_position`. `part`: `kv` is that part's slice of the layout. `provenance`: the lowest quality of the cached
    prefix this chunk was computed on. A dtype that a quality cannot code (fp8 and integers at lossy ones, integers at
    "lossless") is stored "raw", which is exact; so is recurrent state, at lossy qualities losslessly.

    `profile` (lossy qualities): what `kvstore calibrate` made for this model; the object names it, and can only be
    decoded with it. `step`: the base quantiser step in units of the quality's own, 2⁻⁸ to 2⁸; loss grows with its
    square. With a profile it is rounded to 2^(k/4). `allocate`: gives writable memory of so many bytes, in which the
    object is made; it is called once, in the end.

    Raises LayoutError (shape, dtype, arguments), ProfileError (another model's profile), ValuesError (lossy: NaN,
    infinities, magnitudes of 2¹⁰⁰, with a profile of 2⁶⁰).
    """
    part_layout = layout.part_layout(part)
    places = arrays.places(kv, part_layout)
    tokens = arrays.tokens_of(places)
    if not 1 <= tokens <= layout.chunk_tokens:
        raise LayoutError("a chunk has 1 to chunk_tokens tokens", tokens=tokens, chunk_tokens=layout.chunk_tokens)
    if not 0 <= first_position < 1 << 48:
        raise LayoutError("first_position must be in [0, 2**48)", first_position=first_position)
    if len(chunk_hash) != 32:
        raise LayoutError("a chunk hash has 32 bytes", bytes=len(chunk_hash))
    if not STEP_MIN <= step <= STEP_MAX:
        raise LayoutError("step must be 2**-8 to 2**8", step=step)
    quality = storable_quality(part_layout, quality)
    if quality.exact:
        profile = None
    elif profile is not None:
        _require_profile(profile, layout)
    lossy_codec = CodecId.CF if profile is None else CodecId.PROFILE
    header = ObjectHeader(
        namespace_id=layout.namespace_id, chunk_hash=chunk_hash, part=part, tokens=tokens,
        first_position=first_position, codec=_EXACT_CODECS.get(quality, lossy_codec), dtype=layout.dtype,
        quality=quality, provenance=Quality.parse(provenance),
        flags=Flags.TAIL if tokens < layout.chunk_tokens else Flags(0), layers=part_layout.num_layers,
        raw_bytes=tokens * part_layout.bytes_per_token, profile_id=bytes(32) if profile is None else profile.profile_id,
    )  # fmt: skip
    if quality is Quality.RAW:
        return raw.encode(places, part_layout, header, allocate=allocate)
    planes = arrays.planes_of(places)
    groups = segment_groups(part_layout, tokens) if profile is None else [group.planes for group in profile.groups]
    if quality is Quality.LOSSLESS:
        chosen = [[planes[index] for index in group.plane_indices] for group in groups]
        coded = [[payload] for payload in coder.encode_lossless(chosen, layout.dtype, threads)]
    else:
        lossy = _Lossy(planes, part_layout, groups, first_position, profile, step)
        coded = lossy.encode(quality.lossy_layers, coder, threads)
    segments = [
        NewSegment(level, group.kv, group.layer_first, group.layer_count, layers[level])
        for level in range(len(coded[0]))
        for group, layers in zip(groups, coded, strict=True)
    ]
    return container.pack(segments, header, allocate)


def decode(
    blob: Buffer, layout: KVLayout, *, quality: str | Quality | None = None, out: KVArray | None = None,
    chunk_hash: bytes | None = None, part: int | None = None, profile: Profile | None = None, threads: int = 1,
    coder: SegmentCoder = NATIVE,
) -> KVArray:  # fmt: skip
    """The KV of one object, or of a prefix of one that ends with a quality layer.

    `quality`: read no better than this (None: all that `blob` holds). `out`: written in place and returned; same
    forms as `encode` takes, any strides. `chunk_hash`, `part`: what the object must be. `profile`: the one that the
    object was coded with; objects coded without one ignore it.

    Raises DamagedObject, UnsupportedObject, ForeignObject (also for another namespace than `layout`'s),
    ProfileMissing (`profile` is not the one that the object names), LayoutError (`out` does not fit). `out`'s contents
    are unspecified after an error.
    """
    header = container.parse_header(blob)
    view = memoryview(blob)
    header.layers_in(len(view))
    if quality is not None:
        view = view[: min(len(view), header.length_for(Quality.parse(quality)))]
    check_header(header, layout, chunk_hash=chunk_hash, part=part)
    part_layout = layout.part_layout(header.part)
    if out is None:
        out = arrays.empty(part_layout, header.tokens)
    places = arrays.places_to_write(out, part_layout)
    if arrays.tokens_of(places) != header.tokens:
        raise LayoutError("out has another number of tokens", got=arrays.tokens_of(places), expected=header.tokens)
    if header.codec is CodecId.RAW:
        raw.decode(view, header, places, part_layout)
        return out

    info = container.inspect(view)
    groups = [SegmentGroup(*segment.planes) for segment in info.segments if segment.quality_layer == 0]
    used = _named_profile(profile, header, layout, groups) if header.codec is CodecId.PROFILE else None
    # The same planes in each quality layer (container.inspect sees to that): one list a group, quality layers in order.
    held = container.segment_bytes(view, info.segments)
    payloads = [held[index :: len(groups)] for index in range(len(groups))]
    planes = arrays.planes_of(places)
    if header.codec is CodecId.LOSSLESS:
        chosen = [[planes[index] for index in group.plane_indices] for group in groups]
        coder.decode_lossless(chosen, [layers[0] for layers in payloads], header.dtype, threads)
    else:
        lossy = _Lossy(planes, part_layout, groups, header.first_position, used)
        lossy.decode(payloads, coder, threads)
    return out


class _Lossy:
    """The segments of one chunk at a lossy quality; those of recurrent state are lossless, all in quality layer 0."""

    def __init__(
        self, planes: Sequence[Plane], layout: KVLayout, groups: Sequence[SegmentGroup], first_position: int,
        profile: Profile | None, step: float = 1.0,
    ) -> None:  # fmt: skip
        tokens = planes[0].shape[0]
        self._planes, self._layout, self._groups = planes, layout, groups
        self._first_position, self._step = first_position, step
        self._profiles: Sequence[ProfileGroup | None] = profile.groups if profile else [None] * len(groups)
        self._sinks = max(0, min(tokens, SINK_POSITIONS - first_position))
        self._state = [is_state(layout, group.layer_first) for group in groups]
        self._rotations: dict[int, Rotation | None] = {}

    def encode(self, levels: int, coder: SegmentCoder, threads: int) -> list[list[bytes]]:
        dtype = self._layout.dtype
        apart = [index for index in self._lossy_groups if self._groups[index].kv != KV.K | KV.V]
        pairs = [
            [(self._planes[2 * layer], self._planes[2 * layer + 1]) for layer in self._groups[index].layers]
            for index in apart
        ]
        drains = dict(zip(apart, coder.drain_tokens(pairs, self._sinks, dtype, threads), strict=True))
        quarters = round(4 * math.log2(self._step))
        segments = [
            LossySegment(
                self._coded_planes(index), drains.get(index), self._profiles[index],
                quarters if self._profiles[index] else 0,
            )
            for index in self._lossy_groups
        ]  # fmt: skip
        coded = iter(coder.encode_lossy(segments, self._sinks, dtype, levels, threads))
        exact = iter(coder.encode_lossless(self._state_planes, dtype, threads))
        return [[next(exact), *[b""] * (levels - 1)] if state else next(coded) for state in self._state]

    def decode(self, payloads: Sequence[Sequence[memoryview]], coder: SegmentCoder, threads: int) -> None:
        dtype = self._layout.dtype
        segments = [LossySegment(self._coded_planes(i), NO_DRAINS, self._profiles[i]) for i in self._lossy_groups]
        coder.decode_lossy(segments, [payloads[i] for i in self._lossy_groups], self._sinks, dtype, threads)
        exact = [layers for layers, state in zip(payloads, self._state, strict=True) if state]
        if any(any(layers[1:]) for layers in exact):
            raise DamagedObject("a refinement of exact state is not empty", code=ErrorCode.STRUCTURE)
        coder.decode_lossless(self._state_planes, [layers[0] for layers in exact], dtype, threads)

    @property
    def _lossy_groups(self) -> list[int]:
        return [index for index, state in enumerate(self._state) if not state]

    @property
    def _state_planes(self) -> list[list[Plane]]:
        groups = [group for group, state in zip(self._groups, self._state, strict=True) if state]
        return [[self._planes[index] for index in group.plane_indices] for group in groups]

    def _coded_planes(self, index: int) -> list[CodedPlane]:
        planes, layers, tokens = self._planes, self._layout.layers, self._planes[0].shape[0]
        return [
            CodedPlane(planes[plane], None, self._step * STEP_FACTOR_V)
            if plane % 2
            else CodedPlane(planes[plane], self._rotation(layers[plane // 2], tokens), self._step * STEP_FACTOR_K)
            for plane in self._groups[index].plane_indices
        ]

    def _rotation(self, layer: LayerSpec, tokens: int) -> Rotation | None:
        """Layers are few different ones: `rotation_for`'s own cache would hash each of them."""
        if id(layer) not in self._rotations:
            self._rotations[id(layer)] = rotation_for(layer, self._first_position, tokens)
        return self._rotations[id(layer)]


def storable_quality(layout: KVLayout, quality: str | Quality) -> Quality:
    """The quality that `encode` stores when asked for `quality`: at least as good, as dtype and layers allow.

    `layout`: of the part, where there are several."""
    wanted = Quality.parse(quality)
    if layout.dtype in ("bfloat16", "float16", "float32"):
        only_state = all(is_state(layout, layer) for layer in range(layout.num_layers))
        return min(wanted, Quality.LOSSLESS) if only_state else wanted
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
        and header.quality == storable_quality(part_layout, header.quality)
        and header.layers == part_layout.num_layers
        and header.tokens <= layout.chunk_tokens
        and header.tail == (header.tokens < layout.chunk_tokens)
        and header.raw_bytes == header.tokens * part_layout.bytes_per_token
    )
    if not agrees:
        raise DamagedObject("the object contradicts its layout", code=ErrorCode.STRUCTURE)


def _require_profile(profile: Profile, layout: KVLayout) -> None:
    """Raises ProfileError, LayoutError."""
    profile.require_fit(layout)
    if layout.partition.parts != 1:
        raise LayoutError("a profile codes whole chunks: use a layout without partition, or no profile")
    if any(is_state(layout, layer) for layer in range(layout.num_layers)):
        raise LayoutError("a profile does not code recurrent state: encode without one")


def _named_profile(
    profile: Profile | None, header: ObjectHeader, layout: KVLayout, groups: Sequence[SegmentGroup]
) -> Profile:
    if profile is None or profile.profile_id != header.profile_id:
        raise ProfileMissing(
            "the object was coded with a profile: pass it as profile=", profile=header.profile_id.hex()
        )
    _require_profile(profile, layout)
    if [group.planes for group in profile.groups] != list(groups):
        raise DamagedObject("the object's segments are not its profile's groups", code=ErrorCode.STRUCTURE)
    return profile
