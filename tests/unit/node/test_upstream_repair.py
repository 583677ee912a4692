"""What nodes upstream missed while they were away: remembered within bounds, made good when they are back, deletes
before anything else is asked of them. With peers in memory; real ones are in tests/fault/test_sidecar.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import kv_objects as kv
import pytest
from memory_peer import CHAIN, HIGH, MemoryPeer, calls, holding, put_object, read, settle, told
from prometheus_client import CollectorRegistry
from tier_objects import LAYOUT, key_of

from kvstore.engine import owed as owed_module
from kvstore.engine import owed_file, upstream_repair, upstream_writes
from kvstore.engine.outside import PutObject, Sent
from kvstore.engine.owed import WHOLE_NAMESPACE, Owed, OwedDelete, OwedObject
from kvstore.engine.owed_file import OwedFile, OwedJournal
from kvstore.engine.upstream import Upstream
from kvstore.errors import UpstreamAway
from kvstore.index.entry import ObjectKey
from kvstore.metrics import NodeMetrics
from kvstore_client.errors import LimitExceeded, ProtocolViolation, Unavailable
from kvstore_cluster.placement import rank

KEYS = [key_of(chunk) for chunk in HIGH]
PROMPT = (LAYOUT.namespace_id, 0, HIGH[0].hash)
OTHER = kv.chunks(LAYOUT, 3, seed=2, quality="high")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_repair, "TICK_S", 0.001)
    monkeypatch.setattr(upstream_repair, "RETRY_S", 0.002)


class Node:
    """What the node behind a place holds; `reading` holds up reads of it."""

    def __init__(self, *chunks: Sequence[kv.StoredChunk]) -> None:
        self.held = {key_of(each[at]): put_object(at, each) for each in chunks for at in range(len(each))}
        self.reading = asyncio.Event()
        self.reading.set()
        self.reads = 0

    async def whole(self, owed: OwedObject) -> PutObject | None:
        self.reads += 1
        await self.reading.wait()
        return self.held.get(owed.key)


@asynccontextmanager
async def started(
    node: Node, *peers: MemoryPeer, journal: OwedJournal | None = None, owed: Owed | None = None
) -> AsyncIterator[tuple[Upstream, NodeMetrics]]:  # fmt: skip
    metrics = NodeMetrics(CollectorRegistry())
    owed = owed or Owed(peer.address for peer in peers)
    place = Upstream(
        peers, metrics, timeout_s=5.0, writes=True, waits=False, owed=owed, whole=node.whole, journal=journal
    )
    place.start()
    try:
        yield place, metrics
    finally:
        await place.aclose()


async def until(condition: Callable[[], bool]) -> None:
    end_s = asyncio.get_running_loop().time() + 20
    while not condition():
        assert asyncio.get_running_loop().time() < end_s
        await asyncio.sleep(0.001)


async def put_all(place: Upstream, chunks: Sequence[kv.StoredChunk] = HIGH) -> None:
    sent = [place.write(put_object(at, chunks)) for at in range(len(chunks))]
    await asyncio.wait([future for future in sent if future is not None])


async def test_what_was_put_while_a_node_was_away_goes_there_when_it_is_back_parents_first() -> None:
    peer = MemoryPeer("a:1", state="open")
    async with started(Node(HIGH, OTHER), peer) as (place, metrics):
        for chunks in (HIGH, OTHER):
            await put_all(place, chunks)
        assert (place.owed_objects, place.pending_bytes, calls(peer)["put"]) == (23, 0, 0)
        peer.state = "closed"
        await until(lambda: not place.owed_objects)
        assert list(peer.blobs) == [chunk.hash for chunk in (*HIGH, *OTHER)]
        assert all(peer.blobs[chunk.hash] == chunk.blob for chunk in (*HIGH, *OTHER))
        assert told(metrics)["upstream_repairs.sent"] == 23


async def test_what_the_queue_had_no_room_for_goes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_writes, "PENDING_BYTES_MAX", 3 * len(HIGH[0].blob))
    peer = MemoryPeer("a:1")
    async with started(Node(HIGH), peer) as (place, metrics):
        for at in range(len(HIGH)):
            place.write(put_object(at))
        assert place.owed_objects == told(metrics)["upstream_writes.full"] >= 10
        await until(lambda: len(peer.blobs) == len(HIGH))


async def test_a_node_that_takes_nothing_is_tried_again_and_others_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there, but busy: nothing is lost, and one prompt does not stand in the way of another."""
    monkeypatch.setattr(upstream_repair, "BATCH_OBJECTS", len(HIGH))
    peer = MemoryPeer("a:1", error=LimitExceeded("it is full"))
    async with started(Node(HIGH, OTHER), peer) as (place, _):
        for chunks in (HIGH, OTHER):
            await put_all(place, chunks)
        tried = calls(peer)["put"]
        await until(lambda: calls(peer)["put"] >= tried + 4)
        tries = [count for call, count in peer.calls if call == "put"][tried:]
        assert len(OTHER) in tries, "in turn"
        peer.error = None
        await until(lambda: not place.owed_objects)
        assert len(peer.blobs) == 23


