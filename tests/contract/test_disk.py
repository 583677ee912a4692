"""What only the disk tier must do: give space back exactly, survive restarts, refuse what is not its own."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import disk_places
import kv_objects as kv
import pytest
from disk_places import place_of
from tier_objects import LAYOUT, key_of, put, whole

import kvstore_codec as codec
from kvstore.errors import DiskUnusable, TierFull
from kvstore.tiers import disk_segments
from kvstore.tiers.disk import DiskTier, NewObject
from kvstore.tiers.disk_index import PAGE_SLOTS, SLOT_BYTES
from kvstore.tiers.disk_writer import BLOCK_BYTES, blocks_of

ROOMY = 64 << 20
LOW, CHUNKS = (kv.chunks(LAYOUT, 6, seed=1, quality=quality) for quality in ("low", "raw"))
LARGE = kv.small_layout("large", layers=4, head_dim=64)


def new(chunk: kv.StoredChunk) -> NewObject:
    return NewObject(key_of(chunk), chunk.ref.parent, chunk.blob)


def test_reopening_finds_everything_in_the_order_of_last_use(root: Path, reopen: Callable[[], DiskTier]) -> None:
    tier = reopen()
    for chunk in CHUNKS:
        put(tier, chunk)
    used = tier.used_bytes
    tier.read(key_of(CHUNKS[2]), 10)
    tier = reopen()
    found = list(tier.scan())
    order = [CHUNKS[number] for number in (0, 1, 3, 4, 5, 2)]
    assert [stored.key for stored in found] == [key_of(chunk) for chunk in order]
    assert [stored.parent for stored in found] == [chunk.ref.parent for chunk in order]
    assert [stored.length for stored in found] == [len(chunk.blob) for chunk in order]
    assert (tier.used_bytes, tier.objects) == (used, len(CHUNKS))
    assert [whole(tier, chunk) for chunk in CHUNKS] == [chunk.blob for chunk in CHUNKS]
    put(tier, LOW[0])
    assert next(reopen().scan()).key == key_of(CHUNKS[1]), "uses are counted on from where they were"


@pytest.mark.parametrize("quality", ["raw", "lossless", "high", "medium", "low"])
def test_a_scan_says_of_an_object_what_its_header_says(reopen: Callable[[], DiskTier], quality: str) -> None:
    chunk = kv.chunks(LAYOUT, 2, seed=5, quality=quality)[1]
    put(reopen(), chunk)
    header = codec.parse_header(chunk.blob)
    (stored,) = reopen().scan()
    assert stored.key == (header.namespace_id, header.chunk_hash, header.part)
    assert (stored.first_position, stored.tokens) == (header.first_position, header.tokens)
    assert (stored.quality, stored.provenance) == (header.quality, header.provenance)
    assert stored.layer_bytes == header.layer_bytes
    for layer in reversed(range(len(header.layer_bytes) - 1)):
        length = header.layer_bytes[layer]
        reopen().truncate(stored.key, length)
        (stored,) = reopen().scan()
        assert (stored.length, stored.layer_bytes) == (length, header.layer_bytes[: layer + 1])
        assert stored.quality == header.quality_at(length)


def test_a_prefix_of_an_object_can_be_put(reopen: Callable[[], DiskTier]) -> None:
    (chunk,) = kv.chunks(LAYOUT, 1, seed=5, quality="high")
    length = codec.parse_header(chunk.blob).layer_bytes[1]
    tier = reopen()
    tier.put(key_of(chunk), chunk.ref.parent, chunk.blob[:length])
    (stored,) = reopen().scan()
    assert (stored.length, len(stored.layer_bytes)) == (length, 2)


def test_what_is_no_object_is_not_put(root: Path, reopen: Callable[[], DiskTier]) -> None:
    tier = reopen()
    chunk, other = CHUNKS[:2]
    for key, data in (
        (key_of(chunk), b"no object"),
        (key_of(chunk), chunk.blob[:-1]),
        (key_of(chunk), bytes(len(chunk.blob))),
        (key_of(other), chunk.blob),
    ):
        with pytest.raises(codec.ObjectError):
            tier.put(key, chunk.ref.parent, data)
    assert (tier.objects, tier.used_bytes, disk_places.taken_bytes(root)) == (0, 0, 0)


def test_blocks_come_back_when_their_object_goes_in_whatever_order(root: Path, reopen: Callable[[], DiskTier]) -> None:
    tier = reopen()
    rng = random.Random(1)
    held = {key_of(chunk): chunk for quality in ("raw", "high") for chunk in kv.chunks(LAYOUT, 30, 7, quality)}
    tier.put_many([new(chunk) for chunk in held.values()])
    while held:
        assert disk_places.taken_bytes(root) == sum(blocks_of(len(each.blob)) * 4096 for each in held.values())
        assert tier.used_bytes == sum(tier.cost_bytes(len(each.blob)) for each in held.values())
        gone = rng.sample(sorted(held), min(3, len(held)))
        for key in gone:
            assert tier.delete(key)
            del held[key]
    assert disk_places.allocated_bytes(root) == 0
    reopen()
    assert disk_places.files(root) == ["index"], "a segment without objects is removed"


def test_what_objects_cost_is_what_their_files_take(root: Path, reopen: Callable[[], DiskTier]) -> None:
    tier = reopen()
    for chunk in kv.chunks(LARGE, 3, seed=2):
        put(tier, chunk, LARGE)
    os.sync()
    assert disk_places.allocated_bytes(root) == tier.used_bytes - 3 * SLOT_BYTES


def test_segments_end_and_go_one_by_one(
    root: Path, reopen: Callable[[], DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_segments, "SEGMENT_BYTES", 2 * BLOCK_BYTES)
    tier = reopen()
    for chunk in CHUNKS:
        put(tier, chunk)
    names = disk_places.files(root)
    assert len(names) > 3
    for number, chunk in enumerate(CHUNKS[:-1]):
        tier.delete(key_of(chunk))
        left = [whole(tier, each) for each in CHUNKS]
        assert left == [None] * (number + 1) + [each.blob for each in CHUNKS[number + 1 :]]
    assert len(disk_places.files(root)) == 2
    put(reopen(), CHUNKS[0])
    assert set(disk_places.files(root)).isdisjoint(names[1:-1]), "no number is used again"


def test_many_objects_share_their_syncs_and_are_all_stored_or_none(
    root: Path, reopen: Callable[[], DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = reopen()
    put(tier, LOW[5])
    real, synced = os.fdatasync, set[int]()

    def counted(descriptor: int) -> None:
        assert descriptor not in synced
        synced.add(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", counted)
    tier.put_many([new(chunk) for chunk in CHUNKS])
    assert len(synced) == 2, "one of the data, then one of the index"
    assert [whole(tier, chunk) for chunk in CHUNKS] == [chunk.blob for chunk in CHUNKS]
    assert (tier.objects, tier.used_bytes) == (6, sum(tier.cost_bytes(len(chunk.blob)) for chunk in CHUNKS))
    tier.capacity_bytes = tier.used_bytes + tier.cost_bytes(len(LOW[0].blob))
    with pytest.raises(TierFull):
        tier.put_many([new(chunk) for chunk in LOW[:2]])
    assert [whole(tier, chunk) for chunk in CHUNKS] == [chunk.blob for chunk in CHUNKS]


def test_capacity_holds_within_a_hundredth_where_few_objects_keep_many_pages_of_the_index(
    root: Path, reopen: Callable[[], DiskTier]
) -> None:
    tier = reopen()
    chunks = kv.chunks(LAYOUT, 64 * PAGE_SLOTS, seed=3, quality="low")
    tier.capacity_bytes = len(chunks) * tier.cost_bytes(len(chunks[0].blob))
    tier.put_many([new(chunk) for chunk in chunks])
    for number, chunk in enumerate(chunks):
        if number % PAGE_SLOTS:
            tier.delete(key_of(chunk))
    index = root / "index"
    assert index.stat().st_blocks * 512 >= 64 * BLOCK_BYTES
    stored = 0
    with pytest.raises(TierFull):  # noqa: PT012
        for chunk in kv.chunks(LARGE, 200, seed=4):
            put(tier, chunk, LARGE)
            stored += 1
    assert stored > 50
    taken = disk_places.taken_bytes(root) + disk_places.data_bytes(index)
    assert tier.capacity_bytes * 0.9 < taken < tier.capacity_bytes * 1.01 + 2 * BLOCK_BYTES


def test_readers_see_one_version_or_none_while_a_writer_changes_everything(reopen: Callable[[], DiskTier]) -> None:
    tier = reopen()
    low, high = (kv.chunks(LAYOUT, 4, seed=6, quality=quality) for quality in ("low", "high"))
    failures: list[str] = []
    reads = [0]
    stop = threading.Event()

    def read() -> None:
        rng = random.Random(threading.get_ident())
        while not stop.is_set():
            number = rng.randrange(4)
            versions = (low[number].blob, high[number].blob)
            length = len(rng.choice(versions))
            data = tier.read(key_of(low[number]), length)
            if data is not None:
                reads[0] += 1
                if bytes(data) not in {version[:length] for version in versions}:
                    failures.append(f"object {number}, {length} bytes")

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    rng = random.Random(1)
    layer_bytes = codec.parse_header(high[0].blob).layer_bytes
    while reads[0] < 2000:
        number = rng.randrange(4)
        change = rng.randrange(4)
        if change == 0:
            tier.delete(key_of(low[number]))
        elif change == 1:
            put(tier, low[number])
        else:
            put(tier, high[number])
            if change == 3:
                tier.truncate(key_of(high[number]), codec.parse_header(high[number].blob).layer_bytes[0])
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures, (failures[0], layer_bytes)


def test_a_segment_that_somebody_removed_is_a_miss_and_its_room_comes_back(
    root: Path, reopen: Callable[[], DiskTier]
) -> None:
    tier = reopen()
    key = put(tier, CHUNKS[0])
    place_of(root, key).segment.unlink()
    assert tier.read(key, 10) is None
    tier.delete(key)
    assert tier.objects == 0
    assert list(reopen().scan()) == []
    assert reopen().used_bytes == 0


# Whose directory it is


def test_a_second_tier_on_the_same_root_is_refused(root: Path, reopen: Callable[[], DiskTier]) -> None:
    tier = reopen()
    put(tier, CHUNKS[0])
    with pytest.raises(DiskUnusable, match="in use by another node"):
        DiskTier(root, ROOMY)
    assert whole(tier, CHUNKS[0]) == CHUNKS[0].blob
    assert len(list(reopen().scan())) == 1, "and free again once the first is closed"


def test_a_root_that_cannot_be_prepared_is_not_left_locked(root: Path) -> None:
    root.mkdir()
    (root / "lock").touch()
    (root / "segments").write_bytes(b"a file in the way")
    with pytest.raises(DiskUnusable, match="cannot be used"):
        DiskTier(root, ROOMY)
    (root / "segments").unlink()
    DiskTier(root, ROOMY).close()


@pytest.mark.parametrize("name", ["tmp", "objects", "segments", "index"])
def test_what_is_somebody_elses_is_not_touched(root: Path, name: str) -> None:
    (root / name).mkdir(parents=True)
    (root / name / "precious").write_bytes(b"x")
    with pytest.raises(DiskUnusable, match="choose an empty directory"):
        DiskTier(root, ROOMY)
    assert disk_places.files(root) == [f"{name}/precious"]


@pytest.mark.parametrize("folder", ["file/below", "file"])
def test_a_root_that_is_no_folder_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(DiskUnusable, match="cannot be used"):
        DiskTier(tmp_path / folder, ROOMY)


@pytest.mark.parametrize("content", [b"KVCINDEX" + b"\2\0\0\0" + bytes(244), b"something else", b"x" * 4096])
def test_an_index_of_another_version_is_refused_and_kept(root: Path, content: bytes) -> None:
    root.mkdir()
    (root / "lock").touch()
    (root / "index").write_bytes(content)
    with pytest.raises(DiskUnusable, match="does not know"):
        DiskTier(root, ROOMY)
    assert (root / "index").read_bytes() == content


def test_a_file_system_without_holes_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr("kvstore.tiers.disk_root.punch", unsupported)
    with pytest.raises(DiskUnusable, match="use one on ext4"):
        DiskTier(root, ROOMY)


def test_objects_in_the_old_format_are_removed_once(
    root: Path, reopen: Callable[[], DiskTier], caplog: pytest.LogCaptureFixture
) -> None:
    (root / "objects" / "ab").mkdir(parents=True)
    (root / "objects" / "ab" / "x.kvc").write_bytes(b"old")
    (root / "tmp").mkdir()
    (root / "lock").touch()
    reopen()
    assert disk_places.files(root) == ["index"]
    assert [record.message for record in caplog.records if "before the first release" in record.message] != []
    caplog.clear()
    reopen()
    assert not caplog.records


def a_file(path: Path) -> None:
    path.write_bytes(b"x" * 5000)


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_bytes(b"x")


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_link(path: Path) -> None:
    kept = path.parent.parent.parent / "kept"
    kept.write_bytes(b"x")
    path.symlink_to(kept)


@pytest.mark.parametrize("name", ["00000009.seg", "9.seg", "stranger"])
@pytest.mark.parametrize("what", [a_file, a_folder, a_pipe, a_link])
def test_what_is_no_segment_is_removed(
    root: Path, reopen: Callable[[], DiskTier], what: Callable[[Path], None], name: str
) -> None:
    put(reopen(), CHUNKS[0])
    what(root / "segments" / name)
    tier = reopen()
    assert whole(tier, CHUNKS[0]) == CHUNKS[0].blob
    assert disk_places.files(root) == ["index", "segments/00000001.seg"]
    assert what is not a_link or (root.parent / "kept").exists(), "what a link points at is not ours"
    put(tier, CHUNKS[1])
    assert whole(reopen(), CHUNKS[1]) == CHUNKS[1].blob


def test_an_index_that_is_a_link_is_not_followed(root: Path, reopen: Callable[[], DiskTier]) -> None:
    put(reopen(), CHUNKS[0])
    kept = shutil.move(root / "index", root.parent / "kept")
    (root / "index").symlink_to(kept)
    with pytest.raises(DiskUnusable, match="cannot be used"):
        reopen()


def test_a_scan_tells_the_same_as_columns(reopen: Callable[[], DiskTier]) -> None:
    tier = reopen()
    high = kv.chunks(LAYOUT, 4, seed=9, quality="high")
    for chunk in (*CHUNKS, *high):
        put(tier, chunk)
    header = codec.parse_header(high[0].blob)
    tier.truncate(key_of(high[0]), header.layer_bytes[0])
    tier.truncate(key_of(high[1]), header.layer_bytes[1])
    tier = reopen()
    one_by_one = list(tier.scan())
    columns = list(tier.scan_columns())
    assert len(one_by_one) == len(CHUNKS) + 4 == sum(len(piece.tokens) for piece in columns)
    at = iter(one_by_one)
    for piece in columns:
        for row in range(len(piece.tokens)):
            each = next(at)
            key = (piece.namespaces[row].tobytes(), piece.hashes[row].tobytes(), int(piece.parts[row]))
            assert key == each.key
            assert piece.parents[row].tobytes() == each.parent
            numbers = (piece.first_positions, piece.tokens, piece.qualities, piece.provenances)
            assert [int(column[row]) for column in numbers] == [
                each.first_position, each.tokens, each.quality, each.provenance,
            ]  # fmt: skip
            assert tuple(piece.layer_bytes[row, : piece.layers[row]].tolist()) == each.layer_bytes
