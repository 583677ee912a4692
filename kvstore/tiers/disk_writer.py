"""Large writes past the page cache, several at once, from where the objects are as far as that can be.

Direct I/O wants lengths and offsets that are multiples of a block, and addresses that the disk's own memory access can
start from. It spares the page cache a second copy of what memory holds anyway, and the machine the pages; a disk is at
its best with more than one request at a time. The whole blocks of a large object in the host tier, which aligns
them, are written from there; its end, small objects and others go through aligned buffers. Copying everything cost half
of the speed (docs/design/0017).
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvstore.tiers.base import Bytes

log = logging.getLogger(__name__)

BLOCK_BYTES = 4096
_BATCH_BYTES = 4 << 20  # written by one call
_BUFFERS = 3  # a batch's copies; one is filled while two batches are written: 12 MiB, whatever the size of a put
_IN_PLACE_BYTES_MIN = 64 << 10  # of an object; beneath it a copy costs less than another piece in a call
_ADDRESS_BYTES = 512  # what disks want of an address, at most; those that want more refuse, once


def blocks_of(length: int) -> int:
    """Whole blocks that `length` bytes take."""
    return -(-length // BLOCK_BYTES)


def open_direct(path: Path, flags: int) -> int:
    """A descriptor for direct I/O, or for other where the file system does not know it. Raises OSError."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags & ~os.O_EXCL, 0o644)  # some have created it, and then refused


def aligned(size: int) -> memoryview:
    """Memory that direct I/O can fill; not zeroed."""
    memory = np.empty(size + BLOCK_BYTES, np.uint8)
    skip = -memory.ctypes.data % BLOCK_BYTES
    return memory[skip : skip + size].data


class DiskWriter:
    """One thread uses it."""

    def __init__(self) -> None:
        self._buffers = [np.frombuffer(mmap.mmap(-1, _BATCH_BYTES), np.uint8) for _ in range(_BUFFERS)]
        self._threads = ThreadPoolExecutor(_BUFFERS - 1, "kvstore-disk-buffer")
        self._in_place = True

    def write(self, descriptor: int, objects: Sequence[Bytes], offset: int) -> None:
        """Writes them from `offset` on, each from a block's start, zeros up to the next. Raises OSError.

        Nothing is being written any more, and no memory of theirs held, when it returns or raises; nothing is
        synced."""
        try:
            self._write(descriptor, objects, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._in_place:
                raise
            log.info("the disk does not write from where objects are in memory: they are copied first")
            self._in_place = False
            self._write(descriptor, objects, offset)

    def close(self) -> None:
        self._threads.shutdown()

    def _write(self, descriptor: int, objects: Sequence[Bytes], offset: int) -> None:
        under_way: list[Future[None]] = []
        try:
            for batch in self._batches(objects, under_way):
                size = sum(map(len, batch))
                under_way.append(self._threads.submit(_write_all, descriptor, batch, offset))
                offset += size
        finally:
            failures = [failure for each in under_way if (failure := each.exception()) is not None]
        try:
            if failures:
                raise failures[0]
        finally:
            del failures  # else the error would hold this frame, and this frame the error

    def _batches(self, objects: Sequence[Bytes], under_way: Sequence[Future[None]]) -> Iterator[list[memoryview]]:
        """What is written together: pieces of objects in place, and of the batch's buffer, whose turn has come once
        what it held is written."""
        number = 0
        batch = _Batch(self._buffers[0])
        for data in objects:
            left = np.frombuffer(data, np.uint8)
            in_place = len(left) // BLOCK_BYTES * BLOCK_BYTES if self._may_stay(left) else 0
            while len(left):
                if batch.room == _BATCH_BYTES and number >= _BUFFERS:
                    under_way[number - _BUFFERS].exception()
                count = min(in_place or len(left), batch.room)
                if in_place:
                    batch.add(left[:count])
                    in_place -= count
                else:
                    batch.add_copy(left[:count])
                left = left[count:]
                if not batch.room:
                    yield batch.pieces
                    number += 1
                    batch = _Batch(self._buffers[number % _BUFFERS])
        if batch.pieces:
            yield batch.pieces

    def _may_stay(self, data: NDArray[np.uint8]) -> bool:
        return self._in_place and len(data) >= _IN_PLACE_BYTES_MIN and not data.ctypes.data % _ADDRESS_BYTES


class _Batch:
    """Pieces that follow each other in the file, whole blocks each."""

    def __init__(self, buffer: NDArray[np.uint8]) -> None:
        self._buffer, self._filled = buffer, 0
        self._copies_from: int | None = None  # where in the buffer the last piece begins, if it is there
        self.pieces: list[memoryview] = []
        self.room = len(buffer)

    def add(self, blocks: NDArray[np.uint8]) -> None:
        self.pieces.append(blocks.data)
        self._copies_from = None
        self.room -= len(blocks)

    def add_copy(self, data: NDArray[np.uint8]) -> None:
        """Zeros follow its end up to a block."""
        start, end = self._filled, self._filled + blocks_of(len(data)) * BLOCK_BYTES
        self._buffer[start : start + len(data)] = data  # NumPy lets other threads run meanwhile
        self._buffer[start + len(data) : end] = 0
        if self._copies_from is None:
            self._copies_from = start
        else:
            self.pieces.pop()
        self.pieces.append(self._buffer[self._copies_from : end].data)
        self._filled = end
        self.room -= end - start


def _write_all(descriptor: int, batch: list[memoryview], offset: int) -> None:
    """Leaves `batch` empty: this thread forgets what it ran a moment after it is done, and till then objects' memory
    would be lent to it."""
    try:
        while batch:
            written = (
                os.pwritev(descriptor, batch, offset) if len(batch) > 1 else os.pwrite(descriptor, batch[0], offset)
            )
            offset += written
            while batch and written >= len(batch[0]):
                written -= len(batch.pop(0))
            if written:  # a file system may take less at a time
                batch[0] = batch[0][written:]
    finally:
        batch.clear()
