"""What is known of one stored object, without its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvstore_codec import ObjectHeader, Quality


class ObjectKey(NamedTuple):
    namespace_id: bytes
    chunk_hash: bytes
    part: int

    @classmethod
    def of(cls, header: ObjectHeader) -> ObjectKey:
        """Of the object that has this header."""
        return cls(header.namespace_id, header.chunk_hash, header.part)


@dataclass(frozen=True, slots=True)
class Described:
    """What the index keeps of an object's header. `parent`: hash of the chunk before it; `quality`: of the whole
    object; `layer_bytes[q]`: length of its prefix that holds quality layers 0…q."""

    parent: bytes
    first_position: int
    tokens: int
    quality: Quality
    provenance: Quality
    layer_bytes: tuple[int, ...]

    @classmethod
    def of(cls, header: ObjectHeader, parent: bytes) -> Described:
        return cls(
            parent, header.first_position, header.tokens, header.quality, header.provenance, header.layer_bytes
        )  # fmt: skip

    @property
    def end_position(self) -> int:
        return self.first_position + self.tokens

    @property
    def layers(self) -> int:
        """Quality layers of the whole object."""
        return len(self.layer_bytes)

    @property
    def length(self) -> int:
        """Bytes of the whole object."""
        return self.layer_bytes[-1]

    def quality_of(self, layers: int) -> Quality:
        """What the first `layers` quality layers read at: one refinement less is one quality worse."""
        return Quality(self.quality + self.layers - layers)

    def layers_for(self, quality: Quality) -> int:
        """Quality layers to read for `quality`: the most that are no better than it, at least one."""
        return max(1, self.layers - max(0, quality - self.quality))


@dataclass(frozen=True)
class Retention:
    """A writer's hint: until `until_s` on the node's clock these go last, those of lower `priority` before others."""

    priority: int
    until_s: float
