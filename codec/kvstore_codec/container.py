"""The object format "KVC": fixed header, segment table, payload (byte by byte in codec/FORMAT.md).

Segments are ordered quality-major, so the first `layer_bytes[q]` bytes of an object are a complete, smaller
object. Everything is checked before anything is decoded: header checksum, table checksum, that lengths add up
to the buffer, and each segment's own checksum. Nothing here allocates by a number read from the bytes before
that number has been compared with the length of the buffer.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple, overload

import xxhash

from kvstore_codec.errors import DamagedObject, ErrorCode, UnsupportedObject
from kvstore_codec.layout import CHUNK_TOKENS_MAX, DTYPE_BYTES, LAYERS_MAX
from kvstore_codec.quality import Quality

MAGIC = b"KVCO"
FORMAT_VERSION = 2
QUALITY_LAYERS_MAX = 3

_HEADER = struct.Struct("<4sHH32s32sIIQBBBBBBH32sQQQQIIQQQ")
_ENTRY = struct.Struct("<BBHHHQQ")
_ENTRY_START = struct.Struct("<BBHHH")
HEADER_BYTES = _HEADER.size
SEGMENT_ENTRY_BYTES = _ENTRY.size
_HEADER_CHECKED = HEADER_BYTES - 8
assert (HEADER_BYTES, SEGMENT_ENTRY_BYTES) == (192, 24)

SEGMENTS_MAX = LAYERS_MAX * 2 * QUALITY_LAYERS_MAX
#: An object's header is asked for by everybody on its way, and objects of one layout have segment tables of one
#: structure: of so many, what was read before is remembered. Larger tables are rare, and would fill memory.
_HEADERS_REMEMBERED, _STRUCTURES_REMEMBERED, _REMEMBERED_SEGMENTS_MAX = 256, 64, 1024
DTYPE_CODES = {name: code for code, name in enumerate(DTYPE_BYTES)}
_DTYPE_NAMES = {code: name for name, code in DTYPE_CODES.items()}

#: An object may exceed the KV it holds: tables of tiny chunks, incompressible values. Beyond this it is no object.
_OVERHEAD_FACTOR, _OVERHEAD_BYTES = 4, 1 << 20

Buffer = bytes | bytearray | memoryview
#: Writable memory of just so many bytes, for an object to be made in.
Allocate = Callable[[int], memoryview]


def object_bytes_max(raw_bytes: int) -> int:
    """Longest that an object of `raw_bytes` of KV may be: what is claimed beyond it, in peers' messages, is a lie."""
    return raw_bytes * _OVERHEAD_FACTOR + _OVERHEAD_BYTES


class CodecId(IntEnum):
    RAW = 0
    LOSSLESS = 1
    CF = 2  # lossy, means and scales in the object
    PROFILE = 3  # lossy, means and scales (and a basis) in a profile that the header names

    @property
    def lossy(self) -> bool:
        return self >= CodecId.CF


class Flags(IntFlag):
    TAIL = 1  # a partial last chunk


class KV(IntFlag):
    """Which of a layer's two planes a segment holds."""

    K = 1
    V = 2


#: enum calls are slow
_KV = {1: KV.K, 2: KV.V, 3: KV.K | KV.V}
_CODECS = {int(codec): codec for codec in CodecId}
_QUALITIES = {int(quality): quality for quality in Quality}
_FLAGS = {0: Flags(0), 1: Flags.TAIL}


@dataclass(frozen=True)
class ObjectHeader:
    """The fixed header. `quality` is the best the whole object reads at; `layer_bytes[q]` is the length of the
    prefix that holds quality layers 0…q; `raw_bytes` is the size of the array it decodes to. The last three fields are
    of the segment table: `pack` fills them in."""

    namespace_id: bytes
    chunk_hash: bytes
    part: int
    tokens: int
    first_position: int
    codec: CodecId
    dtype: str
    quality: Quality
    provenance: Quality
    flags: Flags
    layers: int
    raw_bytes: int
    profile_id: bytes = bytes(32)
    layer_bytes: tuple[int, ...] = ()
    segments: int = 0
    table_checksum: int = 0

    @property
    def tail(self) -> bool:
        return Flags.TAIL in self.flags

    @property
    def object_bytes(self) -> int:
        """Length of the whole object."""
        return self.layer_bytes[-1]

    @property
    def table_end(self) -> int:
        return HEADER_BYTES + self.segments * SEGMENT_ENTRY_BYTES

    def layers_in(self, length: int) -> int:
        """Quality layers that a buffer of `length` bytes holds; DamagedObject unless it ends with one."""
        try:
            return self.layer_bytes.index(length) + 1
        except ValueError:
            raise DamagedObject(
                "the object's length ends inside a quality layer", code=ErrorCode.TRUNCATED,
                bytes=length, expected="|".join(map(str, self.layer_bytes)),
            ) from None  # fmt: skip

    def quality_at(self, length: int) -> Quality:
        """Quality that the first `length` bytes read at; DamagedObject unless they end with a quality layer."""
        layers = self.layers_in(length)
        return Quality.of_lossy_layers(layers) if self.codec.lossy else self.quality

    def length_for(self, quality: Quality) -> int:
        """Bytes to read for `quality`: the longest prefix that is no better than it, at least layer 0."""
        if not self.codec.lossy or quality.exact:
            return self.object_bytes
        return self.layer_bytes[min(quality.lossy_layers, len(self.layer_bytes)) - 1]