async def test_what_a_node_refuses_for_good_is_not_tried_again() -> None:
    peer = MemoryPeer("a:1", state="open")
    async with started(Node(HIGH), peer) as (place, metrics):
        await put_all(place)
        peer.error, peer.state = ProtocolViolation("it lies"), "closed"
        await until(lambda: not place.owed_objects)
        assert calls(peer)["put"] == 1
        assert told(metrics)["upstream_repairs.rejected"] == 20


async def test_what_is_not_held_any_more_is_owed_no_more() -> None:
    peer, node = MemoryPeer("a:1", state="open"), Node(HIGH)
    async with started(node, peer) as (place, metrics):
        await put_all(place)
        for key in KEYS[15:]:
            del node.held[key]
        peer.state = "closed"
        await until(lambda: not place.owed_objects)
        assert list(peer.blobs) == [chunk.hash for chunk in HIGH[:15]]
        assert told(metrics)["upstream_repairs.gone"] == 5


async def test_what_another_node_took_goes_home() -> None:
    home, other = (MemoryPeer(name) for name in rank(["a:1", "b:1"], LAYOUT.namespace_id + HIGH[0].hash))
    home.error = Unavailable("it is away")
    async with started(Node(HIGH), home, other) as (place, _):
        await put_all(place)
        assert (len(other.blobs), place.owed_objects) == (20, 20)
        home.state = "open"
        assert len(await place.find(CHAIN, 0)) == 20, "it is found there meanwhile"
        home.error, home.state = None, "closed"
        await until(lambda: not place.owed_objects)
        assert list(home.blobs) == [chunk.hash for chunk in HIGH]


async def test_what_is_remembered_is_bounded_and_one_node_leaves_the_others_their_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owed_module, "OBJECTS_MAX", 10)
    names = rank(["a:1", "b:1"], LAYOUT.namespace_id + HIGH[0].hash)
    peers = [MemoryPeer(name, state="open") for name in names]
    async with started(Node(HIGH), *peers) as (place, metrics):
        await put_all(place)
        assert (place.owed_objects, told(metrics)["upstream_repairs.forgotten"]) == (5, 15)
        for peer in peers:
            peer.state = "closed"
        await until(lambda: not place.owed_objects)
        assert list(peers[0].blobs) == [chunk.hash for chunk in HIGH[:5]], "the first of a prompt: the rest needs them"


async def test_repairing_pauses_as_long_as_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_repair, "BATCH_OBJECTS", 1)
    loop, worked = asyncio.get_running_loop(), []

    class Slow(MemoryPeer):
        async def put(self, objects: Sequence[PutObject]) -> list[Sent]:
            began_s = loop.time()
            await asyncio.sleep(0.02)
            outcomes = await super().put(objects)
            worked.append((began_s, loop.time()))
            return outcomes

    peer = Slow("a:1", state="open")
    async with started(Node(OTHER), peer) as (place, _):
        await put_all(place, OTHER)
        peer.state = "closed"
        await until(lambda: not place.owed_objects)
    pauses = [(after[0] - before[1], before[1] - before[0]) for before, after in pairwise(worked)]
    assert len(pauses) == len(OTHER) - 1
    assert all(pause_s > 0.9 * work_s for pause_s, work_s in pauses)  # but for what a clock can tell


# Deletes.


async def test_a_node_that_missed_a_delete_is_told_before_it_is_asked_for_anything() -> None:
    peer = holding()
    async with started(Node(), peer) as (place, metrics):
        assert await read(place) == 20
        peer.state = "open"
        await place.delete(KEYS[5:])
        assert (place.owed_deletes, told(metrics)["upstream_deletes.owed"]) == (15, 15)
        peer.held_up, peer.state = asyncio.Event(), "closed"
        peer.calls.clear()
        await until(lambda: calls(peer)["delete"] == 1)
        assert await asyncio.wait_for(place.find(CHAIN, 0), 5) == []
        assert await asyncio.wait_for(read(place), 5) == 0
        late = place.write(put_object(0, OTHER))
        assert late is not None
        assert not await asyncio.wait_for(late, 5)
        assert set(calls(peer)) == {"delete"}, "it is back, and not asked yet"
        peer.held_up.set()
        await until(lambda: not place.owed_deletes)
        assert len(await place.find(CHAIN, 0)) == 5
        assert await read(place) == 5
        assert told(metrics)["upstream_deletes.told"] == 15
        await until(lambda: OTHER[0].hash in peer.blobs or not place.owed_objects)


