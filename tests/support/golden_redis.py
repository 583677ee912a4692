"""The values in Redis that are pinned in tests/vectors/redis.json: keys and envelopes, for some objects."""

from __future__ import annotations

from golden import VECTORS

from kvstore.index.entry import ObjectKey
from kvstore.tiers.redis_format import value_key, wrap

PINNED = VECTORS / "redis.json"
PREFIX = "kvstore"
CASES = {
    "empty": (ObjectKey(bytes(32), bytes(32), 0), bytes(32), b""),
    "one byte": (ObjectKey(b"\xff" * 32, bytes(range(32)), 7), bytes(range(32, 64)), b"\x5a"),
    "last part": (ObjectKey(bytes(range(100, 132)), b"\x01" * 32, 65535), b"\x02" * 32, bytes(range(256)) * 300),
}


def values() -> dict[str, dict[str, str | int]]:
    """Per case the arguments and what comes of them; object bytes are not repeated."""
    return {
        name: {
            "namespace_id": key.namespace_id.hex(), "chunk_hash": key.chunk_hash.hex(), "part": key.part,
            "parent": parent.hex(), "object_bytes": len(data),
            "key": value_key(PREFIX, key).decode(), "envelope": wrap(key, parent, data)[:64].hex(),
        }
        for name, (key, parent, data) in CASES.items()
    }  # fmt: skip
