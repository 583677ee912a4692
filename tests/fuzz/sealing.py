"""Checksums made right again, as a hostile writer would: fuzzing must get past them."""

from __future__ import annotations

import xxhash

from kvstore_codec.container import HEADER_BYTES, SEGMENT_ENTRY_BYTES, SEGMENTS_MAX
from kvstore_codec.profile_bytes import PROFILE_HEADER_BYTES

_OBJECT_MAGIC_AND_VERSION = b"KVCO\x02\x00"
_PROFILE_MAGIC_AND_VERSION = b"KVCP\x01\x00"


def sealed_object(blob: bytes) -> bytes:
    """An object with its magic, its version and every checksum."""
    data = bytearray(blob)
    if len(data) < HEADER_BYTES:
        return blob
    data[: len(_OBJECT_MAGIC_AND_VERSION)] = _OBJECT_MAGIC_AND_VERSION
    segments = min(int.from_bytes(data[160:164], "little"), SEGMENTS_MAX)
    table_end = HEADER_BYTES + segments * SEGMENT_ENTRY_BYTES
    at = table_end
    for entry in range(HEADER_BYTES, min(table_end, len(data) - SEGMENT_ENTRY_BYTES + 1), SEGMENT_ENTRY_BYTES):
        length = int.from_bytes(data[entry + 8 : entry + 16], "little")
        data[entry + 16 : entry + 24] = _digest(data[at : at + length])
        at += length
    data[168:176] = _digest(data[HEADER_BYTES:table_end])
    data[184:192] = _digest(data[:184])
    return bytes(data)


def sealed_profile(data: bytes) -> bytes:
    """A profile with its magic, its version, its length and its checksum."""
    if len(data) < PROFILE_HEADER_BYTES:
        return data
    sealed = bytearray(data)
    sealed[: len(_PROFILE_MAGIC_AND_VERSION)] = _PROFILE_MAGIC_AND_VERSION
    sealed[48:56] = len(sealed).to_bytes(8, "little")
    sealed[56:64] = _digest(sealed[:56] + sealed[64:])
    return bytes(sealed)


def _digest(data: bytes | bytearray) -> bytes:
    return xxhash.xxh3_64_intdigest(data).to_bytes(8, "little")
