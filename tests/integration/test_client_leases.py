"""Leases and hints of the client on a real node that is always full."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from kv_objects import small_layout
from kv_strategies import bits
from node_process import NodeProcess

from kvstore_client import AsyncClient, Client, InvalidArgument, KVLayout, Namespace

CHUNK = 16
LAYOUT = small_layout("leases", layers=16, head_dim=64)  # 128 KiB a chunk: eight fill the node
Prompt = tuple[list[int], Any]


@pytest.fixture
def node(start_node: Callable[..., NodeProcess]) -> NodeProcess:
    return start_node("--host-capacity", "1MiB", "--eviction-policy", "lru")


@pytest.fixture
def cache(node: NodeProcess) -> Iterator[Namespace]:
    with Client(node.address, strict=True, deadline=20.0) as client:
        yield client.namespace(LAYOUT)


def prompt(layout: KVLayout, seed: int) -> Prompt:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 50_000, 2 * CHUNK).tolist()
    kv = rng.standard_normal((16, 2, 2 * CHUNK, 2, 64)).astype(np.float16)
    return tokens, kv


def pass_s(seconds: float) -> None:
    """Time itself is what leases are about."""
    threading.Event().wait(seconds)


def press(cache: Namespace, first_seed: int) -> None:
    """Puts more than the node holds."""
    for seed in range(first_seed, first_seed + 6):
        cache.put(*prompt(LAYOUT, seed), quality="raw")


def test_what_is_held_stays_beyond_its_leases_own_time_and_goes_afterwards(cache: Namespace) -> None:
    tokens, kv = prompt(LAYOUT, 1)
    cache.put(tokens, kv, quality="raw")
    with cache.held(tokens, lease_ms=400) as hit:
        assert hit.tokens == 2 * CHUNK
        pass_s(1.2)
        press(cache, 10)
        assert bits(cache.get(tokens, deadline=0.5)[0]) == bits(kv)
    pass_s(1.6)  # the lease of the get above: its deadline and a second
    press(cache, 30)
    assert cache.lookup(tokens, lease_ms=0).tokens == 0, "held no longer, though its lease had time left"


def test_a_lease_is_renewed_released_and_lost(cache: Namespace) -> None:
    tokens, kv = prompt(LAYOUT, 2)
    cache.put(tokens, kv, quality="raw")
    hit = cache.lookup(tokens, lease_ms=300)
    assert cache.renew(hit, lease_ms=60_000)
    pass_s(0.5)
    press(cache, 10)
    assert cache.lookup(tokens, lease_ms=0).tokens == 2 * CHUNK
    assert not cache.renew(hit, lease_ms=0), "let go"
    press(cache, 20)
    assert cache.lookup(tokens, lease_ms=0).tokens == 0
    assert not cache.renew(hit, lease_ms=1000), "a lease that is no more stays so"
    with pytest.raises(InvalidArgument, match="lease_ms"):
        cache.renew(hit, lease_ms=-1)
    assert not cache.renew(cache.lookup(tokens))


def test_what_a_writer_asks_to_retain_goes_after_the_rest_until_its_time_is_over(cache: Namespace) -> None:
    tokens, kv = prompt(LAYOUT, 3)
    cache.put(tokens, kv, quality="raw", retain=(10, 3))
    press(cache, 10)
    assert cache.lookup(tokens, lease_ms=0).tokens == 2 * CHUNK
    pass_s(3.1)
    press(cache, 20)
    assert cache.lookup(tokens, lease_ms=0).tokens == 0
    for wrong in ((-1, 5), (101, 5), (1, 0), (1, 10**9)):
        with pytest.raises(InvalidArgument, match="retain"):
            cache.put(tokens, kv, retain=wrong)


async def test_a_node_that_goes_away_does_not_disturb_what_is_inside(node: NodeProcess) -> None:
    tokens, kv = prompt(LAYOUT, 4)
    async with AsyncClient(node.address, deadline=5.0) as client:
        cache = client.namespace(LAYOUT)
        await cache.put(tokens, kv, quality="raw")
        async with cache.held(tokens, lease_ms=300) as hit:
            assert hit.lease is not None
            node.kill()
            await asyncio.sleep(0.6)
        assert not await cache.renew(hit)
