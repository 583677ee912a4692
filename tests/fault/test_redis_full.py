"""The Redis tier on servers that are full: they take nothing, or evict what is about to be read."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import kv_objects as kv
import pytest
from redis_process import RedisProcess
from redis_tiers import Told, bounded, redis_tier
from redis_trouble import CHUNKS
from tier_objects import put, whole

from kvstore.errors import TierFull
from kvstore.index.entry import ObjectKey
from kvstore.tiers.redis import RedisTier

Launch = Callable[..., RedisProcess]


def test_full_without_eviction_takes_nothing_and_still_answers(
    server: RedisProcess, tier: RedisTier, told: Told
) -> None:
    keys = [put(tier, chunk) for chunk in CHUNKS]
    server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
    server.command("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(TierFull, match="maxmemory"):
        bounded(lambda: put(tier, CHUNKS[0]))
    assert [whole(tier, chunk) for chunk in CHUNKS] == [chunk.blob for chunk in CHUNKS]
    assert tier.delete_many(keys) == len(keys)
    assert tier.state == "closed", "a full server is no broken one"
    assert told.failures == {("put", "full"): 1}
    server.command("CONFIG", "SET", "maxmemory", "100mb")
    put(tier, CHUNKS[0])


def fill(tier: RedisTier, rng: random.Random, size_bytes: int) -> None:
    """Objects of a namespace that nobody asks for."""
    for _ in range(size_bytes // 50_000):
        tier.put(ObjectKey(bytes(32), rng.randbytes(32), 0), bytes(32), bytes(50_000))


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random", "volatile-ttl"])
def test_eviction_between_find_and_read_is_a_miss(server: RedisProcess, told: Told, policy: str) -> None:
    tier = redis_tier(server, told, timeout_s=1.0, ttl_s=1000)
    layout = kv.small_layout(layers=8, head_dim=64)
    chunks = kv.chunks(layout, 60, seed=2)
    server.command("CONFIG", "SET", "maxmemory-policy", policy)
    server.command("CONFIG", "SET", "maxmemory", "10mb")
    for chunk in chunks:
        put(tier, chunk, layout)
    found = tier.find(layout.namespace_id, [chunk.hash for chunk in chunks], 0)
    assert len(found) == len(chunks)
    fill(tier, random.Random(3), 20 << 20)
    read = tier.read_many([(each.key, each.length) for each in found])
    assert None in read, "nothing was evicted in between"
    assert all(data is None or bytes(data) == chunk.blob for data, chunk in zip(read, chunks, strict=True))
    assert not told.failures
    assert not told.damages
    tier.close()


@pytest.mark.slow
def test_eviction_during_reads_is_a_miss(server: RedisProcess, told: Told) -> None:
    """The same with everything at once, until a read has met an eviction a few times."""
    tier = redis_tier(server, told, timeout_s=5.0, ttl_s=1000)
    layout = kv.small_layout(layers=8, head_dim=64)
    chunks = kv.chunks(layout, 60, seed=2)
    server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    server.command("CONFIG", "SET", "maxmemory", "6mb")
    stop = threading.Event()

    def fill_on() -> None:
        rng = random.Random(3)
        while not stop.is_set():
            fill(tier, rng, 50_000)

    def lost() -> int:
        for chunk in chunks:
            put(tier, chunk, layout)
        found = tier.find(layout.namespace_id, [chunk.hash for chunk in chunks], 0)
        read = tier.read_many([(each.key, each.length) for each in found])
        assert all(data is None or bytes(data) == chunk.blob for data, chunk in zip(read, chunks, strict=False))
        return sum(data is None for data in read)

    filler = threading.Thread(target=fill_on)
    filler.start()
    try:
        total = 0
        end_s = time.monotonic() + 60
        while total < 3 and time.monotonic() < end_s:
            total += lost()
    finally:
        stop.set()
        filler.join()
    assert total >= 3, "nothing was evicted in between"
    assert not told.failures
    assert not told.damages
    tier.close()
