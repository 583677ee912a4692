"""One object as one value of Redis: the key it has, and the envelope in front of its bytes.

    key     PREFIX:NAMESPACE:HASH:PART    namespace and hash as lower-case hex, part as a decimal number
    value   envelope (64 bytes) · the object's bytes, or the prefix of them that is kept

    envelope, little-endian:
      0  magic "KVCREDIS"
      8  version u16 = 1
     10  0 (6 bytes)
     16  bytes that follow the envelope, u64
     24  parent hash (32)
     56  XXH3-64 of: namespace id (32) · chunk hash (32) · part u16 · the 56 bytes before

The checksum covers whose value it is, so one that was copied to another key is found even where only a few bytes of
it are read. The object's bytes carry their own checksums. In front rather than behind, as on disk: a ranged read
from 0 brings both the envelope and the quality wanted.

No hash tags: a tag would put a whole prompt, or a whole namespace, on one master of a Cluster, and with it every read
of a hot prompt. Pipelines to each master cost no more round trips than one to a single master.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

from kvstore.index.entry import ObjectKey
from kvstore.tiers.base import Bytes

ENVELOPE_BYTES = 64
VERSION = 1
_MAGIC = b"KVCREDIS"
_ENVELOPE = struct.Struct("<8sH6xQ32sQ")
_OWNER = struct.Struct("<32s32sH")
assert _ENVELOPE.size == ENVELOPE_BYTES


class Envelope(NamedTuple):
    """`length`: bytes that follow; `parent`: hash of the chunk before it."""

    length: int
    parent: bytes


class NotOurs(ValueError):
    """A value that is no object of this key. `reason` is a metric's label."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NewerVersion(NotOurs):
    """A value of another version of this format: to be left alone, a node that was upgraded reads it."""

    def __init__(self) -> None:
        super().__init__("version")


def value_key(prefix: str, key: ObjectKey) -> bytes:
    return f"{prefix}:{key.namespace_id.hex()}:{key.chunk_hash.hex()}:{key.part}".encode()


def namespace_pattern(prefix: str, namespace_id: bytes) -> str:
    """For SCAN: every key of a namespace; `prefix` has no characters that mean something in a glob."""
    return f"{prefix}:{namespace_id.hex()}:*"


def wrap(key: ObjectKey, parent: bytes, data: Bytes) -> bytes:
    """The value of an object."""
    return b"".join((seal(key, Envelope(len(data), parent)), data))


def seal(key: ObjectKey, envelope: Envelope) -> bytes:
    body = _ENVELOPE.pack(_MAGIC, VERSION, envelope.length, envelope.parent, 0)[:-8]
    return body + _checksum(key, body).to_bytes(8, "little")


def unseal(key: ObjectKey, value: bytes, value_bytes: int) -> Envelope:
    """The envelope of a value of `value_bytes`, from its first bytes. Raises NotOurs."""
    if len(value) < ENVELOPE_BYTES or not value.startswith(_MAGIC):
        raise NotOurs("foreign")
    head = value[:ENVELOPE_BYTES]
    _, version, length, parent, checksum = _ENVELOPE.unpack(head)
    if version != VERSION:
        raise NewerVersion
    if checksum != _checksum(key, head[:-8]):
        raise NotOurs("checksum")
    if value_bytes != ENVELOPE_BYTES + length:
        raise NotOurs("truncated")
    return Envelope(length, parent)


def _checksum(key: ObjectKey, body: bytes) -> int:
    return xxhash.xxh3_64_intdigest(_OWNER.pack(*key) + body)
