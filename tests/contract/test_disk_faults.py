"""A medium that is full, fails to write, to sync or to read: the disk tier degrades, says so once, and comes back."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import disk_places
import kv_objects as kv
import pytest
from fake_clock import FakeClock
from tier_objects import LAYOUT, key_of, put, whole

import kvstore_codec as codec
from kvstore.errors import DiskUnusable, TierFailed
from kvstore.tiers import disk_index, disk_segments
from kvstore.tiers.disk import READ_FAILURES_MAX, DiskTier, NewObject
from kvstore.tiers.disk_index import PAGE_SLOTS, SLOT_BYTES
from kvstore_client.circuit import PAUSE_S_MAX

ROOMY = 64 << 20
LOW, CHUNKS = (kv.chunks(LAYOUT, 6, seed=1, quality=quality) for quality in ("low", "raw"))
LARGE = kv.small_layout("large", layers=4, head_dim=64)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def reopen(root: Path, opened: list[DiskTier], clock: FakeClock) -> Callable[[], DiskTier]:
    def again() -> DiskTier:
        if opened:
            opened.pop().close()
        opened.append(DiskTier(root, ROOMY, clock=clock, rng=random.Random(1)))
        return opened[-1]

    return again


def fail(monkeypatch: pytest.MonkeyPatch, function: str, code: int, *, call: int = 1, times: int = 1) -> None:
    """The `call`th call of a function of `os`, and the next ones up to `times`, raises; the others pass."""
    real = getattr(os, function)
    calls = 0

    def faulty(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if call <= calls < call + times:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **keywords)

    monkeypatch.setattr(os, function, faulty)


def state(tier: DiskTier) -> str:
    """Asked anew: mypy takes it for what it was."""
    return tier.state


FAULTS = [
    pytest.param("open", errno.EROFS, 1, id="no-new-segment"),
    pytest.param("fsync", errno.EIO, 1, id="sync-of-the-folder-fails"),
    pytest.param("posix_fallocate", errno.ENOSPC, 1, id="no-space"),
    pytest.param("pwrite", errno.EIO, 1, id="write-fails"),
    pytest.param("fdatasync", errno.EIO, 1, id="sync-of-the-data-fails"),
    pytest.param("pwrite", errno.ENOSPC, 2, id="no-space-in-the-index"),
    pytest.param("fdatasync", errno.EIO, 2, id="sync-of-the-index-fails"),
]


@pytest.mark.parametrize(("function", "code", "call"), FAULTS)
def test_a_write_that_fails_leaves_nothing_and_makes_the_tier_read_only_for_a_while(
    root: Path, reopen: Callable[[], DiskTier], clock: FakeClock, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, function: str, code: int, call: int,
) -> None:  # fmt: skip
    put(reopen(), CHUNKS[0])
    tier = reopen()  # the next put begins a segment
    before, used = CHUNKS[0], tier.used_bytes
    for spell in range(2):
        with monkeypatch.context() as patched:
            fail(patched, function, code, call=call)
            with pytest.raises(TierFailed, match="cannot write") as raised:
                put(tier, CHUNKS[1])
        assert raised.value.context["errno"] == code
        assert tier.state == "read_only"
        assert (tier.used_bytes, tier.stray_bytes, tier.objects) == (used, 0, 1)
        assert disk_places.taken_bytes(root) == used - SLOT_BYTES
        with pytest.raises(TierFailed, match="no writes for now"):
            put(tier, CHUNKS[1])
        assert whole(tier, before) == before.blob, "reads go on"
        if not spell:
            clock.now_s += PAUSE_S_MAX
    assert len(caplog.records) == 1, "one line, however often it is tried again"
    clock.now_s += PAUSE_S_MAX
    put(tier, CHUNKS[1])
    assert tier.state == "ok"
    tier = reopen()
    assert [whole(tier, chunk) for chunk in CHUNKS[:3]] == [before.blob, CHUNKS[1].blob, None]


@pytest.mark.parametrize(("function", "code", "call"), FAULTS)
def test_a_replacement_that_fails_leaves_the_old_version(
    root: Path, reopen: Callable[[], DiskTier], monkeypatch: pytest.MonkeyPatch, function: str, code: int, call: int
) -> None:
    put(reopen(), LOW[0])
    tier = reopen()
    fail(monkeypatch, function, code, call=call)
    with pytest.raises(TierFailed):
        put(tier, CHUNKS[0])
    monkeypatch.undo()
    assert whole(tier, LOW[0]) == LOW[0].blob
    tier = reopen()
    assert whole(tier, LOW[0]) == LOW[0].blob
    assert tier.used_bytes == tier.cost_bytes(len(LOW[0].blob))
    assert disk_places.taken_bytes(root) == tier.used_bytes - SLOT_BYTES


@pytest.mark.parametrize("call", [1, 2], ids=["data", "index"])
def test_a_failed_sync_takes_all_of_its_batch_and_nothing_else(
    reopen: Callable[[], DiskTier], clock: FakeClock, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The kernel forgets what it could not write, so those pages are trusted no more, nor is their file appended to."""
    tier = reopen()
    put(tier, CHUNKS[0])
    fail(monkeypatch, "fdatasync", errno.EIO, call=call)
    with pytest.raises(TierFailed):
        tier.put_many([NewObject(key_of(chunk), chunk.ref.parent, chunk.blob) for chunk in CHUNKS[1:4]])
    assert [whole(tier, chunk) for chunk in CHUNKS[:4]] == [CHUNKS[0].blob, None, None, None]
    clock.now_s += PAUSE_S_MAX
    put(tier, CHUNKS[4])
    tier = reopen()
    assert {stored.key for stored in tier.scan()} == {key_of(CHUNKS[0]), key_of(CHUNKS[4])}


