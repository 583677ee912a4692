"""What a fetch asks for, by whatever way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore_client.results import ChunkHit
from kvstore_codec import KVLayout, Quality, object_bytes_max
from kvstore_proto.v1 import store_pb2 as pb


class Wants(Protocol):
    """What transports have to know of it."""

    @property
    def chunks(self) -> Sequence[object]:
        """In the order in which their objects are to come."""

    def bytes_max(self, index: int) -> int:
        """Of the object of a chunk."""

    def request(self, lease_id: bytes) -> pb.FetchRequest: ...


@dataclass(frozen=True)
class Wanted:
    """`chunks` of a prompt at `quality`, none of an effective quality under `min_quality`. `first_chunk`: hash of the
    prompt's first chunk, where it is not among them. `held_bytes`: of each chunk's object, what is here already and
    need not travel; empty: nothing."""

    layout: KVLayout
    part: int
    chunks: Sequence[ChunkHit]
    quality: Quality
    min_quality: Quality
    first_chunk: bytes = b""
    held_bytes: Sequence[int] = ()

    def bytes_max(self, index: int) -> int:
        """Of the object of a chunk. Since it was looked up a larger one may have taken its place: what was declared is
        no bound, what the layout allows is."""
        token_bytes = self.layout.part_layout(self.part).bytes_per_token
        return object_bytes_max(self.chunks[index].tokens * token_bytes)

    def request(self, lease_id: bytes) -> pb.FetchRequest:
        return pb.FetchRequest(
            namespace_id=self.layout.namespace_id, chunk_hashes=b"".join(chunk.hash for chunk in self.chunks),
            part=self.part, quality=self.quality, lease_id=lease_id,
            first_chunk_hash=self.first_chunk, held_bytes=self.held_bytes,
        )  # fmt: skip
