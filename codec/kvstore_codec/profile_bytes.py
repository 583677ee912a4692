"""The profile format "KVCP": a header, metadata as canonical JSON, then one record a group. Little-endian.

    header, 64 bytes   magic "KVCP" · u16 version 1 · u16 header bytes · u8 kind · u8 0 · u16 groups
                       · u32 metadata bytes · model id, 32 bytes · u64 bytes of the whole file
                       · u64 XXH3-64 of all bytes but these eight
    metadata           JSON in UTF-8: keys sorted, no spaces, no NaN or infinity
    per group          24 bytes: u8 kv (1 K, 2 V, 3 both) · u8 has_basis · u16 first layer · u16 layers · u16 0
                       · u32 channels · u32 components · u64 0
                       mean f32[channels] · weight f32[channels]
                       · scale ids u8[components], zeros up to a multiple of 8
                       · basis f16[components, channels] if has_basis, zeros up to a multiple of 8

There is one byte string for one content: zeros are checked to be zeros, and JSON to be in canonical form. No number
read from the bytes sizes anything before it has been compared with the bytes that are there.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from kvstore_codec.container import Buffer
from kvstore_codec.errors import ErrorCode, ProfileError
from kvstore_codec.layout import LAYERS_MAX

MAGIC = b"KVCP"
PROFILE_VERSION = 1
METADATA_BYTES_MAX = 1 << 20
GROUPS_MAX = 2 * LAYERS_MAX

_HEADER = struct.Struct("<4sHHBBHI32sQQ")
_HEADER_CHECKED = struct.Struct("<4sHHBBHI32sQ")
_GROUP = struct.Struct("<BBHHHIIQ")
PROFILE_HEADER_BYTES = _HEADER.size
assert (PROFILE_HEADER_BYTES, _HEADER_CHECKED.size, _GROUP.size) == (64, 56, 24)
_KV_MAX = 3


@dataclass(frozen=True, eq=False)
class GroupRecord:
    """One group's fields as they lie in the bytes; `basis` is None where there is none."""

    kv: int
    layer_first: int
    layer_count: int
    mean: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]
    scale_ids: npt.NDArray[np.uint8]
    basis: npt.NDArray[np.float16] | None


def pack(kind: int, model_id: bytes, metadata: dict[str, Any], groups: Sequence[GroupRecord]) -> bytes:
    """Raises ProfileError for metadata that is not JSON, or too much of anything."""
    if len(groups) > GROUPS_MAX:
        raise ProfileError(f"a profile has at most {GROUPS_MAX} groups", groups=len(groups))
    text = dump_metadata(metadata)
    pieces = [text]
    for group in groups:
        head = _GROUP.pack(
            group.kv, group.basis is not None, group.layer_first, group.layer_count, 0, len(group.mean),
            len(group.scale_ids), 0,
        )  # fmt: skip
        pieces += [head, _bytes(group.mean, "<f4"), _bytes(group.weight, "<f4"), _padded(_bytes(group.scale_ids, "u1"))]
        if group.basis is not None:
            pieces.append(_padded(_bytes(group.basis, "<f2")))
    total = PROFILE_HEADER_BYTES + sum(map(len, pieces))
    start = _HEADER_CHECKED.pack(
        MAGIC, PROFILE_VERSION, PROFILE_HEADER_BYTES, kind, 0, len(groups), len(text), model_id, total
    )
    return b"".join([start, struct.pack("<Q", _checksum([start, *pieces])), *pieces])


