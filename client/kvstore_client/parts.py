"""Several parts of a layout as one: for who holds more of a model than one part, or all of it.

A layout's `Partition` says in which parts chunks are stored. It is the same for all who share them, and each takes the
parts that it holds: with four head groups a worker of two takes two, one that is alone all four. Each part is an object
of its own, so nothing is fetched that is not wanted, and nobody has to gather heads from others to store them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import kvstore_codec as codec
from kvstore_client.errors import InvalidArgument
from kvstore_client.kv_views import sliceable
from kvstore_client.namespace import LEASE_MS, AsyncNamespace
from kvstore_client.namespace_puts import TokenIds
from kvstore_client.planner.costs import PrefillSeconds
from kvstore_client.planner.estimates import Speeds
from kvstore_client.refining import AsyncRefinement
from kvstore_client.results import ChunkHit, Hit, Lease, PutResult, Restored
from kvstore_codec import KVArray, KVLayout, Partition, Quality
from kvstore_codec.arrays import PagedKV

T = TypeVar("T")


class AsyncPartsNamespace:
    """KV of some parts of a layout: it has the layers and heads of all of them, in the model's order. Made by
    `AsyncClient.parts`; see AsyncNamespace for the calls, which end when those for every part have."""

    def __init__(self, namespaces: Sequence[AsyncNamespace]) -> None:
        """Of each part, ascending. Raises InvalidArgument where they are no rectangle of layers and heads."""
        self.layout = namespaces[0].layout
        self.parts = tuple(each.part for each in namespaces)
        self._namespaces = namespaces
        self._slices = _slices(self.layout, self.parts)
        self._layout = _layout_of(self.layout, self.parts)

    async def lookup(
        self, token_ids: TokenIds, *, first_token: int = 0, lease_ms: int = LEASE_MS, deadline: float | None = None
    ) -> Hit:
        """The longest prefix of which every part is stored; qualities and sizes are of all parts together."""
        return _hit_of(
            await _all(
                each.lookup(token_ids, first_token=first_token, lease_ms=lease_ms, deadline=deadline)
                for each in self._namespaces
            )
        )

    async def get(
        self, token_ids: TokenIds, *, quality: str | Quality | None = None, min_quality: str | Quality = "low",
        out: KVArray | None = None, first_token: int = 0, ttft: float | None = None,
        prefill_tokens_per_s: float | PrefillSeconds | None = None, node: str = "", deadline: float | None = None,
    ) -> Restored[AsyncRefinement]:  # fmt: skip
        """(kv, n): as far as every part came. Where a plan is asked for, each part follows its own, by what it measures
        beside the others."""
        if out is None:
            hit = await self.lookup(token_ids, first_token=first_token, deadline=deadline)
            out = codec.empty(self._layout, max(0, hit.tokens - first_token))
        out = sliceable(out, self._layout)
        codec.token_count(out, self._layout)  # raises LayoutError of the whole, not of a slice of it
        restored = await _all(
            each.get(
                token_ids, quality=quality, min_quality=min_quality, out=_part_of(out, *place), first_token=first_token,
                ttft=ttft, prefill_tokens_per_s=prefill_tokens_per_s, node=node, deadline=deadline,
            )
            for each, place in zip(self._namespaces, self._slices, strict=True)
        )  # fmt: skip
        shortest = min(restored, key=lambda part: part.n)
        return Restored(codec.token_slice(out, 0, shortest.n), shortest.n, reason=shortest.reason)

    def speeds(self) -> dict[str, Speeds]:
        """As of one of the parts: they are read side by side, over the same network."""
        return self._namespaces[0].speeds()

    async def put(
        self, token_ids: TokenIds, kv: KVArray, *, quality: str | Quality = "high", durable: bool = False,
        provenance: str | Quality = "raw", first_token: int = 0, retain: tuple[int, int] | None = None,
        deadline: float | None = None,
    ) -> PutResult:  # fmt: skip
        """Counts chunks: stored where a part of it was, there already where all were, rejected where one was."""
        kv = sliceable(kv, self._layout)
        codec.token_count(kv, self._layout)
        return _put_of(
            await _all(
                each.put(
                    token_ids, _part_of(kv, *place), quality=quality, durable=durable, provenance=provenance,
                    first_token=first_token, retain=retain, deadline=deadline,
                )
                for each, place in zip(self._namespaces, self._slices, strict=True)
            )
        )  # fmt: skip


async def _all(calls: Iterable[Awaitable[T]]) -> list[T]:
    """Their results, when all have ended: no part may still be written to when another has failed."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


