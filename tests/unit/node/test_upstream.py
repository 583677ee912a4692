"""Nodes upstream as one place, with peers in memory: what is asked of whom, how often, and what a failure costs."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from contextlib import aclosing

import pytest
from memory_peer import CHAIN, HIGH, Kept, MemoryPeer, calls, holding, put_object, read, settle, told
from prometheus_client import CollectorRegistry
from tier_objects import LAYOUT, key_of

import kvstore_codec as codec
from kvstore.engine import upstream_reads, upstream_writes
from kvstore.engine.outside import UNKNOWN, Chain, Outside, PutObject
from kvstore.engine.owed import Owed, OwedObject
from kvstore.engine.upstream import Upstream
from kvstore.metrics import NodeMetrics
from kvstore_client.circuit import Circuit
from kvstore_client.errors import ProtocolViolation, Unavailable
from kvstore_cluster.placement import rank
from kvstore_codec import Quality


def upstream(*peers: MemoryPeer, waits: bool = False) -> tuple[Upstream, NodeMetrics]:
    """Not started: nothing is made good (that is test_upstream_repair.py's)."""
    metrics = NodeMetrics(CollectorRegistry())
    owed = Owed(peer.address for peer in peers)
    return Upstream(peers, metrics, timeout_s=5.0, writes=True, waits=waits, owed=owed, whole=holds_nothing), metrics


async def holds_nothing(owed: OwedObject) -> PutObject | None:
    return None


# Reads.


async def test_a_chain_comes_whole_described_and_in_few_fetches() -> None:
    peer, kept = holding(), Kept()
    place, metrics = upstream(peer)
    assert await read(place, kept=kept) == 20
    assert peer.calls == [("fetch", 16), ("fetch", 4)]
    parents = [kept[key_of(chunk)].described.parent for chunk in HIGH]
    assert parents == [UNKNOWN, *(chunk.hash for chunk in HIGH[:-1])], "of the first one nobody said"
    assert all(found.whole for found in kept.values())
    assert told(metrics)["reads.upstream"] == 20
    await place.aclose()


async def test_readers_at_the_same_time_share_a_fetch_and_one_that_leaves_ends_it_for_nobody() -> None:
    peer, kept = holding(count=8), Kept()
    place, metrics = upstream(peer)
    peer.held_up = asyncio.Event()
    chain = CHAIN.part_of(0, 8)
    readers = [asyncio.ensure_future(read(place, chain, kept=kept)) for _ in range(5)]
    await settle()
    readers[0].cancel()  # the one that the fetch was begun for
    await settle()
    peer.held_up.set()
    assert await asyncio.gather(*readers[1:]) == [8] * 4
    assert peer.calls == [("fetch", 8)]
    assert told(metrics)["upstream_coalesced.fetch"] == 4 * 8
    assert len(kept) == 8, "and is kept"
    await place.aclose()


async def test_what_overlaps_is_fetched_once_and_other_qualities_apart() -> None:
    peer = holding(count=8)
    place, _ = upstream(peer)
    peer.held_up = asyncio.Event()
    readers = [
        asyncio.ensure_future(read(place, CHAIN.part_of(0, 3))), asyncio.ensure_future(read(place, CHAIN.part_of(0, 8)))
    ]  # fmt: skip
    other = asyncio.ensure_future(read(place, CHAIN.part_of(0, 3), Quality.LOW))
    await settle()
    assert sorted(peer.calls) == [("fetch", 3), ("fetch", 3)]
    peer.held_up.set()
    assert await asyncio.gather(*readers, other) == [3, 8, 3]
    assert sorted(peer.calls) == [("fetch", 3), ("fetch", 3), ("fetch", 5)]
    await place.aclose()


async def test_a_prefix_is_not_kept_as_the_whole_unless_it_is_all_there_is() -> None:
    peer, kept = holding(count=2), Kept()
    place, _ = upstream(peer)
    chain = CHAIN.part_of(0, 2)
    assert await read(place, chain, Quality.LOW, kept) == 2
    assert not any(found.whole for found in kept.values())
    peer.blobs = {key: bytes(codec.truncate(blob, Quality.LOW)) for key, blob in peer.blobs.items()}
    got = [found async for found in place.read(chain, Quality.RAW, kept.keep)]
    assert [found.whole for found in got] == [True, True]
    assert {found.described.quality for found in got} == {Quality.LOW}
    assert [found.described.length for found in got] == [len(found.data) for found in got]
    await place.aclose()


async def test_a_fetch_ends_where_it_holds_enough_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_reads, "BATCH_BYTES", 2 * len(HIGH[0].blob))
    peer = holding()
    place, _ = upstream(peer)
    both = [asyncio.ensure_future(read(place)) for _ in range(2)]
    assert await asyncio.gather(*both) == [20, 20]
    assert calls(peer)["fetch"] < 20
    await place.aclose()