def unpack(data: Buffer) -> tuple[int, bytes, dict[str, Any], list[GroupRecord]]:
    """(kind, model id, metadata, groups), the arrays copied. Raises ProfileError; values inside the arrays, and that
    groups cover the planes, are for the caller to check."""
    view = memoryview(data).cast("B")
    if len(view) < PROFILE_HEADER_BYTES:
        raise ProfileError("the profile is shorter than its header", code=ErrorCode.TRUNCATED, bytes=len(view))
    magic, version, header_bytes, kind, zero, count, text_bytes, model_id, total, checksum = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise ProfileError("not a profile", code=ErrorCode.MAGIC_MISMATCH)
    if version != PROFILE_VERSION:
        raise ProfileError(
            "the profile was written by another version", code=ErrorCode.VERSION_UNSUPPORTED, version=version
        )
    if total != len(view):
        raise ProfileError(
            "the profile has the wrong length", code=ErrorCode.TRUNCATED, bytes=len(view), expected=total
        )
    if checksum != _checksum([view[: _HEADER_CHECKED.size], view[PROFILE_HEADER_BYTES:]]):
        raise ProfileError("the profile's checksum is wrong", code=ErrorCode.CHECKSUM_MISMATCH)
    if (header_bytes, zero) != (PROFILE_HEADER_BYTES, 0) or count > GROUPS_MAX:
        raise ProfileError("the profile's header is wrong")
    reader = _Reader(view, PROFILE_HEADER_BYTES)
    if text_bytes > METADATA_BYTES_MAX:
        raise ProfileError("the profile's metadata is too long", bytes=text_bytes)
    metadata = parse_metadata(bytes(reader.take(text_bytes)))
    groups = [_group(reader) for _ in range(count)]
    if reader.at != len(view):
        raise ProfileError("the profile has bytes left over", bytes=len(view) - reader.at)
    return kind, model_id, metadata, groups


def dump_metadata(metadata: dict[str, Any]) -> bytes:
    """Canonical JSON. Raises ProfileError for what is no JSON object, or longer than a mebibyte."""
    try:
        text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        data = text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise ProfileError(f"a profile's metadata must be JSON: {error}") from error
    if len(data) > METADATA_BYTES_MAX:
        raise ProfileError("the profile's metadata is too long", bytes=len(data))
    return data


def parse_metadata(data: bytes) -> dict[str, Any]:
    """Inverse of `dump_metadata`, for canonical bytes alone. Raises ProfileError."""
    try:
        metadata = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, an integer of absurd length
        raise ProfileError(f"the profile's metadata is not JSON: {error}") from error
    if not isinstance(metadata, dict) or dump_metadata(metadata) != data:
        raise ProfileError("the profile's metadata is not a JSON object in canonical form")
    return metadata


class _Reader:
    """Takes bytes one field after another, never more than there are."""

    def __init__(self, view: memoryview, at: int) -> None:
        self._view = view
        self.at = at

    def take(self, size: int) -> memoryview:
        if size > len(self._view) - self.at:
            raise ProfileError("a length in the profile exceeds it", code=ErrorCode.TRUNCATED, bytes=size)
        self.at += size
        return self._view[self.at - size : self.at]

    def array(self, dtype: str, count: int) -> npt.NDArray[Any]:
        """A copy, aligned and in the machine's byte order."""
        kind = np.dtype(dtype)
        return np.frombuffer(self.take(count * kind.itemsize), kind).astype(kind.newbyteorder("="))

    def padding(self, used: int) -> None:
        if any(self.take(-used % 8)):
            raise ProfileError("padding in the profile is not zero")


def _group(reader: _Reader) -> GroupRecord:
    kv, has_basis, layer_first, layer_count, zero16, channels, components, zero64 = _GROUP.unpack(
        reader.take(_GROUP.size)
    )
    if not 1 <= kv <= _KV_MAX or has_basis > 1 or zero16 or zero64:
        raise ProfileError("a group's head is wrong")
    if components > channels or (not has_basis and components != channels):
        raise ProfileError("a group's components do not fit its channels", components=components, channels=channels)
    mean, weight = reader.array("<f4", channels), reader.array("<f4", channels)
    scale_ids = reader.array("u1", components)
    reader.padding(components)
    basis = None
    if has_basis:
        basis = reader.array("<f2", components * channels).reshape(components, channels)
        reader.padding(2 * components * channels)
    return GroupRecord(kv, layer_first, layer_count, mean, weight, scale_ids, basis)


def _bytes(array: npt.NDArray[Any], dtype: str) -> bytes:
    return np.ascontiguousarray(array, dtype).tobytes()


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def _checksum(pieces: Sequence[Buffer]) -> int:
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.intdigest()
