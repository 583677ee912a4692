"""What the writer puts into a file, from wherever it takes it, and what it holds on to afterwards: nothing."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.index.entry import ObjectKey
from kvstore.tiers.disk_writer import BLOCK_BYTES, DiskWriter, blocks_of, open_direct
from kvstore.tiers.host import HostTier

#: in place and copied, whole blocks and not, more than one batch
LENGTHS = [5 << 20, 100, 70_000, BLOCK_BYTES, 64 << 10, 9 << 20, 300_000, 1]


@pytest.fixture
def host() -> Iterator[HostTier]:
    tier = HostTier(64 << 20)
    yield tier
    tier.close()


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    descriptor = open_direct(tmp_path / "segment", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def writer() -> Iterator[DiskWriter]:
    writer = DiskWriter()
    yield writer
    writer.close()


def key(number: int) -> ObjectKey:
    return ObjectKey(bytes(32), number.to_bytes(32, "big"), 0)


def contents() -> list[bytes]:
    return [np.random.default_rng(length).bytes(length) for length in LENGTHS]


def in_memory(host: HostTier) -> list[memoryview]:
    """As the node has them."""
    for number, data in enumerate(contents()):
        host.put(key(number), bytes(32), data)
    views = [host.read(key(number), length) for number, length in enumerate(LENGTHS)]
    return [view for view in views if view is not None]


def written(path: Path, offset: int) -> bytes:
    return path.read_bytes()[offset:]


def expected() -> bytes:
    return b"".join(data.ljust(blocks_of(len(data)) * BLOCK_BYTES, b"\0") for data in contents())


@pytest.mark.parametrize("from_host", [True, False])
def test_objects_follow_each_other_from_blocks_starts(
    host: HostTier, writer: DiskWriter, descriptor: int, tmp_path: Path, from_host: bool
) -> None:
    for _ in range(2):  # also with buffers that hold something
        writer.write(descriptor, in_memory(host) if from_host else contents(), BLOCK_BYTES)
        assert written(tmp_path / "segment", BLOCK_BYTES) == expected()


def test_large_objects_of_the_host_tier_are_not_copied(
    host: HostTier, writer: DiskWriter, descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    real = os.pwritev

    def noting(descriptor: int, pieces: list[memoryview], offset: int) -> int:
        seen.update(np.frombuffer(each, np.uint8).ctypes.data for each in pieces)
        return real(descriptor, pieces, offset)

    monkeypatch.setattr(os, "pwritev", noting)
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: noting(descriptor, [data], offset))
    views = in_memory(host)
    writer.write(descriptor, views, 0)
    for view in views:
        in_place = len(view) >= 64 << 10
        assert (np.frombuffer(view, np.uint8).ctypes.data in seen) == in_place, len(view)


def test_a_disk_that_does_not_read_such_memory_gets_copies(
    host: HostTier, writer: DiskWriter, descriptor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[int] = []

    def refuse(descriptor: int, pieces: list[memoryview], offset: int) -> int:
        refused.append(offset)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "pwritev", refuse)
    for _ in range(2):
        writer.write(descriptor, in_memory(host), 0)
        assert written(tmp_path / "segment", 0) == expected()
        count = len(refused)
        refused.clear()
    assert count == 0, "it is asked once"


def test_a_file_system_that_takes_a_block_at_a_time_is_written_to_the_end(
    host: HostTier, writer: DiskWriter, descriptor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, data[:BLOCK_BYTES], at))
    monkeypatch.setattr(os, "pwritev", lambda file, pieces, at: real(file, pieces[0][:BLOCK_BYTES], at))
    writer.write(descriptor, in_memory(host), 0)
    assert written(tmp_path / "segment", 0) == expected()


@pytest.mark.parametrize("fails", [True, False])
def test_no_memory_stays_lent(
    host: HostTier, writer: DiskWriter, descriptor: int, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if fails:
        monkeypatch.setattr(os, "pwritev", refuse)
    views = in_memory(host)
    gc.disable()  # cycles would hold it until some collection
    try:
        if fails:
            with pytest.raises(OSError, match="Input/output error"):
                writer.write(descriptor, views, 0)
        else:
            writer.write(descriptor, views, 0)
        views.clear()
        for number in range(len(LENGTHS)):
            host.delete(key(number))
        assert host.waiting_bytes == 0
    finally:
        gc.enable()
