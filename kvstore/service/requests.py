"""Turns wire requests into checked values; the only place where their fields are trusted.

Every function raises InvalidRequest with one line that says what was expected. Limits bound the work and the
memory that one request can ask for; the messages themselves are bounded by `framing.CHANNEL_OPTIONS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvstore.errors import InvalidRequest
from kvstore.index.entry import ObjectKey
from kvstore_codec import Quality
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import DATA_BYTES_MAX, HASHES_MAX, OFFERED_OBJECTS_MAX, Framed

HASH_BYTES = 32
LAYOUT_BYTES_MAX = 1 << 20
PART_MAX = (1 << 16) - 1
LIST_LIMIT_MAX = 1000
PAGE_TOKEN_BYTES_MAX = 256
LEASE_ID_BYTES_MAX = 64
OBJECT_BYTES_MAX = 1 << 40
PRIORITY_MAX = 100
EVICTABLE_TIERS = ("host", "disk")
_QUALITIES = tuple(Quality)


def namespace(value: bytes) -> bytes:
    if len(value) != HASH_BYTES:
        raise InvalidRequest(f"namespace_id must be {HASH_BYTES} bytes", bytes=len(value))
    return value


def namespace_or_all(value: bytes) -> bytes | None:
    return namespace(value) if value else None


def hashes(value: bytes) -> list[bytes]:
    """The 32-byte hashes that `value` is made of, in order; possibly none."""
    if len(value) % HASH_BYTES:
        raise InvalidRequest(f"chunk_hashes must be a multiple of {HASH_BYTES} bytes", bytes=len(value))
    if len(value) > HASHES_MAX * HASH_BYTES:
        raise InvalidRequest(f"at most {HASHES_MAX} chunk hashes a call", hashes=len(value) // HASH_BYTES)
    found: list[bytes] = np.frombuffer(value, f"V{HASH_BYTES}").tolist()  # a slice each takes eight times as long
    return found


def some_hashes(value: bytes) -> list[bytes]:
    """The same, at least one."""
    if not value:
        raise InvalidRequest("name at least one chunk hash")
    return hashes(value)


def part(value: int) -> int:
    if value > PART_MAX:
        raise InvalidRequest(f"part must be 0–{PART_MAX}", part=value)
    return value


def quality(value: int) -> Quality:
    if value >= len(_QUALITIES):
        raise InvalidRequest(f"quality must be 0–{len(_QUALITIES) - 1}", quality=value)
    return _QUALITIES[value]


def lease_id(value: bytes) -> bytes:
    if len(value) > LEASE_ID_BYTES_MAX:
        raise InvalidRequest(f"lease_id must be at most {LEASE_ID_BYTES_MAX} bytes", bytes=len(value))
    return value


def first_chunk(value: bytes) -> bytes:
    """Empty: not said."""
    if value and len(value) != HASH_BYTES:
        raise InvalidRequest(f"first_chunk_hash must be {HASH_BYTES} bytes", bytes=len(value))
    return value


class Lookup(NamedTuple):
    """As `Node.find` takes it."""

    namespace_id: bytes
    hashes: list[bytes]
    part: int
    lease_ms: int
    first_chunk: bytes

    def keys(self) -> list[ObjectKey]:
        return [ObjectKey(self.namespace_id, chunk_hash, self.part) for chunk_hash in self.hashes]


def lookup(request: pb.LookupRequest) -> Lookup:
    return Lookup(
        namespace(request.namespace_id), hashes(request.chunk_hashes), part(request.part), request.lease_ms,
        first_chunk(request.first_chunk_hash),
    )  # fmt: skip


def fetch(request: pb.FetchRequest) -> tuple[list[ObjectKey], Quality, bytes]:
    """The objects that a fetch names, in order, the best quality it wants of them, and the prompt's first chunk."""
    namespace_id, of_part = namespace(request.namespace_id), part(request.part)
    lease_id(request.lease_id)
    keys = [ObjectKey(namespace_id, chunk_hash, of_part) for chunk_hash in hashes(request.chunk_hashes)]
    return keys, quality(request.quality), first_chunk(request.first_chunk_hash)


