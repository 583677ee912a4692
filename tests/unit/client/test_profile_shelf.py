"""What a client holds of profiles and believes of nodes: bounds, one transfer for many calls, deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from small_profiles import transform_profile

from kvstore_client import (
    DeadlineExceeded,
    KvClientError,
    KVLayout,
    Profile,
    ProfileDamaged,
    ProfileMissing,
    RequestRefused,
    Unavailable,
    profile_shelf,
)
from kvstore_client.connection import Node
from kvstore_client.deadline import Deadline
from kvstore_client.metrics import client_metrics
from kvstore_client.profile_shelf import BELIEVED_S, DAMAGED_S, ProfileShelf
from kvstore_client.profile_transfer import Placed
from kvstore_client.profiles import profile_refs
from kvstore_client.putting import Stored
from kvstore_codec import DEFAULT_TENANT_KEY

LAYOUT = KVLayout.uniform(model="m", revision="r", num_layers=1, kv_heads=1, head_dim=4, chunk_tokens=16)
PROFILES = [transform_profile(LAYOUT, seed) for seed in range(3)]
PROFILE, PROFILE_ID = PROFILES[0], PROFILES[0].profile_id
NODES = [Node(address, lambda: None) for address in ("a:1", "b:1")]  # type: ignore[arg-type, return-value]


class Nodes:
    """A transfer to nodes that are dictionaries; `calls` says what was asked of them. Waits while `open` is not set."""

    def __init__(self) -> None:
        self.held: dict[str, dict[bytes, Profile]] = {node.address: {} for node in NODES}
        self.broken: dict[str, KvClientError] = {}
        self.refusing = False
        self.size = 1
        self.calls: list[str] = []
        self.open = asyncio.Event()
        self.open.set()

    async def placed(self, profile: Profile) -> Placed:
        return Placed(profile, profile_refs(profile.profile_id, 1, DEFAULT_TENANT_KEY), self.size)

    async def holds(self, node: Node, placed: Placed, timeout: float) -> bool:
        await self._called("holds", node)
        return placed.profile.profile_id in self.held[node.address]

    async def store(self, node: Node, placed: Placed, *, durable: bool, deadline: Deadline) -> list[Stored]:
        await self._called("store", node)
        outcome = "rejected" if self.refusing else "stored"
        if not self.refusing:
            self.held[node.address][placed.profile.profile_id] = placed.profile
        return [Stored(placed.refs[0], outcome, "no room", durable, 1)]

    async def load(self, node: Node, profile_id: bytes, deadline: Deadline) -> Placed | None:
        await self._called("load", node)
        profile = self.held[node.address].get(profile_id)
        return None if profile is None else await self.placed(profile)

    async def _called(self, what: str, node: Node) -> None:
        self.calls.append(f"{what} {node.address[0]}")
        await self.open.wait()
        if node.address in self.broken:
            raise self.broken[node.address]


class Bench:
    def __init__(self) -> None:
        self.now = 100.0
        self.nodes = Nodes()
        self.registry = CollectorRegistry()
        transfer: Callable[[], Any] = lambda: self.nodes  # noqa: E731
        self.shelf = ProfileShelf(transfer, client_metrics(self.registry), lambda: self.now)

    async def get(self, profile_id: bytes = PROFILE_ID, seconds: float = 5.0) -> Profile:
        return await self.shelf.get(NODES, profile_id, Deadline(seconds))

    async def ensure(self, *, durable: bool = False, seconds: float = 5.0) -> bool:
        return await self.shelf.ensure(NODES[0], PROFILE, durable=durable, deadline=Deadline(seconds))

    def gave_up(self, reason: str) -> float:
        labels = {"call": "profile", "reason": reason}
        return self.registry.get_sample_value("kvstore_client_failures_total", labels) or 0.0


@pytest.fixture
async def bench() -> Bench:
    return Bench()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


# Loading


async def test_a_profile_is_loaded_once_and_from_the_first_node_that_has_it(bench: Bench) -> None:
    bench.nodes.held["b:1"][PROFILE_ID] = PROFILE
    got = await asyncio.gather(*(bench.get() for _ in range(5)))
    assert got == [PROFILE] * 5
    assert await bench.get() is PROFILE
    assert bench.nodes.calls == ["load a", "load b"]


async def test_what_no_node_has_is_missing_and_asked_for_again(bench: Bench) -> None:
    for _ in range(2):
        with pytest.raises(ProfileMissing, match=PROFILE_ID.hex()):
            await bench.get()
    assert bench.nodes.calls == ["load a", "load b"] * 2
    assert bench.gave_up("profile_missing") == 2


async def test_it_is_not_missing_where_a_node_could_not_be_asked(bench: Bench) -> None:
    bench.nodes.broken["a:1"] = Unavailable("gone")
    with pytest.raises(Unavailable):
        await bench.get()
    bench.nodes.held["b:1"][PROFILE_ID] = PROFILE
    assert await bench.get() is PROFILE


async def test_a_damaged_one_is_not_loaded_again_for_a_while(bench: Bench) -> None:
    bench.nodes.broken["a:1"] = ProfileDamaged("damaged")
    for _ in range(3):
        with pytest.raises(ProfileDamaged):
            await bench.get()
    assert bench.nodes.calls == ["load a", "load b"]
    del bench.nodes.broken["a:1"]
    bench.nodes.held["a:1"][PROFILE_ID] = PROFILE
    bench.now += DAMAGED_S
    assert await bench.get() is PROFILE


async def test_a_load_goes_on_after_the_deadline_of_the_call_that_began_it(bench: Bench) -> None:
    bench.nodes.held["a:1"][PROFILE_ID] = PROFILE
    bench.nodes.open.clear()
    with pytest.raises(DeadlineExceeded, match="travels on"):
        await bench.get(seconds=0.01)
    bench.nodes.open.set()
    await settled()
    assert await bench.get(seconds=0.01) is PROFILE
    assert bench.nodes.calls == ["load a"]


async def test_a_call_that_is_cancelled_takes_no_other_with_it(bench: Bench) -> None:
    bench.nodes.held["a:1"][PROFILE_ID] = PROFILE
    bench.nodes.open.clear()
    first, second = asyncio.ensure_future(bench.get()), asyncio.ensure_future(bench.get())
    await settled()
    first.cancel()
    bench.nodes.open.set()
    assert await second is PROFILE
    assert first.cancelled()


async def test_closing_ends_the_calls_that_wait(bench: Bench) -> None:
    bench.nodes.open.clear()
    call = asyncio.ensure_future(bench.get())
    await settled()
    await bench.shelf.aclose()
    with pytest.raises(Unavailable, match="closed"):
        await call


async def test_memory_is_bounded_and_the_last_used_stays(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_shelf, "HELD_BYTES_MAX", 2)
    bench.nodes.held["a:1"] = {profile.profile_id: profile for profile in PROFILES}
    for each in (0, 1, 0, 2):  # the third pushes out 1, which was used before 0
        await bench.get(PROFILES[each].profile_id)
    assert bench.nodes.calls == ["load a"] * 3
    for each in (0, 2, 1):
        await bench.get(PROFILES[each].profile_id)
    assert bench.nodes.calls.count("load a") == 4
    bench.nodes.size = 100
    for _ in range(2):
        await bench.get(PROFILES[0].profile_id)  # larger than the bound: held all the same
    assert bench.nodes.calls.count("load a") == 5


# Storing


async def test_a_node_is_believed_for_a_while(bench: Bench) -> None:
    for _ in range(3):
        await bench.ensure()
    assert bench.nodes.calls == ["store a"]
    bench.now += BELIEVED_S
    await bench.ensure()
    assert bench.nodes.calls == ["store a"] * 2
    bench.shelf.doubt()
    await bench.ensure()
    assert bench.nodes.calls == ["store a"] * 3


async def test_what_is_in_memory_is_not_on_disk(bench: Bench) -> None:
    assert not await bench.ensure(durable=False)
    assert await bench.ensure(durable=True)
    assert await bench.ensure(durable=True)
    assert bench.nodes.calls == ["store a"] * 2
    await bench.ensure(durable=False)
    assert bench.nodes.calls == ["store a"] * 2, "what is on disk is there"


async def test_a_node_that_does_not_take_it_is_asked_again(bench: Bench) -> None:
    bench.nodes.refusing = True
    for _ in range(2):
        with pytest.raises(RequestRefused, match="no room"):
            await bench.ensure()
    bench.nodes.refusing = False
    await bench.ensure()
    assert bench.nodes.calls == ["store a"] * 3


async def test_many_puts_store_it_once(bench: Bench) -> None:
    bench.nodes.open.clear()
    puts = [asyncio.ensure_future(bench.ensure()) for _ in range(5)]
    late = asyncio.ensure_future(bench.ensure(seconds=0.01))
    with pytest.raises(DeadlineExceeded):
        await late
    bench.nodes.open.set()
    await asyncio.gather(*puts)
    assert bench.nodes.calls == ["store a"]


async def test_a_reader_says_now_and_then_that_it_uses_a_profile(bench: Bench) -> None:
    bench.nodes.held["a:1"][PROFILE_ID] = PROFILE
    await bench.get()
    for seconds in (0.0, BELIEVED_S, 0.0):
        bench.now += seconds
        bench.shelf.use(NODES[0], PROFILE)
        await settled()
    assert bench.nodes.calls == ["load a", "holds a"]


async def test_a_use_that_finds_it_gone_makes_the_next_put_store_it(bench: Bench) -> None:
    await bench.ensure()
    bench.now += BELIEVED_S
    bench.nodes.held["a:1"].clear()
    bench.shelf.use(NODES[0], PROFILE)
    await settled()
    await bench.ensure()
    assert bench.nodes.calls == ["store a", "holds a", "store a"]
