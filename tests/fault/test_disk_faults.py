"""A real node whose disk is full or fails: it stays up, says so once, serves what it can, and recovers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kv_objects as kv
import pytest
from node_process import NodeProcess
from polling import wait_until

LAYOUT = kv.small_layout(layers=8, head_dim=64)  # 64 KiB an object
RECOVERY_S_MAX = 30.0
#: `kvstore`, but system calls fail while a file named after one exists in FOLDER.
FAULTY = """
import errno, os, sys
folder = sys.argv.pop(1)
def faulty(name, real):
    def call(*arguments, **keywords):
        if os.path.exists(os.path.join(folder, name)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments, **keywords)
    return call
for name in ("pwrite", "pwritev", "fdatasync", "preadv"):
    setattr(os, name, faulty(name, getattr(os, name)))
from kvstore.cli import main
main()
"""


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


def put(node: NodeProcess, chunks: list[kv.StoredChunk]) -> list[bool]:
    """Whether each is durable; all are stored."""
    return [result.durable for result in kv.put(node.store, LAYOUT, chunks, durable=True)]


def fetch(node: NodeProcess, chunks: list[kv.StoredChunk]) -> list[bytes]:
    return kv.fetch(node.store, LAYOUT, [chunk.hash for chunk in chunks])


def lines(node: NodeProcess, text: str) -> int:
    return sum(text in line for line in node.log().splitlines())


def test_a_full_disk_leaves_objects_in_memory_and_the_node_up(tmp_path: Path, small_disk: Path) -> None:
    chunks = kv.chunks(LAYOUT, 40, seed=1)  # 2.6 MB
    node = NodeProcess(tmp_path, "--disk-path", str(small_disk / "disk"), "--disk-capacity", "1GiB")
    try:
        durable = [put(node, [chunk])[0] for chunk in chunks]
        assert any(durable)
        assert not all(durable)
        assert fetch(node, chunks) == [chunk.blob for chunk in chunks]
        assert kv.stat(node.store).counters["tier_failures.disk.write"] >= 1
        assert lines(node, "disk tier is read-only: No space left on device") == 1
        node.kill()
        node = NodeProcess(tmp_path, "--disk-path", str(small_disk / "disk"), "--disk-capacity", "1GiB")
        stored = [chunk for chunk, is_durable in zip(chunks, durable, strict=True) if is_durable]
        assert kv.stat(node.store).objects == len(stored)
        assert fetch(node, stored[:1]) == [stored[0].blob]
    finally:
        node.kill()


@pytest.mark.parametrize("call", ["pwrite", "pwritev", "fdatasync"])
def test_a_disk_that_fails_to_write_or_sync_is_read_only_until_it_works_again(tmp_path: Path, call: str) -> None:
    chunks = kv.chunks(LAYOUT, 12, seed=1)
    flags = ["--disk-path", str(tmp_path / "disk"), "--disk-capacity", "1GiB"]
    node = NodeProcess(tmp_path, *flags, command=[sys.executable, "-c", FAULTY, str(tmp_path)])
    try:
        assert put(node, chunks[:4]) == [True] * 4
        (tmp_path / call).touch()
        assert put(node, chunks[4:8]) == [False] * 4
        assert fetch(node, chunks[:8]) == [chunk.blob for chunk in chunks[:8]]
        assert lines(node, "disk tier is read-only: Input/output error") == 1
        (tmp_path / call).unlink()
        wait_until(lambda: put(node, chunks[8:]) == [True] * 4, "puts are durable", deadline_s=RECOVERY_S_MAX)
        assert lines(node, "disk tier takes writes again") == 1
        node.kill()
        node = NodeProcess(tmp_path, *flags)
        durable = [*chunks[:4], *chunks[8:]]
        assert fetch(node, durable) == [chunk.blob for chunk in durable]
    finally:
        node.kill()


def test_a_disk_that_cannot_be_read_is_a_miss(tmp_path: Path) -> None:
    chunks = kv.chunks(LAYOUT, 12, seed=1)
    flags = ["--host-capacity", "0", "--disk-path", str(tmp_path / "disk"), "--disk-capacity", "1GiB"]
    node = NodeProcess(tmp_path, *flags, command=[sys.executable, "-c", FAULTY, str(tmp_path)])
    try:
        assert put(node, chunks) == [True] * 12
        (tmp_path / "preadv").touch()
        for _ in range(12):
            assert fetch(node, chunks) == []
        assert lines(node, "disk tier is off: Input/output error") == 1
        (tmp_path / "preadv").unlink()
        whole = [chunk.blob for chunk in chunks]
        wait_until(lambda: fetch(node, chunks) == whole, "objects are read", deadline_s=RECOVERY_S_MAX)
        assert lines(node, "disk tier can be read again") == 1
    finally:
        node.kill()