def held_bytes(request: pb.FetchRequest) -> Sequence[int]:
    """What the reader has of each chunk of a fetch; empty: nothing of any."""
    chunks = len(request.chunk_hashes) // HASH_BYTES
    if request.held_bytes and len(request.held_bytes) != chunks:
        raise InvalidRequest("held_bytes must say of each chunk", got=len(request.held_bytes), chunks=chunks)
    return request.held_bytes


def hash_prefix(value: bytes) -> bytes:
    if len(value) > HASH_BYTES:
        raise InvalidRequest(f"hash_prefix must be at most {HASH_BYTES} bytes", bytes=len(value))
    return value


def list_limit(value: int) -> int:
    return min(value, LIST_LIMIT_MAX) or LIST_LIMIT_MAX


def page_token(value: str) -> str:
    if len(value) > PAGE_TOKEN_BYTES_MAX:
        raise InvalidRequest(f"page_token must be at most {PAGE_TOKEN_BYTES_MAX} characters", length=len(value))
    return value


def tier_or_all(value: str) -> str | None:
    if value and value not in EVICTABLE_TIERS:
        raise InvalidRequest("unknown tier", tier=repr(value[:40]), known=" ".join(EVICTABLE_TIERS))
    return value or None


def put_offer(first: pb.PutRequest) -> pb.PutOffer:
    """The offer that a put stream opens with, all its fields checked."""
    if first.WhichOneof("kind") != "offer":
        raise InvalidRequest("a put starts with its offer")
    offer = first.offer
    namespace(offer.namespace_id)
    part(offer.part)
    if not 0 < len(offer.layout) <= LAYOUT_BYTES_MAX:
        raise InvalidRequest(f"layout must be 1–{LAYOUT_BYTES_MAX} bytes", bytes=len(offer.layout))
    if offer.durability not in (pb.DURABILITY_MEMORY, pb.DURABILITY_DISK):
        raise InvalidRequest("unknown durability", durability=offer.durability)
    if not 0 < len(offer.objects) <= OFFERED_OBJECTS_MAX:
        raise InvalidRequest(f"an offer has 1–{OFFERED_OBJECTS_MAX} objects", objects=len(offer.objects))
    for index, offered in enumerate(offer.objects):
        if len(offered.chunk_hash) != HASH_BYTES or len(offered.parent_hash) != HASH_BYTES:
            raise InvalidRequest(f"chunk_hash and parent_hash must be {HASH_BYTES} bytes", object_index=index)
        if not 0 < offered.object_bytes <= OBJECT_BYTES_MAX:
            raise InvalidRequest(f"object_bytes must be 1–{OBJECT_BYTES_MAX}", object_index=index)
        quality(offered.quality)
    first_chunk(offer.first_chunk_hash)
    if len({offered.chunk_hash for offered in offer.objects}) != len(offer.objects):
        raise InvalidRequest("an offer names each chunk once")
    retention(offer)
    return offer


def retention(offer: pb.PutOffer) -> tuple[int, int] | None:
    """(priority, seconds) of a put's hint, or None."""
    hint = offer.retention
    if hint.priority > PRIORITY_MAX:
        raise InvalidRequest(f"retention priority must be 0–{PRIORITY_MAX}", priority=hint.priority)
    return (hint.priority, hint.seconds) if hint.seconds else None


def put_piece(message: Framed[pb.PutRequest], objects: int) -> tuple[int, int, memoryview | bytes] | None:
    """(object index, offset, data) of a message after the offer; None: it is the commit."""
    kind = message.head.WhichOneof("kind")
    if kind == "commit":
        if len(message.data):
            raise InvalidRequest("a commit carries no data", bytes=len(message.data))
        return None
    if kind is not None:
        raise InvalidRequest("a put has one offer, at its start")
    if not 0 < len(message.data) <= DATA_BYTES_MAX:
        raise InvalidRequest(f"a piece has 1–{DATA_BYTES_MAX} bytes of data", bytes=len(message.data))
    if message.head.object_index >= objects:
        raise InvalidRequest("object_index is not in the offer", object_index=message.head.object_index)
    return message.head.object_index, message.head.offset, message.data
