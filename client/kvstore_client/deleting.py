"""Delete, as asked for, and of chunks that nobody can read any more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from kvstore_client.connection import Node, failures, timeout_s, understood
from kvstore_client.deadline import Deadline
from kvstore_client.results import ChunkHit
from kvstore_codec import KVLayout
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import HASHES_MAX

_LOST_MAX = 1 << 16


async def deleted(
    node: Node, layout: KVLayout, part: int, hashes: Sequence[bytes], limit: Deadline
) -> AsyncIterator[tuple[int, int]]:
    """(objects, bytes) removed from one node, a call at a time; without hashes, of the whole namespace.

    Raises the typed error of a failed call."""
    for first in range(0, len(hashes) or 1, HASHES_MAX):
        request = pb.DeleteRequest(
            namespace_id=layout.namespace_id, part=part, chunk_hashes=b"".join(hashes[first : first + HASHES_MAX])
        )
        async with failures(node):
            answer = understood(node, await node.stub.Delete(request, timeout=timeout_s(limit)))
        yield answer.objects, answer.bytes


class LostChunks:
    """Chunks that a get found coded with a profile that is gone."""

    def __init__(self, layout: KVLayout, part: int) -> None:
        self._layout, self._part = layout, part
        self._hashes: set[bytes] = set()

    def add(self, chunks: Sequence[ChunkHit]) -> None:
        """From the first on that has lost its profile; the others are of no use without it."""
        if len(self._hashes) + len(chunks) > _LOST_MAX:
            self._hashes.clear()
        self._hashes.update(chunk.hash for chunk in chunks)

    async def taken_out(self, node: Node, held: Sequence[ChunkHit], limit: Deadline) -> Sequence[ChunkHit]:
        """`held` without the lost ones. The node lets go of them: it would keep what nobody can read, and refuse to
        take what can be read, for as long as it is looked up."""
        lost = [chunk.hash for chunk in held if chunk.hash in self._hashes]
        if lost:
            async for _ in deleted(node, self._layout, self._part, lost, limit):
                pass
            self._hashes.difference_update(lost)
        return [chunk for chunk in held if chunk.hash not in lost]