async def test_what_is_owed_is_not_even_read_for_a_node_that_is_to_be_told_of_deletes() -> None:
    peer, node = MemoryPeer("a:1", state="open"), Node(HIGH)
    async with started(node, peer) as (place, _):
        await put_all(place)
        await place.delete([key_of(OTHER[0])])
        peer.held_up, peer.state = asyncio.Event(), "closed"
        await until(lambda: calls(peer)["delete"] == 1)
        await asyncio.sleep(0.05)  # many of its looks
        assert node.reads == 0
        peer.held_up.set()
        await until(lambda: not place.owed_objects)


async def test_a_delete_waits_for_what_is_on_its_way() -> None:
    """Else that would arrive behind it."""
    held_up = asyncio.Event()
    peer = MemoryPeer("a:1", held_up=held_up)
    async with started(Node(), peer) as (place, _):
        place.write(put_object(0))
        await until(lambda: calls(peer)["put"] == 1)
        deleting = asyncio.ensure_future(place.delete(KEYS[:1]))
        await settle()
        early = calls(peer)["delete"]
        held_up.set()
        await deleting
        assert not early
        assert peer.blobs == {}


async def test_what_is_put_again_after_a_delete_stays() -> None:
    peer = holding()
    async with started(Node(HIGH), peer) as (place, _):
        peer.state = "open"
        await place.delete(KEYS)
        await put_all(place, HIGH[:8])
        peer.state = "closed"
        await until(lambda: not place.owed_objects and not place.owed_deletes)
        assert list(peer.blobs) == [chunk.hash for chunk in HIGH[:8]]


async def test_what_is_deleted_is_not_sent_even_if_it_is_being_read_for_that() -> None:
    peer, node = MemoryPeer("a:1", state="open"), Node(HIGH)
    async with started(node, peer) as (place, _):
        await put_all(place)
        await place.delete(KEYS[10:])
        assert place.owed_objects == 10
        node.reading.clear()
        peer.state = "closed"
        await until(lambda: node.reads == 1)
        await place.delete(KEYS[:1])
        node.reading.set()
        await until(lambda: not place.owed_objects)
        assert list(peer.blobs) == [chunk.hash for chunk in HIGH[1:10]]


async def test_a_delete_that_fails_or_is_given_up_on_is_owed() -> None:
    peer = holding()
    async with started(Node(), peer) as (place, _):
        peer.held_up = asyncio.Event()
        deleting = asyncio.ensure_future(place.delete(KEYS[10:]))
        await settle()
        deleting.cancel()
        await settle()
        peer.held_up.set()
        assert place.owed_deletes == 10
        await until(lambda: not place.owed_deletes)
        assert len(peer.blobs) == 10
        peer.error = Unavailable("it is away")
        await place.purge(LAYOUT.namespace_id)
        assert place.owed_deletes == 1
        assert await place.find(CHAIN, 0) == []
        peer.error = None
        await until(lambda: not place.owed_deletes)
        assert peer.blobs == {}


async def test_deletes_that_cannot_be_remembered_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owed_module, "DELETES_MAX", 4)
    peers = [holding("a:1"), holding("b:1")]
    peers[0].state = "open"
    async with started(Node(), *peers) as (place, metrics):
        await place.delete(KEYS[:3])
        with pytest.raises(UpstreamAway, match="a:1"):
            await place.delete(KEYS[2:6])
        assert (place.owed_deletes, told(metrics)["upstream_deletes.refused"]) == (4, 2)
        assert len(peers[1].blobs) == 14, "all the same, the others are told"
        await place.purge(LAYOUT.namespace_id)
        assert place.owed_deletes == 1, "which comes to the same"
        await place.delete(KEYS[6:])
        assert place.owed_deletes == 1
        peers[0].state = "closed"
        await until(lambda: not place.owed_deletes)
        assert peers[0].blobs == {}


# Beyond the process.


def saved_later(function: Callable[[], None], problem: str) -> None:
    function()


def delete_of(at: int, address: str = "a:1") -> OwedDelete:
    return OwedDelete(address, LAYOUT.namespace_id, 0, HIGH[at].hash)


