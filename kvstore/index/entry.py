"""What the index knows of one stored object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvstore_codec import ObjectHeader, Quality


class ObjectKey(NamedTuple):
    namespace_id: bytes
    chunk_hash: bytes
    part: int


@dataclass(slots=True, eq=False)
class Entry:
    """One object. `layer_bytes[q]` is the length of its prefix holding quality layers 0…q; `parent` the hash of the
    chunk before it; `tiers` the tiers that hold all of it, fastest first; `last_use` a tick of the index."""

    key: ObjectKey
    parent: bytes
    header: ObjectHeader
    tiers: tuple[str, ...] = ()
    last_use: int = 0
    last_use_s: float = 0.0
    reads: int = 0

    @property
    def parent_key(self) -> ObjectKey:
        return self.key._replace(chunk_hash=self.parent)

    @property
    def length(self) -> int:
        return self.header.object_bytes

    @property
    def quality(self) -> Quality:
        return self.header.quality

    def at_least(self, quality: int) -> bool:
        """Holds `quality` or better."""
        return self.quality <= quality
