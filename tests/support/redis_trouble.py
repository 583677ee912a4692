"""Calls of a Redis tier in trouble: all of them miss, until it is back."""

from __future__ import annotations

from collections.abc import Callable

import kv_objects as kv
import pytest
from polling import wait_until
from redis_tiers import RECOVERY_S_MAX, bounded
from tier_objects import LAYOUT, key_of, put, whole

from kvstore.errors import TierFailed
from kvstore.tiers.redis import RedisTier

CHUNKS = kv.chunks(LAYOUT, 8, seed=1, quality="low")


def assert_all_miss(tier: RedisTier) -> None:
    """Every kind of call, each bounded: reads miss, changes raise."""
    key = key_of(CHUNKS[0])
    assert bounded(lambda: tier.read(key, 1)) is None
    assert bounded(lambda: tier.read_many([(key_of(chunk), 1) for chunk in CHUNKS])) == [None] * len(CHUNKS)
    assert bounded(lambda: tier.find(LAYOUT.namespace_id, [chunk.hash for chunk in CHUNKS], 0)) == []
    assert not bounded(tier.probe)
    changes: list[Callable[[], object]] = [
        lambda: put(tier, CHUNKS[0]), lambda: tier.delete(key), lambda: tier.truncate(key, 1),
        lambda: tier.purge(LAYOUT.namespace_id),
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(TierFailed):
            bounded(change)


def wait_for(tier: RedisTier, chunk: kv.StoredChunk) -> None:
    """Until the object is read again, as clients would: each call is bounded."""
    wait_until(lambda: bounded(lambda: whole(tier, chunk)) == chunk.blob, "it reads again", deadline_s=RECOVERY_S_MAX)


def wait_for_put(tier: RedisTier, chunk: kv.StoredChunk) -> None:
    def stored() -> bool:
        try:
            bounded(lambda: put(tier, chunk))
        except TierFailed:
            return False
        return True

    wait_until(stored, "it takes puts again", deadline_s=RECOVERY_S_MAX)