class SegmentInfo(NamedTuple):
    """One independently decodable run of bytes: planes `kv` of layers [layer_first, layer_first + layer_count)."""

    quality_layer: int
    kv: KV
    layer_first: int
    layer_count: int
    offset: int
    length: int
    checksum: int

    @property
    def planes(self) -> tuple[KV, int, int]:
        return self[1:4]


@dataclass(frozen=True)
class ObjectInfo:
    """What `inspect` and `verify` tell of a buffer: its header, the quality it holds, its segments."""

    header: ObjectHeader
    quality: Quality
    segments: tuple[SegmentInfo, ...]

    @cached_property
    def bits_per_element(self) -> dict[str, float]:
        """Stored bits (headers, tables and side information included) an element, by quality held."""
        elements = self.header.raw_bytes // DTYPE_BYTES[self.header.dtype]
        layers = self.segments[-1].quality_layer + 1
        return {
            self.header.quality_at(length).label: 8 * length / elements for length in self.header.layer_bytes[:layers]
        }


class NewSegment(NamedTuple):
    """A segment to be written."""

    quality_layer: int
    kv: KV
    layer_first: int
    layer_count: int
    payload: Buffer


@overload
def pack(segments: Sequence[NewSegment], header: ObjectHeader) -> bytes: ...
@overload
def pack(
    segments: Sequence[NewSegment], header: ObjectHeader, allocate: Allocate | None
) -> bytes | memoryview: ...  # fmt: skip
def pack(
    segments: Sequence[NewSegment], header: ObjectHeader, allocate: Allocate | None = None
) -> bytes | memoryview:  # fmt: skip
    """One object. `segments` come quality-major; raises nothing for what `api.encode` passes."""
    table = b"".join(table_entry(*s[:4], len(s.payload), xxhash.xxh3_64_intdigest(s.payload)) for s in segments)
    layer_bytes: list[int] = []
    length = HEADER_BYTES + len(table)
    for segment in segments:
        if segment.quality_layer == len(layer_bytes):
            layer_bytes.append(length)
        length += len(segment.payload)
        layer_bytes[-1] = length
    parts = [header_bytes(header, layer_bytes, table), table, *(s.payload for s in segments)]
    if allocate is None:
        return b"".join(parts)
    room, at = allocate(length), 0
    for part in parts:
        room[at : at + len(part)] = part
        at += len(part)
    return room


def table_entry(
    quality_layer: int, kv: KV, layer_first: int, layer_count: int, length: int, checksum: int
) -> bytes:  # fmt: skip
    """One segment's bytes in the table."""
    return _ENTRY.pack(quality_layer, kv, layer_first, layer_count, 0, length, checksum)


def header_bytes(header: ObjectHeader, layer_bytes: Sequence[int], table: bytes) -> bytes:
    """The fixed header of an object with this segment table, `header`'s own last three fields left aside."""
    checked = _HEADER.pack(
        MAGIC, FORMAT_VERSION, HEADER_BYTES, header.namespace_id, header.chunk_hash, header.part, header.tokens,
        header.first_position, header.codec, DTYPE_CODES[header.dtype], header.quality, len(layer_bytes),
        header.provenance, header.flags, header.layers, header.profile_id, header.raw_bytes,
        *layer_bytes, *[0] * (QUALITY_LAYERS_MAX - len(layer_bytes)),
        len(table) // SEGMENT_ENTRY_BYTES, 0, xxhash.xxh3_64_intdigest(table), 0, 0,
    )[:_HEADER_CHECKED]  # fmt: skip
    return checked + xxhash.xxh3_64_intdigest(checked).to_bytes(8, "little")