@pytest.mark.parametrize("bad", ["damaged", "foreign"])
async def test_what_is_wrong_is_a_miss_for_all_who_wait_and_not_kept(bad: str) -> None:
    peer, kept = holding(count=4), Kept()
    wrong = HIGH[2].blob[:-1] + bytes([HIGH[2].blob[-1] ^ 1]) if bad == "damaged" else HIGH[3].blob
    peer.blobs[HIGH[2].hash] = wrong
    place, metrics = upstream(peer)
    chain = CHAIN.part_of(0, 4)
    assert await asyncio.gather(*(read(place, chain, kept=kept) for _ in range(3))) == [2, 2, 2]
    assert set(kept) == {key_of(chunk) for chunk in HIGH[:2]}
    assert sum(n for name, n in told(metrics).items() if name.startswith("integrity_failures.upstream")) == 1
    await place.aclose()


async def test_what_is_deleted_while_it_is_fetched_is_not_given_to_who_comes_after() -> None:
    peer = holding(count=4)
    place, _ = upstream(peer)
    peer.held_up = asyncio.Event()
    chain = CHAIN.part_of(0, 4)
    before = asyncio.ensure_future(read(place, chain))
    await settle()
    deleting = asyncio.ensure_future(place.delete([key_of(chunk) for chunk in HIGH[:4]]))
    await settle()
    after = asyncio.ensure_future(read(place, chain))
    await settle()
    assert [call for call, _ in peer.calls] == ["fetch", "delete", "fetch"], "it asks anew"
    peer.held_up.set()
    await deleting
    await asyncio.gather(before, after)
    assert await read(place, chain) == 0
    await place.aclose()


# Lookups.


async def test_identical_lookups_share_one_question() -> None:
    peer = holding(count=5)
    place, metrics = upstream(peer)
    peer.held_up = asyncio.Event()
    asking = [asyncio.ensure_future(place.find(CHAIN, 0)) for _ in range(3)]
    other = asyncio.ensure_future(place.find(CHAIN.part_of(0, 2), 0))
    await settle()
    asking[0].cancel()
    peer.held_up.set()
    assert [len(found) for found in await asyncio.gather(*asking[1:], other)] == [5, 5, 2]
    assert calls(peer)["lookup"] == 2
    assert told(metrics)["upstream_coalesced.lookup"] == 2
    assert len(await place.find(CHAIN, 0)) == 5
    assert calls(peer)["lookup"] == 3, "an answer is not kept"
    await place.aclose()


async def test_the_next_node_is_asked_where_the_best_is_away() -> None:
    names = rank(["a:1", "b:1"], CHAIN.namespace_id + CHAIN.first)
    best, second = holding(names[0], count=9), holding(names[1], count=4)
    place, _ = upstream(second, best)
    assert len(await place.find(CHAIN, 0)) == 9
    assert await read(place) == 9
    assert calls(second) == Counter()
    best.error = Unavailable("it is away")
    assert len(await place.find(CHAIN, 0)) == 4
    assert await read(place) == 4
    best.state = "open"
    asked = calls(best)
    assert len(await place.find(CHAIN, 0)) == 4
    assert calls(best) == asked, "it is not even asked"
    second.error = ProtocolViolation("it lies")
    assert await place.find(CHAIN, 0) == []
    assert await read(place) == 0
    await place.aclose()


# Writes.


