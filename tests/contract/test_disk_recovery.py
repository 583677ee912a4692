"""Every instant at which the disk tier can be cut off: at each system call, and what a loss of power leaves.

`Crash` at the nth call leaves the files as kill -9 does: the kernel has what was written. Loss of power is acted out on
the files: pages of the index that were not synced are old or new, holes that were not synced may not be there.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import disk_places
import kv_objects as kv
import pytest
import tier_objects
from disk_places import place_of

import kvstore_codec as codec
from kvstore.index.entry import ObjectKey
from kvstore.tiers import disk_index, disk_segments
from kvstore.tiers.disk import DiskTier, NewObject
from kvstore.tiers.disk_index import SLOT_BYTES, IndexFile
from kvstore.tiers.disk_writer import BLOCK_BYTES

ROOMY = 64 << 20
LAYOUT = kv.small_layout("recovery", layers=4, head_dim=64)  # objects of several blocks
QUALITIES = ("low", "medium", "high", "raw")
CHUNKS = {quality: kv.chunks(LAYOUT, 6, seed=1, quality=quality) for quality in QUALITIES}
HIGH = CHUNKS["high"]
LAYER_BYTES = [codec.parse_header(chunk.blob).layer_bytes for chunk in HIGH]
CALLS_MAX = 200


def key_of(chunk: kv.StoredChunk) -> ObjectKey:
    return tier_objects.key_of(chunk, LAYOUT)


def put(tier: DiskTier, chunk: kv.StoredChunk) -> None:
    tier.put_many([new(chunk)])


class Crash(BaseException):
    """The process ends here."""


class Calls:
    """Counts what changes files, and ends the process at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        for owner, name in (
            (os, "pwrite"), (os, "pwritev"), (os, "fdatasync"), (os, "fsync"), (os, "posix_fallocate"),
            (os, "ftruncate"), (Path, "unlink"), (disk_segments, "punch"), (disk_index, "punch"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if self.left is not None:
                if not self.left:
                    raise Crash
                self.left -= 1
            return real(*arguments, **keywords)

        return call


def abandon(tier: DiskTier) -> None:
    """What the kernel does for a process that is gone: its descriptors are closed, its locks freed."""
    if tier._segments._descriptor is not None:
        os.close(tier._segments._descriptor)
    tier._segments._writer.close()
    tier._index.close()
    os.close(tier._lock)


def new(chunk: kv.StoredChunk) -> NewObject:
    return NewObject(key_of(chunk), chunk.ref.parent, chunk.blob)


def held(tier: DiskTier) -> dict[int, bytes]:
    """What is there, by the number of the chunk: all that is listed can be read, and nothing else takes room."""
    found = {}
    numbers = {key_of(chunk): number for number, chunk in enumerate(HIGH)}
    for stored in tier.scan():
        data = tier.read(stored.key, stored.length)
        assert data is not None
        assert codec.verify(data).header.chunk_hash == stored.key.chunk_hash
        found[numbers[stored.key]] = bytes(data)
    assert len(found) == tier.objects
    return found


def check_nothing_left_over(root: Path, tier: DiskTier, found: dict[int, bytes]) -> None:
    costs = sum(tier.cost_bytes(len(data)) for data in found.values())
    assert tier.used_bytes == costs
    assert disk_places.taken_bytes(root) == costs - len(found) * SLOT_BYTES
    assert disk_places.data_bytes(root / "index") <= 2 * BLOCK_BYTES


CHANGES: dict[str, Callable[[DiskTier], object]] = {
    "put": lambda tier: put(tier, HIGH[3]),
    "put of many": lambda tier: tier.put_many([new(chunk) for chunk in HIGH[3:]]),
    "replacement": lambda tier: put(tier, CHUNKS["raw"][1]),
    "truncation": lambda tier: tier.truncate(key_of(HIGH[1]), LAYER_BYTES[1][0]),
    "delete": lambda tier: tier.delete(key_of(HIGH[1])),
    "delete of all": lambda tier: [tier.delete(key_of(chunk)) for chunk in HIGH[:3]],
    "close": lambda tier: tier.close(),
}


@pytest.mark.parametrize("segment_bytes", [BLOCK_BYTES, 256 << 20], ids=["a segment each", "one segment"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_process_that_ends_at_any_call_leaves_each_object_as_before_or_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, segment_bytes: int
) -> None:
    """Also where opening is cut off, and opening after that."""
    monkeypatch.setattr(disk_segments, "SEGMENT_BYTES", segment_bytes)
    calls = Calls(monkeypatch)
    for count in range(CALLS_MAX):
        root = tmp_path / str(count)
        tier = DiskTier(root, ROOMY)
        for chunk in HIGH[:3]:
            put(tier, chunk)
        before = held(tier)
        calls.left = count
        try:
            CHANGES[name](tier)
            ended = False
        except Crash:
            ended = True
        calls.left = None
        after = {number: chunk.blob for number, chunk in enumerate(HIGH[:3])}
        after |= {"put": {3: HIGH[3].blob}, "put of many": {n: HIGH[n].blob for n in (3, 4, 5)},
                  "replacement": {1: CHUNKS["raw"][1].blob},
                  "truncation": {1: HIGH[1].blob[: LAYER_BYTES[1][0]]}}.get(name, {})  # fmt: skip
        for number in {"delete": [1], "delete of all": [0, 1, 2]}.get(name, []):
            del after[number]
        if name != "close":
            abandon(tier)
        elif ended:
            return  # a process that ends while it closes leaves what it had
        for openings in range(CALLS_MAX):
            calls.left = openings
            try:
                tier = DiskTier(root, ROOMY)
            except Crash:
                continue
            finally:
                calls.left = None
            break
        found = held(tier)
        for number in range(6):
            assert found.get(number) in (before.get(number), after.get(number)), (count, number)
        if not ended:
            assert found == after
        check_nothing_left_over(root, tier, found)
        tier.close()
        if not ended:
            assert name == "close" or count > 1, "nothing was cut off"
            return
    raise AssertionError("it never came to an end")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_a_loss_of_power_loses_nothing_that_was_durable_and_shows_nothing_that_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(disk_segments, "SEGMENT_BYTES", rng.choice([4, 16, 1024]) * BLOCK_BYTES)
    root = tmp_path / "disk"
    tier = DiskTier(root, ROOMY)
    synced = [(root / "index").read_bytes()]
    real_sync, real_punch = IndexFile.sync, disk_segments.punch

    def sync(index: IndexFile) -> None:
        real_sync(index)
        synced[0] = (root / "index").read_bytes()

    holes_last = rng.choice([0.0, 0.5, 1.0])
    monkeypatch.setattr(IndexFile, "sync", sync)
    monkeypatch.setattr(disk_segments, "punch", lambda *a: real_punch(*a) if rng.random() < holes_last else None)
    newest: dict[int, bytes] = {}
    allowed: dict[int, set[bytes]] = {number: set() for number in range(6)}  # versions, from the durable one on
    for _ in range(rng.randrange(1, 40)):
        number = rng.randrange(6)
        chunk = CHUNKS[rng.choice(QUALITIES)][number]
        what = rng.choice(["put", "put", "delete", "truncate"])
        if what == "put":
            put(tier, chunk)
            newest[number] = chunk.blob
            # The index was synced: what was said of every object is durable now.
            allowed = {each: {newest[each]} if each in newest else set() for each in range(6)}
        elif what == "delete" and tier.delete(key_of(chunk)):
            allowed[number].add(b"")
            del newest[number]
        elif what == "truncate" and number in newest and newest[number] != CHUNKS["raw"][number].blob:
            lengths = [each for each in codec.parse_header(newest[number]).layer_bytes if each <= len(newest[number])]
            tier.truncate(key_of(chunk), lengths[0])
            newest[number] = newest[number][: lengths[0]]
            allowed[number] |= {newest[number]}
    abandon(tier)
    monkeypatch.undo()
    lose_power(root, synced[0], rng)
    tier = DiskTier(root, ROOMY)
    found = held(tier)
    for number, versions in allowed.items():
        shortened = {version[:length] for version in versions for length in LAYER_BYTES[number]}
        if versions and b"" not in versions:
            assert number in found, "a durable object is lost"
        if number in found and versions:
            assert found[number] in versions | shortened
        if not versions:
            assert number not in found, "deleted, durably"
    check_nothing_left_over(root, tier, found)
    tier.close()


def lose_power(root: Path, synced: bytes, rng: random.Random) -> None:
    """Each page of the index is the synced one or the last written."""
    written = (root / "index").read_bytes()
    pages = []
    for at in range(0, max(len(synced), len(written)), BLOCK_BYTES):
        old, last = synced[at : at + BLOCK_BYTES], written[at : at + BLOCK_BYTES]
        pages.append(rng.choice([old, last]) if old and last else old or last)
    (root / "index").write_bytes(b"".join(pages))


# One damage at a time


def test_an_object_whose_blocks_are_a_hole_was_deleted(root: Path, reopen: Callable[[], DiskTier]) -> None:
    tier = reopen()
    tier.put_many([new(chunk) for chunk in CHUNKS["raw"]])
    place_of(root, key_of(HIGH[2])).punch()
    tier = reopen()
    assert sorted(held(tier)) == [0, 1, 3, 4, 5]
    check_nothing_left_over(root, tier, held(tier))


def test_a_hole_that_is_allocated_is_given_back_too(root: Path, reopen: Callable[[], DiskTier]) -> None:
    """What `fallocate` leaves where a write never came: no data, and yet room taken."""
    tier = reopen()
    tier.put_many([new(chunk) for chunk in CHUNKS["raw"]])
    place = place_of(root, key_of(HIGH[2]))
    place.punch()
    descriptor = os.open(place.segment, os.O_WRONLY)
    os.posix_fallocate(descriptor, place.offset, place.length)
    os.close(descriptor)
    tier = reopen()
    assert sorted(held(tier)) == [0, 1, 3, 4, 5]
    assert disk_places.allocated_bytes(root) == tier.used_bytes - 5 * SLOT_BYTES


def test_an_object_whose_end_is_a_hole_was_truncated(root: Path, reopen: Callable[[], DiskTier]) -> None:
    chunk, layers = HIGH[0], LAYER_BYTES[0]
    put(reopen(), chunk)
    key = key_of(chunk)
    place_of(root, key).punch(layers[1])
    tier = reopen()
    (stored,) = tier.scan()
    assert (stored.length, stored.layer_bytes) == (layers[1], layers[:2])
    assert held(tier) == {0: chunk.blob[: layers[1]]}
    assert disk_places.taken_bytes(root) == tier.used_bytes - SLOT_BYTES
    place_of(root, key).punch(BLOCK_BYTES)
    assert list(reopen().scan()) == [], "less than the coarsest quality is nothing"


def test_of_two_slots_of_a_key_the_newer_counts(root: Path, reopen: Callable[[], DiskTier]) -> None:
    tier = reopen()
    put(tier, CHUNKS["low"][0])
    old = place_of(root, key_of(HIGH[0]))
    slot = old.slot_bytes()
    put(tier, CHUNKS["raw"][0])
    old.write_slot(slot)
    old.write(0, CHUNKS["low"][0].blob)
    tier = reopen()
    assert held(tier) == {0: CHUNKS["raw"][0].blob}
    check_nothing_left_over(root, tier, held(tier))


@pytest.mark.slow
@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_of_a_slot_is_found(root: Path, reopen: Callable[[], DiskTier], bit: int) -> None:
    chunks = kv.chunks(LAYOUT, 241, seed=3, quality="low")
    tier = reopen()
    tier.put_many([new(chunk) for chunk in chunks])
    assert place_of(root, key_of(chunks[0])).slot == 1
    for offset in range(240):
        disk_places.flip(root / "index", (1 + offset) * SLOT_BYTES + offset, bit)
    tier = reopen()
    assert [stored.key for stored in tier.scan()] == [key_of(chunks[240])]
    assert disk_places.taken_bytes(root) == tier.used_bytes - SLOT_BYTES


@pytest.mark.parametrize("bytes_left", [SLOT_BYTES, 2 * SLOT_BYTES, 3 * SLOT_BYTES - 1])
def test_an_index_that_was_cut_costs_what_was_cut_off(root: Path, bytes_left: int) -> None:
    tier = DiskTier(root, ROOMY)
    tier.put_many([new(chunk) for chunk in HIGH])
    tier.close()
    os.truncate(root / "index", bytes_left)
    tier = DiskTier(root, ROOMY)
    found = held(tier)
    assert len(found) == bytes_left // SLOT_BYTES - 1
    check_nothing_left_over(root, tier, found)
    put(tier, HIGH[5])
    assert held(tier)[5] == HIGH[5].blob
    tier.close()


def test_a_lost_segment_costs_its_objects_alone(
    root: Path, reopen: Callable[[], DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_segments, "SEGMENT_BYTES", BLOCK_BYTES)
    tier = reopen()
    for chunk in HIGH:
        put(tier, chunk)
    place_of(root, key_of(HIGH[1])).segment.unlink()
    tier = reopen()
    assert sorted(held(tier)) == [0, 2, 3, 4, 5]
    check_nothing_left_over(root, tier, held(tier))