def _slices(layout: KVLayout, parts: Sequence[int]) -> list[tuple[slice, slice]]:
    """(layers, heads) of each part, in the KV of all of them."""
    groups = layout.partition.head_groups
    layer_groups, head_groups = sorted({part // groups for part in parts}), sorted({part % groups for part in parts})
    expected = [layer * groups + head for layer in layer_groups for head in head_groups]
    contiguous = all(each[-1] - each[0] == len(each) - 1 for each in (layer_groups, head_groups))
    if list(parts) != expected or not contiguous:
        raise InvalidArgument("parts must be neighbouring head groups of neighbouring layer groups", parts=tuple(parts))
    if len({layer.kv_heads for layer in layout.layers}) != 1:
        raise InvalidArgument("several parts at once need layers with equally many heads")
    layers, heads = layout.num_layers // layout.partition.layer_groups, layout.layers[0].kv_heads // groups
    return [
        (
            slice((part // groups - layer_groups[0]) * layers, (part // groups - layer_groups[0] + 1) * layers),
            slice((part % groups - head_groups[0]) * heads, (part % groups - head_groups[0] + 1) * heads),
        )
        for part in parts
    ]


def _layout_of(layout: KVLayout, parts: Sequence[int]) -> KVLayout:
    """Of the KV of these parts together; its identity is nobody's."""
    groups = layout.partition.head_groups
    layers = layout.num_layers // layout.partition.layer_groups
    first, last = parts[0] // groups, parts[-1] // groups + 1
    heads = len({part % groups for part in parts})
    return replace(
        layout, partition=Partition(),
        layers=tuple(
            replace(layer, kv_heads=layer.kv_heads // groups * heads)
            for layer in layout.layers[first * layers : last * layers]
        ),
    )  # fmt: skip


def _part_of(kv: KVArray, layers: slice, heads: slice) -> KVArray:
    """Views of some layers' some heads, in the form in which `kv` came."""
    if isinstance(kv, PagedKV):
        return kv.part(layers, heads)
    if isinstance(kv, list | tuple):
        return [(k[:, heads], v[:, heads]) for k, v in kv[layers]]
    return kv[layers, :, :, heads]


def _hit_of(hits: Sequence[Hit]) -> Hit:
    chunks = tuple(_chunk_of(of_parts) for of_parts in zip(*(hit.chunks for hit in hits), strict=False))
    leases = [hit.lease for hit in hits if hit.lease is not None]
    lease = None
    if len(leases) == len(hits) and len({each.node for each in leases}) == 1:  # else they run out by themselves
        ids = tuple(lease_id for each in leases for lease_id in each.ids)
        lease = Lease(ids, min(each.duration_ms for each in leases), leases[0].node)
    tokens = chunks[-1].first_token + chunks[-1].tokens if chunks else 0
    return Hit(tokens, chunks, lease, max(hit.latency_s for hit in hits))


def _chunk_of(parts: Sequence[ChunkHit]) -> ChunkHit:
    tiers = {part.tier for part in parts}
    return replace(
        parts[0], quality=max(part.quality for part in parts), provenance=max(part.provenance for part in parts),
        stored_bytes=sum(part.stored_bytes for part in parts), tier=tiers.pop() if len(tiers) == 1 else "several",
    )  # fmt: skip


def _put_of(results: Sequence[PutResult]) -> PutResult:
    chunks = max(result.stored + result.have + result.rejected for result in results)
    rejected, have = max(result.rejected for result in results), min(result.have for result in results)
    have = min(have, chunks - rejected)
    return PutResult(
        stored=chunks - rejected - have, have=have, rejected=rejected,
        tokens=min(result.tokens for result in results), bytes=sum(result.bytes for result in results),
        durable=all(result.durable for result in results),
        reasons=tuple(dict.fromkeys(reason for result in results for reason in result.reasons)),
    )  # fmt: skip