async def test_what_is_owed_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "upstream.sqlite"
    peer, node = MemoryPeer("a:1", state="open"), Node(HIGH)
    owed, file = Owed(["a:1"]), OwedFile(path)
    journal = OwedJournal(file, saved_later)
    owed.changed = journal.note
    async with started(node, peer, journal=journal, owed=owed) as (place, _):
        await put_all(place)
        await place.delete([*KEYS[18:], *(key_of(chunk) for chunk in OTHER)])
        owed.settle(KEYS[3])
    again, file = Owed(["a:1"]), OwedFile(path)
    assert again.load(file.load()) == []
    assert (again.objects, again.deletes) == (17, 5)
    assert [each.key for each in again.next_objects(["a:1"], 99)] == [*KEYS[:3], *KEYS[4:18]], "in their order"
    file.close()


async def test_deletes_that_were_told_are_forgotten_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told again after a restart, they would delete what has been put since."""
    monkeypatch.setattr(owed_file, "SAVE_S", 1000.0)
    peer, owed, file = holding(), Owed(["a:1"]), OwedFile(tmp_path / "upstream.sqlite")
    peer.state = "open"
    journal = OwedJournal(file, saved_later)
    owed.changed = journal.note
    async with started(Node(), peer, journal=journal, owed=owed) as (place, _):
        await place.delete(KEYS[:2])
        assert len(file.load()) == 2
        peer.state = "closed"
        await until(lambda: not place.owed_deletes)
        assert file.load() == []


async def test_what_is_owed_anew_has_its_place_behind_the_others(tmp_path: Path) -> None:
    file = OwedFile(tmp_path / "upstream.sqlite")
    journal, objects = OwedJournal(file, saved_later), [OwedObject(key, HIGH[0].hash) for key in KEYS[:2]]
    for each, owed in ((objects[0], True), (objects[1], True), (objects[0], False), (objects[0], True)):
        journal.note(each, owed)
    journal.save()
    assert file.load() == [objects[1], objects[0]]
    file.close()


async def test_what_other_nodes_were_owed_is_forgotten_and_homes_are_found_anew(tmp_path: Path) -> None:
    file = OwedFile(tmp_path / "upstream.sqlite")
    objects = [OwedObject(key, HIGH[0].hash) for key in KEYS]
    file.save(dict.fromkeys((*objects, delete_of(0), delete_of(1, "gone:1")), True))
    owed = Owed(["a:1", "b:1"])
    assert owed.load(file.load()) == [delete_of(1, "gone:1")]
    home = rank(["a:1", "b:1"], LAYOUT.namespace_id + HIGH[0].hash)[0]
    assert owed.next_objects([home], 99) == objects
    assert owed.next_deletes("a:1", 99) == [delete_of(0)]
    file.close()


def test_a_file_that_is_no_database_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "upstream.sqlite"
    path.write_bytes(b"no database at all" * 100)
    file = OwedFile(path)
    assert file.load() == []
    assert "what was owed upstream is forgotten" in caplog.text
    file.save({delete_of(0): True})
    assert file.load() == [delete_of(0)]
    file.close()


def test_a_disk_that_refuses_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="unable to open"):
        OwedFile(tmp_path / "nowhere" / "upstream.sqlite")
    file = OwedFile(tmp_path / "upstream.sqlite")
    file.close()
    with pytest.raises(OSError, match="closed"):
        file.save({delete_of(0): True})


def test_a_namespace_stands_for_its_chunks() -> None:
    owed = Owed(["a:1"])
    other = OwedDelete("a:1", bytes(32), 0, WHOLE_NAMESPACE)
    for record in (delete_of(0), delete_of(1)._replace(part=3), other):
        assert owed.owe(record)
    assert owed.deletes == 3
    assert owed.owe(OwedDelete("a:1", LAYOUT.namespace_id, 0, WHOLE_NAMESPACE))
    assert owed.deletes == 2
    assert owed.owe(delete_of(5)._replace(part=2))
    assert owed.deletes == 2


def test_what_is_settled_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owed_module, "OBJECTS_MAX", 2)
    owed, objects = Owed(["a:1"]), [OwedObject(key, HIGH[0].hash) for key in KEYS[:3]]
    assert [owed.owe(each) for each in objects] == [True, True, False]
    owed.settle(KEYS[0])
    assert owed.owe(objects[2])


def test_books_are_kept() -> None:
    owed = Owed(["a:1", "b:1"])
    objects = [OwedObject(key, HIGH[0].hash) for key in KEYS]
    assert all(owed.owe(each) for each in (*objects, *objects))
    assert owed.objects == len(KEYS)
    assert owed.settle(KEYS[0])
    assert not owed.settle(KEYS[0])
    assert not owed.owes(KEYS[0])
    owed.settle_namespace(LAYOUT.namespace_id)
    assert owed.objects == 0
    assert owed.next_objects(["a:1", "b:1"], 9) == []
    assert owed.owe(OwedObject(ObjectKey(LAYOUT.namespace_id, bytes(32), 1), bytes(32)))