def parse_header(buffer: Buffer) -> ObjectHeader:
    """The fixed header alone (the first HEADER_BYTES of an object). Raises DamagedObject, UnsupportedObject."""
    view = memoryview(buffer)
    if len(view) < HEADER_BYTES:
        raise DamagedObject("too short for an object header", code=ErrorCode.TRUNCATED, bytes=len(view))
    return _parsed(bytes(view[:HEADER_BYTES]))


@lru_cache(_HEADERS_REMEMBERED)
def _parsed(data: bytes) -> ObjectHeader:
    """Raises DamagedObject, UnsupportedObject."""
    (
        magic, version, header_bytes, namespace_id, chunk_hash, part, tokens, first_position,
        codec, dtype, quality, quality_layers, provenance, flags, layers, profile_id, raw_bytes,
        length_0, length_1, length_2, segments, reserved_1, table_checksum, reserved_2, checksum,
    ) = _HEADER.unpack(data)  # fmt: skip
    if magic != MAGIC:
        raise DamagedObject("not a kvstore object", code=ErrorCode.MAGIC_MISMATCH, magic=magic.hex())
    if version != FORMAT_VERSION:
        raise UnsupportedObject(
            "object format version is not known here", code=ErrorCode.VERSION_UNSUPPORTED, version=version
        )
    if checksum != xxhash.xxh3_64_intdigest(data[:_HEADER_CHECKED]):
        raise DamagedObject("header checksum does not match", code=ErrorCode.CHECKSUM_MISMATCH)
    if codec not in _CODECS:
        raise UnsupportedObject("codec is not known here", code=ErrorCode.CODEC_UNSUPPORTED, codec=codec)
    layer_bytes = (length_0, length_1, length_2)[:quality_layers]
    header = ObjectHeader(
        namespace_id, chunk_hash, part, tokens, first_position, _CODECS[codec], _DTYPE_NAMES.get(dtype, ""),
        _quality(quality), _quality(provenance), _FLAGS[flags & 1], layers, raw_bytes, profile_id,
        layer_bytes, segments, table_checksum,
    )  # fmt: skip
    best = {CodecId.RAW: Quality.RAW, CodecId.LOSSLESS: Quality.LOSSLESS}.get(header.codec)
    # A checksum protects against damage, not against a writer who computes it: the numbers are checked too.
    sane = (
        header_bytes == HEADER_BYTES
        and header.dtype != ""
        and 1 <= tokens <= CHUNK_TOKENS_MAX
        and 1 <= layers <= LAYERS_MAX
        and 1 <= quality_layers <= QUALITY_LAYERS_MAX
        and header.quality == (Quality.of_lossy_layers(quality_layers) if best is None else best)
        and (best is None or quality_layers == 1)
        and 1 <= segments <= SEGMENTS_MAX
        and all(a < b for a, b in zip((header.table_end, *layer_bytes), layer_bytes, strict=False))
        and not any((length_0, length_1, length_2)[quality_layers:])
        and raw_bytes > 0
        and any(profile_id) == (header.codec is CodecId.PROFILE)
        and flags == header.flags
        and first_position < 1 << 48
        and reserved_1 == reserved_2 == 0
    )
    if not sane:
        raise DamagedObject("header fields contradict each other", code=ErrorCode.STRUCTURE)
    return header


def inspect(buffer: Buffer) -> ObjectInfo:
    """Header and segment table of an object or of a valid prefix of one; payload checksums are not read.

    Raises DamagedObject or UnsupportedObject.
    """
    header = parse_header(buffer)
    view = memoryview(buffer)
    quality_layers = header.layers_in(len(view))
    table, structure = read_table(view, header)
    words = memoryview(table).cast("Q")
    lengths, checksums = words[1::3].tolist(), words[2::3].tolist()
    offsets = list(accumulate(lengths, initial=header.table_end))
    per_layer = len(lengths) // len(header.layer_bytes)
    if tuple(offsets[per_layer::per_layer]) != header.layer_bytes:
        raise DamagedObject("segment table does not add up", code=ErrorCode.STRUCTURE)
    columns = zip(structure[: per_layer * quality_layers], offsets, lengths, checksums, strict=False)
    segments = tuple(SegmentInfo(*planes, offset, length, checksum) for planes, offset, length, checksum in columns)
    return ObjectInfo(header, header.quality_at(len(view)), segments)


