"""Lookup: which prefix of a chain of chunks a node holds."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore_client.connection import Node, failures, understood
from kvstore_client.connection import timeout_s as remaining_s
from kvstore_client.deadline import Deadline
from kvstore_client.errors import ProtocolViolation
from kvstore_client.results import ChunkHit, Hit, Lease, PrefetchResult
from kvstore_codec import ChunkRef, KVLayout, Quality, object_bytes_max
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import HASHES_MAX

_QUALITIES: dict[int, Quality] = {int(quality): quality for quality in Quality}
_TIERS = {number: name.removeprefix("TIER_").lower() for name, number in pb.Tier.items()}


async def lookup(
    node: Node, layout: KVLayout, part: int, refs: Sequence[ChunkRef], *, lease_ms: int, timeout_s: float,
    first_chunk: bytes = b"",
) -> Hit:  # fmt: skip
    """The longest prefix of `refs` that `node` holds. `first_chunk`: as `lookup_request` has it. Raises the typed error
    of a failed call, ProtocolViolation."""
    limit = Deadline(timeout_s)
    found: list[ChunkHit] = []
    lease_ids: list[bytes] = []
    granted_ms = lease_ms
    for first in range(0, len(refs), HASHES_MAX):
        asked = refs[first : first + HASHES_MAX]
        request = lookup_request(
            layout, part, asked, lease_ms, first_chunk or (refs[0].hash if first else b"")
        )  # fmt: skip
        async with failures(node):
            answer = understood(node, await node.stub.Lookup(request, timeout=remaining_s(limit)))
        hits = hits_of(node.address, layout, part, asked, answer)
        found += hits
        if answer.lease_id:
            lease_ids.append(answer.lease_id)
            granted_ms = min(granted_ms, answer.lease_ms)
        if len(hits) < len(asked):
            break
    tokens = found[-1].first_token + found[-1].tokens if found else 0
    return Hit(tokens, tuple(found), Lease(tuple(lease_ids), granted_ms, node.address) if lease_ids else None)


def lookup_request(
    layout: KVLayout, part: int, refs: Sequence[ChunkRef], lease_ms: int, first_chunk: bytes = b""
) -> pb.LookupRequest:
    """Of at most HASHES_MAX chunks. `first_chunk`: hash of the prompt's first one, where it is not among them."""
    return pb.LookupRequest(
        namespace_id=layout.namespace_id, chunk_hashes=b"".join(ref.hash for ref in refs), part=part,
        lease_ms=lease_ms, first_chunk_hash=first_chunk,
    )  # fmt: skip


def hits_of(
    node: str, layout: KVLayout, part: int, asked: Sequence[ChunkRef], answer: pb.LookupResponse
) -> list[ChunkHit]:
    """What a node's answer says of the chunks asked for. Raises ProtocolViolation. There may be thousands: each costs
    little but itself."""
    columns = (answer.tokens, answer.quality, answer.provenance, answer.stored_bytes, answer.tier)
    count = len(answer.tokens)
    if count > len(asked) or any(len(column) != count for column in columns):
        raise ProtocolViolation("a lookup answered more chunks than were asked for", node=node)
    token_bytes = layout.part_layout(part).bytes_per_token
    hits: list[ChunkHit] = []
    for ref, tokens, quality, provenance, stored_bytes, tier in zip(asked, *columns, strict=False):
        sane = (
            tokens == ref.tokens
            and quality in _QUALITIES
            and provenance in _QUALITIES
            and 0 < stored_bytes <= object_bytes_max(tokens * token_bytes)
        )
        if not sane:
            raise ProtocolViolation(
                "a lookup answered an impossible chunk", node=node, tokens=tokens, expected=ref.tokens,
                quality=quality, provenance=provenance, stored_bytes=stored_bytes,
            )  # fmt: skip
        hits.append(ChunkHit(
            ref.hash, ref.first_token, tokens, _QUALITIES[quality], _QUALITIES[provenance], stored_bytes,
            _TIERS.get(tier, "unknown"),
        ))  # fmt: skip
    return hits


async def prefetch(
    node: Node, layout: KVLayout, part: int, refs: Sequence[ChunkRef], quality: Quality, timeout_s: float
) -> PrefetchResult:  # fmt: skip
    """Hints that all of `refs` will be read. Raises the typed error of a failed call, ProtocolViolation."""
    limit = Deadline(timeout_s)
    held = under_way = 0
    for first in range(0, len(refs), HASHES_MAX):
        asked = refs[first : first + HASHES_MAX]
        request = pb.PrefetchRequest(
            namespace_id=layout.namespace_id, chunk_hashes=b"".join(ref.hash for ref in asked), part=part,
            quality=quality, first_chunk_hash=refs[0].hash if first else b"",
        )  # fmt: skip
        async with failures(node):
            answer = understood(node, await node.stub.Prefetch(request, timeout=remaining_s(limit)))
        if answer.held + answer.under_way > len(asked):
            raise ProtocolViolation("a prefetch answered more chunks than were asked for", node=node.address)
        held, under_way = held + answer.held, under_way + answer.under_way
    return PrefetchResult(held, under_way)


def good_enough(chunks: Sequence[ChunkHit], floor: Quality) -> Sequence[ChunkHit]:
    """The chunks before the first that is of less quality than `floor`."""
    bad = next((index for index, chunk in enumerate(chunks) if chunk.effective_quality > floor), len(chunks))
    return chunks[:bad]
