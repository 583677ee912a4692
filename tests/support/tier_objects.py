"""Stored chunks put into a tier and read from it, without a node."""

from __future__ import annotations

import kv_objects as kv

import kvstore_codec as codec
from kvstore.index.entry import ObjectKey
from kvstore.tiers.base import Tier

LAYOUT = kv.small_layout()


def key_of(chunk: kv.StoredChunk, layout: codec.KVLayout = LAYOUT) -> ObjectKey:
    return ObjectKey(layout.namespace_id, chunk.hash, 0)


def put(tier: Tier, chunk: kv.StoredChunk, layout: codec.KVLayout = LAYOUT) -> ObjectKey:
    tier.put(key_of(chunk, layout), chunk.ref.parent, chunk.blob)
    return key_of(chunk, layout)


def whole(tier: Tier, chunk: kv.StoredChunk, layout: codec.KVLayout = LAYOUT) -> bytes | None:
    data = tier.read(key_of(chunk, layout), len(chunk.blob))
    return None if data is None else bytes(data)