def verify(buffer: Buffer) -> ObjectInfo:
    """`inspect`, and every held segment's checksum. Needs no layout. Raises DamagedObject, UnsupportedObject."""
    info = inspect(buffer)
    segment_bytes(buffer, info.segments)
    return info


def segment_bytes(buffer: Buffer, segments: Sequence[SegmentInfo]) -> list[memoryview]:
    """The segments' payloads, after comparing their checksums. Raises DamagedObject."""
    view = memoryview(buffer)
    payloads = [view[segment.offset : segment.offset + segment.length] for segment in segments]
    for segment, payload in zip(segments, payloads, strict=True):
        if xxhash.xxh3_64_intdigest(payload) != segment.checksum:
            raise wrong_checksum(segment.quality_layer, segment.layer_first)
    return payloads


def wrong_checksum(quality_layer: int, layer: int) -> DamagedObject:
    """What a segment that starts with `layer` raises."""
    return DamagedObject(
        "segment checksum does not match", code=ErrorCode.CHECKSUM_MISMATCH, layer=layer, quality_layer=quality_layer
    )


def truncate(buffer: Buffer, quality: str | Quality) -> memoryview:
    """The prefix of an object that reads at `quality`, or all of it where it is no better already.

    Raises DamagedObject or UnsupportedObject.
    """
    header = parse_header(buffer)
    view = memoryview(buffer)
    header.layers_in(len(view))
    return view[: min(len(view), header.length_for(Quality.parse(quality)))]


#: (quality layer, kv, first layer, layers) of each segment of a table
Structure = tuple[tuple[int, KV, int, int], ...]


def read_table(view: memoryview, header: ObjectHeader) -> tuple[bytes, Structure]:
    """A copy of the segment table, its checksum compared, and its structure: each quality layer covers every
    (layer, K|V) plane once, in one grouping. Lengths and checksums in it are for the caller to check. Raises
    DamagedObject."""
    table = bytes(view[HEADER_BYTES : header.table_end])
    if len(table) != header.segments * SEGMENT_ENTRY_BYTES:
        raise DamagedObject("segment table exceeds the object", code=ErrorCode.TRUNCATED)
    if xxhash.xxh3_64_intdigest(table) != header.table_checksum:
        raise DamagedObject("segment table checksum does not match", code=ErrorCode.CHECKSUM_MISMATCH)
    read = _structure if header.segments <= _REMEMBERED_SEGMENTS_MAX else _structure.__wrapped__
    return table, read(memoryview(table).cast("Q")[::3].tobytes(), header.layers, len(header.layer_bytes))


@lru_cache(_STRUCTURES_REMEMBERED)
def _structure(first_words: bytes, layers: int, levels: int) -> Structure:
    """Of the first 8 bytes of each entry. Raises DamagedObject."""
    structure: list[tuple[int, KV, int, int]] = []
    for quality_layer, kv, first, count, reserved in _ENTRY_START.iter_unpack(first_words):
        if reserved or not 1 <= kv <= 3 or count < 1 or first + count > layers:
            raise DamagedObject("segment table holds an impossible segment", code=ErrorCode.STRUCTURE)
        structure.append((quality_layer, _KV[kv], first, count))
    per_layer = len(structure) // levels
    groups = [planes for _, *planes in structure[:per_layer]]
    sides = [int(kv) for _, kv, _, _ in structure[:per_layer]]  # as plain numbers: arithmetic on flags is slow
    # Counted before it is written out: groups may claim far more planes than there are.
    ok = per_layer * levels == len(structure) and 2 * layers == sum(
        side.bit_count() * count for side, (_, _, count) in zip(sides, groups, strict=True)
    )
    if ok:
        covered = [0] * layers
        for side, (_, first, count) in zip(sides, groups, strict=True):
            for layer in range(first, first + count):
                ok = ok and not covered[layer] & side
                covered[layer] |= side
    if not ok:
        raise DamagedObject("segment table does not cover every plane once", code=ErrorCode.STRUCTURE)
    for level in range(levels):
        some = structure[level * per_layer : (level + 1) * per_layer]
        ok = ok and all(quality_layer == level for quality_layer, *_ in some)
        ok = ok and [planes for _, *planes in some] == groups
    if not ok:
        raise DamagedObject("segment table does not add up", code=ErrorCode.STRUCTURE)
    return tuple(structure)


def _quality(value: int) -> Quality:
    if value not in _QUALITIES:
        raise DamagedObject("header names an unknown quality", code=ErrorCode.STRUCTURE, quality=value)
    return _QUALITIES[value]