def test_what_cannot_be_freed_stays_counted_until_a_restart(
    reopen: Callable[[], DiskTier], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier = reopen()
    for chunk in CHUNKS:
        put(tier, chunk)
    cost = tier.cost_bytes(len(CHUNKS[0].blob))

    def broken(*_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(disk_segments, "punch", broken)
        assert tier.delete(key_of(CHUNKS[0]))
        put(tier, LOW[1])
    assert whole(tier, CHUNKS[0]) is None
    assert tier.stray_bytes == 2 * (cost - SLOT_BYTES)
    assert tier.used_bytes == 4 * cost + tier.cost_bytes(len(LOW[1].blob)) + tier.stray_bytes
    assert len(caplog.records) == 1
    tier = reopen()
    assert tier.used_bytes == 4 * cost + tier.cost_bytes(len(LOW[1].blob))


@pytest.mark.parametrize("last", [False, True], ids=["one of a page", "the last of a page"])
def test_what_the_index_refuses_changes_nothing(
    reopen: Callable[[], DiskTier], monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    tier = reopen()
    chunks = kv.chunks(LAYOUT, PAGE_SLOTS, seed=2, quality="high")
    for chunk in chunks:
        put(tier, chunk)
    chunk = chunks[-1] if last else chunks[0]

    def broken(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    used = tier.used_bytes
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", broken)
        patched.setattr(disk_index, "punch", broken)
        with pytest.raises(TierFailed, match="cannot delete"):
            tier.delete(key_of(chunk))
        with pytest.raises(TierFailed, match="cannot truncate"):
            tier.truncate(key_of(chunk), codec.parse_header(chunk.blob).layer_bytes[0])
    assert tier.used_bytes == used
    assert whole(tier, chunk) == chunk.blob
    assert tier.delete(key_of(chunk))


def test_a_disk_that_cannot_be_read_is_off_after_some_failures_in_a_row(
    reopen: Callable[[], DiskTier], clock: FakeClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier = reopen()
    key = put(tier, CHUNKS[0])
    fail(monkeypatch, "preadv", errno.EIO, times=READ_FAILURES_MAX)
    for number in range(READ_FAILURES_MAX):
        assert tier.state == "ok", number
        with pytest.raises(TierFailed, match="cannot read: Input/output error"):
            tier.read(key, 10)
    assert tier.state == "off"
    with pytest.raises(TierFailed, match="off for now"):
        tier.read(key, 10)
    assert len(caplog.records) == 1
    clock.now_s += PAUSE_S_MAX
    assert whole(tier, CHUNKS[0]) == CHUNKS[0].blob
    assert state(tier) == "ok"
    fail(monkeypatch, "preadv", errno.EIO)
    with pytest.raises(TierFailed):
        tier.read(key, 10)
    assert whole(tier, CHUNKS[0]) == CHUNKS[0].blob, "one bad sector is not the end of the disk"


def test_where_uses_cannot_be_recorded_reads_still_work(
    reopen: Callable[[], DiskTier], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier = reopen()
    put(tier, CHUNKS[0])
    fail(monkeypatch, "pwrite", errno.EROFS, times=3)
    for _ in range(3):
        assert whole(tier, CHUNKS[0]) == CHUNKS[0].blob
    assert len(caplog.records) == 1


def test_an_index_that_cannot_be_read_is_one_line(
    root: Path, reopen: Callable[[], DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    reopen()
    fail(monkeypatch, "pread", errno.EIO, times=1000)
    with pytest.raises(DiskUnusable, match="cannot be used: Input/output error"):
        reopen()


def test_slots_that_failed_and_could_not_be_freed_do_not_stand_in_the_way(
    reopen: Callable[[], DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = reopen()

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(disk_index, "_write", refuse)
        patched.setattr(disk_index, "punch", refuse)
        for chunk in CHUNKS[:2]:
            tier._writing.succeed()  # as after its pause
            with pytest.raises(TierFailed):
                put(tier, chunk)
    tier._writing.succeed()
    put(tier, CHUNKS[0])
    assert whole(tier, CHUNKS[0]) == CHUNKS[0].blob
    assert whole(reopen(), CHUNKS[0]) == CHUNKS[0].blob


def test_a_file_system_that_takes_little_at_a_time_is_written_to_the_end(
    reopen: Callable[[], DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = reopen()
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: real(descriptor, memoryview(data)[:4096], at))
    put(tier, CHUNKS[0])
    monkeypatch.undo()
    assert whole(reopen(), CHUNKS[0]) == CHUNKS[0].blob


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of few MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if request.param == "tmpfs":
        command: list[str | Path] = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    else:
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.truncate(4 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal", image], check=True)
        command = ["mount", "-o", "loop", image, folder]
    mounted = subprocess.run(command, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a {request.param} here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, clock: FakeClock) -> None:
    root = small_disk / "disk"
    chunks = kv.chunks(LARGE, 200, seed=4)
    tier = DiskTier(root, ROOMY, clock=clock)  # believes in more room than there is
    stored: list[kv.StoredChunk] = []
    with pytest.raises(TierFailed, match="No space left") as raised:  # noqa: PT012
        for chunk in chunks:
            put(tier, chunk, LARGE)
            stored.append(chunk)
    assert raised.value.context["errno"] == errno.ENOSPC
    assert len(stored) > 3
    assert tier.state == "read_only"
    costs = sum(tier.cost_bytes(len(chunk.blob)) for chunk in stored)
    assert (tier.objects, tier.used_bytes) == (len(stored), costs)
    assert [whole(tier, chunk, LARGE) for chunk in stored] == [chunk.blob for chunk in stored]
    for chunk in stored[:2]:
        assert tier.delete(key_of(chunk, LARGE)), "what is there can go"
    clock.now_s += PAUSE_S_MAX
    put(tier, chunks[len(stored)], LARGE)
    assert state(tier) == "ok"
    tier.close()
    tier = DiskTier(root, ROOMY)
    assert len(list(tier.scan())) == len(stored) - 1
    assert disk_places.taken_bytes(root) == tier.used_bytes - (len(stored) - 1) * SLOT_BYTES
    tier.close()


def test_a_limit_of_the_size_of_files_is_a_failed_write(tmp_path: Path) -> None:
    """A real refusal by the kernel, in a process of its own."""
    limit = 64 << 10
    code = (
        "import resource, sys; from pathlib import Path\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "import kv_objects as kv; from tier_objects import *; from kvstore.tiers.disk import DiskTier\n"
        "from kvstore.errors import TierFailed\n"
        "tier = DiskTier(Path(sys.argv[1]), 1 << 30); stored = []\n"
        "for chunk in kv.chunks(LAYOUT, 40, seed=1):\n"
        "    try: put(tier, chunk)\n"
        "    except TierFailed as error: print(error.context['errno']); break\n"
        "    stored.append(chunk)\n"
        "assert stored and all(whole(tier, chunk) == chunk.blob for chunk in stored)\n"
        "print(tier.state)"
    )
    support = Path(disk_places.__file__).parent
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "disk")], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(support)}, check=True,
    )  # fmt: skip
    assert ran.stdout.split() == [str(errno.EFBIG), "read_only"]
