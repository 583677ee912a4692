"""What only the disk tier must do: survive restarts, strangers' files and faults of the medium."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kv_objects as kv
import pytest
from tier_objects import LAYOUT, key_of, put, whole

import kvstore_codec as codec
from kvstore.errors import DiskUnusable, TierFailed
from kvstore.tiers.disk import DiskTier

ROOMY = 64 << 20
LOW, CHUNKS = (kv.chunks(LAYOUT, 6, seed=1, quality=quality) for quality in ("low", "raw"))
LARGE = kv.small_layout("large", layers=4, head_dim=64)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture
def reopen(root: Path, opened: list[DiskTier]) -> Callable[[], DiskTier]:
    """Ends the tier opened last and opens the next one."""

    def again() -> DiskTier:
        if opened:
            opened.pop().close()
        opened.append(DiskTier(root, ROOMY))
        return opened[-1]

    return again


def file_of(root: Path, chunk: kv.StoredChunk) -> Path:
    (path,) = root.glob(f"objects/*/{chunk.hash.hex()}-*")
    return path


def files(root: Path) -> list[Path]:
    """Everything below ROOT but the folders that are always there."""
    fixed = {root / "objects", root / "tmp", root / "lock", *(root / "objects" / f"{n:02x}" for n in range(256))}
    return sorted(set(root.rglob("*")) - fixed)


def test_reopening_finds_everything_in_the_order_of_last_use(root: Path, reopen: Callable[[], DiskTier]) -> None:
    tier = reopen()
    chunks = CHUNKS
    for second, chunk in enumerate(chunks):
        put(tier, chunk)
        os.utime(file_of(root, chunk), (second, second))  # the clock of file systems is too coarse for this test
    used = tier.used_bytes
    tier.read(key_of(chunks[2]), 10)
    tier = reopen()
    found = list(tier.scan())
    order = [0, 1, 3, 4, 5, 2]
    assert [stored.key for stored in found] == [key_of(chunks[number]) for number in order]
    assert [stored.parent for stored in found] == [chunks[number].ref.parent for number in order]
    assert [stored.header for stored in found] == [codec.parse_header(chunks[number].blob) for number in order]
    assert (tier.used_bytes, tier.objects) == (used, len(chunks))
    assert [whole(tier, chunk) for chunk in chunks] == [chunk.blob for chunk in chunks]


def test_what_an_object_costs_is_what_its_file_takes(root: Path, reopen: Callable[[], DiskTier]) -> None:
    tier = reopen()
    chunk = kv.chunks(LARGE, 1, seed=2)[0]
    put(tier, chunk, LARGE)
    assert file_of(root, chunk).stat().st_blocks * 512 == tier.used_bytes


def garbage(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(5000))


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def without_its_last_byte(path: Path, rng: random.Random) -> None:
    os.truncate(path, path.stat().st_size - 1)


def without_its_trailer(path: Path, rng: random.Random) -> None:
    os.truncate(path, path.stat().st_size - 64)


def cut_inside_its_header(path: Path, rng: random.Random) -> None:
    os.truncate(path, 100)


def with_a_byte_more(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def with_a_damaged_header(path: Path, rng: random.Random) -> None:
    flip(path, rng.randrange(codec.HEADER_BYTES), rng.randrange(8))


def under_another_name(path: Path, rng: random.Random) -> None:
    path.rename(path.with_name("0" * 64 + path.name[64:]))


def of_another_part(path: Path, rng: random.Random) -> None:
    path.rename(path.with_name(path.name.replace("-0-", "-1-")))


def of_another_namespace(path: Path, rng: random.Random) -> None:
    path.rename(path.with_name(path.name[:67] + rng.randbytes(32).hex() + ".kvc"))


def in_another_folder(path: Path, rng: random.Random) -> None:
    path.rename(path.parent.with_name(f"{int(path.parent.name, 16) ^ 1:02x}") / path.name)


def in_no_folder(path: Path, rng: random.Random) -> None:
    path.rename(path.parent.parent / path.name)


def in_a_folder_below(path: Path, rng: random.Random) -> None:
    (path.parent / "below").mkdir()
    path.rename(path.parent / "below" / path.name)


def in_a_folder_beside(path: Path, rng: random.Random) -> None:
    (path.parent.parent / "beside").mkdir()
    path.rename(path.parent.parent / "beside" / path.name)


def a_link_to_an_object(path: Path, rng: random.Random) -> None:
    moved = path.rename(path.parent.parent.parent.parent / "kept")
    path.symlink_to(moved)


def a_link_to_nothing(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def a_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_bytes(b"x")


def a_pipe(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder_that_is_a_link(path: Path, rng: random.Random) -> None:
    moved = path.parent.rename(path.parent.parent.parent.parent / "kept")
    path.parent.symlink_to(moved)


def a_folder_that_is_a_file(path: Path, rng: random.Random) -> None:
    shutil.rmtree(path.parent)
    path.parent.write_bytes(b"x")


HOSTILE = [
    garbage, empty, without_its_last_byte, without_its_trailer, cut_inside_its_header, with_a_byte_more,
    with_a_damaged_header, under_another_name, of_another_part, of_another_namespace, in_another_folder, in_no_folder,
    in_a_folder_below, in_a_folder_beside, a_link_to_an_object, a_link_to_nothing, a_folder, a_pipe,
    a_folder_that_is_a_link, a_folder_that_is_a_file,
]  # fmt: skip


@pytest.mark.parametrize("spoil", HOSTILE)
def test_what_is_no_object_is_removed(
    root: Path, reopen: Callable[[], DiskTier], spoil: Callable[[Path, random.Random], None]
) -> None:
    good, bad = CHUNKS[:2]
    assert good.hash[0] != bad.hash[0], "they lie in different folders"
    tier = reopen()
    for chunk in (good, bad):
        put(tier, chunk)
    spoil(file_of(root, bad), random.Random(1))
    tier = reopen()
    assert [stored.key for stored in tier.scan()] == [key_of(good)]
    assert whole(tier, good) == good.blob
    assert tier.used_bytes == tier.cost_bytes(len(good.blob))
    assert files(root) == [file_of(root, good)]
    kept = root.parent / "kept"
    assert not kept.exists() or kept.is_file() or list(kept.iterdir()), "what a link points at is not ours"
    put(tier, bad)
    assert whole(tier, bad) == bad.blob, "the place of a stranger's file can be used again"


def flip(path: Path, offset: int, bit: int) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.mark.slow
@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_of_a_trailer_is_found(root: Path, reopen: Callable[[], DiskTier], bit: int) -> None:
    chunks = kv.chunks(LAYOUT, 65, seed=3)
    tier = reopen()
    for chunk in chunks:
        put(tier, chunk)
    for offset, chunk in enumerate(chunks[:64]):
        flip(file_of(root, chunk), len(chunk.blob) + offset, bit)
    assert [stored.key for stored in reopen().scan()] == [key_of(chunks[64])]
    assert len(files(root)) == 1


def test_what_was_being_written_is_gone_after_a_restart(root: Path, reopen: Callable[[], DiskTier]) -> None:
    reopen()
    (root / "tmp" / "1").write_bytes(CHUNKS[0].blob)
    (root / "tmp" / "folder").mkdir()
    assert list(reopen().scan()) == []
    assert files(root) == []


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
    (root / "objects").write_bytes(b"a file in the way")
    with pytest.raises(DiskUnusable, match="cannot be used"):
        DiskTier(root, ROOMY)
    (root / "objects").unlink()
    DiskTier(root, ROOMY).close()


@pytest.mark.parametrize("folder", ["tmp", "objects"])
def test_somebody_elses_folders_are_not_emptied(root: Path, folder: str) -> None:
    (root / folder).mkdir(parents=True)
    (root / folder / "precious").write_bytes(b"x")
    with pytest.raises(DiskUnusable, match="choose an empty directory"):
        DiskTier(root, ROOMY)
    assert files(root) == [root / folder / "precious"]


@pytest.mark.parametrize("folder", ["file/below", "file"])
def test_a_root_that_is_no_folder_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(DiskUnusable, match="cannot be used"):
        DiskTier(tmp_path / folder, ROOMY)


# Faults of the medium


def fail(monkeypatch: pytest.MonkeyPatch, function: str, code: int, *, call: int = 1) -> None:
    """The `call`th call of a function of `os`, or of Path if it has it, raises; the others pass."""
    owner = Path if hasattr(Path, function) else os
    real = getattr(owner, function)
    calls = 0

    def faulty(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **keywords)

    monkeypatch.setattr(owner, function, faulty)


FAULTS = [
    pytest.param("writev", errno.ENOSPC, 1, id="no-space"),
    pytest.param("writev", errno.EIO, 1, id="write-fails"),
    pytest.param("fsync", errno.EIO, 1, id="sync-of-the-file-fails"),
    pytest.param("rename", errno.EROFS, 1, id="rename-fails"),
    pytest.param("fsync", errno.EIO, 2, id="sync-of-the-folder-fails"),
]


@pytest.mark.parametrize(("function", "code", "call"), FAULTS)
def test_a_write_that_fails_leaves_nothing(
    root: Path, reopen: Callable[[], DiskTier], monkeypatch: pytest.MonkeyPatch, function: str, code: int, call: int
) -> None:
    tier = reopen()
    before, new = CHUNKS[:2]
    put(tier, before)
    used = tier.used_bytes
    fail(monkeypatch, function, code, call=call)
    with pytest.raises(TierFailed, match="cannot write") as raised:
        put(tier, new)
    assert raised.value.context["errno"] == code
    assert (tier.used_bytes, tier.objects) == (used, 1)
    assert files(root) == [file_of(root, before)]
    put(tier, new)
    assert [whole(tier, chunk) for chunk in (before, new)] == [before.blob, new.blob], "the fault has passed"


@pytest.mark.parametrize(("function", "code", "call"), FAULTS)
def test_a_replacement_that_fails_leaves_the_old_version_or_nothing(
    root: Path, reopen: Callable[[], DiskTier], monkeypatch: pytest.MonkeyPatch, function: str, code: int, call: int
) -> None:
    tier = reopen()
    worse, better = LOW[0], CHUNKS[0]
    put(tier, worse)
    fail(monkeypatch, function, code, call=call)
    with pytest.raises(TierFailed):
        put(tier, better)
    monkeypatch.undo()
    left = files(root)
    assert tier.objects == len(left)
    assert tier.used_bytes == sum(path.stat().st_blocks * 512 for path in left)
    if left:
        assert whole(tier, worse) == worse.blob
    assert len(list(reopen().scan())) == len(left)


def test_a_file_system_that_takes_little_at_a_time_is_written_to_the_end(
    reopen: Callable[[], DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = reopen()
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda descriptor, buffers: real(descriptor, [memoryview(buffers[0])[:999]]))
    put(tier, CHUNKS[0])
    monkeypatch.undo()
    tier = reopen()
    assert len(list(tier.scan())) == 1
    assert whole(tier, CHUNKS[0]) == CHUNKS[0].blob


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    chunks = kv.chunks(LARGE, 40, seed=4)
    tier = DiskTier(small_disk / "disk", ROOMY)  # believes in more room than there is
    stored = []
    with pytest.raises(TierFailed, match="No space left") as raised:  # noqa: PT012
        for chunk in chunks:
            put(tier, chunk, LARGE)
            stored.append(chunk)
    assert raised.value.context["errno"] == errno.ENOSPC
    assert len(stored) > 3
    assert tier.objects == len(stored)
    assert tier.used_bytes == sum(tier.cost_bytes(len(chunk.blob)) for chunk in stored)
    assert list((small_disk / "disk" / "tmp").iterdir()) == []
    for chunk in stored:
        assert whole(tier, chunk, LARGE) == chunk.blob
    assert tier.delete(key_of(stored[0], LARGE))
    put(tier, chunks[len(stored)], LARGE)
    tier.close()
    tier = DiskTier(small_disk / "disk", ROOMY)
    assert len(list(tier.scan())) == len(stored)
    tier.close()


def test_a_disk_that_cannot_be_read_is_a_failure_not_a_miss(
    reopen: Callable[[], DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = reopen()
    key = put(tier, CHUNKS[0])
    fail(monkeypatch, "fstat", errno.EIO)
    with pytest.raises(TierFailed, match="cannot read"):
        tier.read(key, 10)
    fail(monkeypatch, "unlink", errno.EROFS)
    with pytest.raises(TierFailed, match="cannot delete"):
        tier.delete(key)
    assert whole(tier, CHUNKS[0]) == CHUNKS[0].blob
    assert tier.objects == 1


def test_where_uses_cannot_be_recorded_reads_still_work(
    reopen: Callable[[], DiskTier], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier = reopen()
    put(tier, CHUNKS[0])

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", read_only)
    for _ in range(3):
        assert whole(tier, CHUNKS[0]) == CHUNKS[0].blob
    assert len(caplog.records) == 1


def test_a_file_that_somebody_removed_is_a_miss_and_its_room_comes_back(
    root: Path, reopen: Callable[[], DiskTier]
) -> None:
    tier = reopen()
    key = put(tier, CHUNKS[0])
    file_of(root, CHUNKS[0]).unlink()
    assert tier.read(key, 10) is None
    assert not tier.delete(key)
    assert (tier.used_bytes, tier.objects) == (0, 0)