async def test_puts_go_in_order_in_few_streams_and_what_is_there_is_counted() -> None:
    peer = holding(count=2)
    place, metrics = upstream(peer, waits=True)
    peer.held_up = asyncio.Event()
    sent = [place.write(put_object(at)) for at in range(20)]
    assert place.pending_bytes == sum(len(chunk.blob) for chunk in HIGH)
    await settle()
    peer.held_up.set()
    assert [future is not None and await future for future in sent] == [True] * 20
    assert list(peer.blobs) == [chunk.hash for chunk in HIGH], "parents before children"
    assert len(peer.calls) <= 2
    assert (told(metrics)["upstream_writes.have"], told(metrics)["upstream_writes.stored"]) == (2, 18)
    assert place.pending_bytes == 0
    await place.aclose()


async def test_a_put_that_fails_takes_what_follows_it_along_and_all_of_it_is_owed() -> None:
    peer = MemoryPeer("a:1")
    place, metrics = upstream(peer)
    peer.error, peer.held_up = Unavailable("it is away"), asyncio.Event()
    first = place.write(put_object(0))
    await settle()
    rest = [place.write(put_object(at)) for at in range(1, 4)]
    peer.held_up.set()
    assert [future is not None and await future for future in (first, *rest)] == [False] * 4
    assert peer.calls == [("put", 1)]
    assert (told(metrics)["upstream_writes.failed"], told(metrics)["upstream_writes.orphaned"]) == (1, 3)
    assert (place.pending_bytes, place.owed_objects) == (0, 4)
    peer.error = None
    again = place.write(put_object(0))
    assert again is not None
    assert await again
    assert place.owed_objects == 3
    await place.aclose()


async def test_the_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_writes, "PENDING_BYTES_MAX", 3 * len(HIGH[0].blob))
    peer = MemoryPeer("a:1")
    place, metrics = upstream(peer)
    sent = [place.write(put_object(at)) for at in range(5)]
    assert [future is None for future in sent].count(True) >= 2
    assert place.owed_objects == told(metrics)["upstream_writes.full"] >= 2
    await place.aclose()
    assert place.pending_bytes == 0, "a closing node sends what is on its way"
    assert len(peer.blobs) == 5 - told(metrics)["upstream_writes.full"]


async def test_a_delete_waits_for_what_is_on_its_way_and_reaches_every_node_that_is_there() -> None:
    peers = [MemoryPeer("a:1"), MemoryPeer("b:1", state="open")]
    place, metrics = upstream(*peers)
    for at in range(4):
        place.write(put_object(at))
    await place.delete([key_of(chunk) for chunk in HIGH[:4]])
    assert [call for call, _ in peers[0].calls] == ["put", "delete"]
    assert peers[0].blobs == {}
    assert told(metrics)["upstream_failures.b:1.delete.open"] == 1
    assert place.owed_deletes == told(metrics)["upstream_deletes.owed"] == 4
    place.write(put_object(0))
    await place.purge(LAYOUT.namespace_id)
    assert peers[0].blobs == {}
    await place.aclose()


# Several places.


async def test_each_place_is_asked_for_what_those_before_it_lack() -> None:
    first, second = upstream(holding("a:1", 3))[0], upstream(holding("b:1", 9))[0]
    outside = Outside([first, second])
    assert len(await outside.find(CHAIN, 0)) == 9
    kept = Kept()

    async def came(chain: Chain) -> int:
        async with aclosing(outside.read(chain, Quality.RAW, kept.keep)) as objects:
            return len([each async for each in objects])

    assert await came(CHAIN) == 3
    assert await came(CHAIN.after(3)) == 6
    assert await came(CHAIN.after(9)) == 0
    await outside.aclose()


async def test_a_node_without_places_asks_nobody() -> None:
    outside = Outside([])
    assert await outside.find(CHAIN, 0) == []
    assert [each async for each in outside.read(CHAIN, Quality.RAW, Kept().keep)] == []
    assert outside.write(put_object(0)) == []
    await outside.delete([key_of(HIGH[0])])
    await outside.aclose()


def test_the_pauses_of_a_node_upstream_stay_short() -> None:
    now_s = [0.0]
    circuit = Circuit(lambda: now_s[0], random.Random(1), 1, 0.5)
    circuit.fail()
    tries: list[float] = []
    while now_s[0] < 20:
        now_s[0] += 0.01
        if circuit.allow():
            tries.append(now_s[0])
            circuit.fail()
    assert max(later - earlier for earlier, later in itertools.pairwise(tries)) <= 0.52
