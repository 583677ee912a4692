"""Large writes past the page cache: objects are copied into aligned buffers, and several buffers written at once.

Direct I/O wants addresses, lengths and offsets that are multiples of a block. It spares the page cache a second copy of
what memory holds anyway, and the machine the pages; a disk is at its best with more than one request at a time.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvstore.tiers.base import Bytes

BLOCK_BYTES = 4096
_BUFFER_BYTES = 4 << 20
_BUFFERS = 3  # one is filled while two are written: 12 MiB, whatever the size of a put


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
        self._buffers = [np.frombuffer(mmap.mmap(-1, _BUFFER_BYTES), np.uint8) for _ in range(_BUFFERS)]
        self._threads = ThreadPoolExecutor(_BUFFERS - 1, "kvstore-disk-buffer")

    def write(self, descriptor: int, objects: Sequence[Bytes], offset: int) -> None:
        """Writes them from `offset` on, each from a block's start, zeros up to the next. Raises OSError.

        Nothing is being written any more when it returns or raises; nothing is synced."""
        under_way: list[Future[None]] = []
        try:
            for number, piece in enumerate(self._filled(objects, under_way)):
                at = offset + number * _BUFFER_BYTES
                under_way.append(self._threads.submit(_write_all, descriptor, piece, at))
        finally:
            failures = [each.exception() for each in under_way]
        for failure in failures:
            if failure is not None:
                raise failure

    def close(self) -> None:
        self._threads.shutdown()

    def _filled(self, objects: Sequence[Bytes], under_way: Sequence[Future[None]]) -> Iterator[memoryview]:
        """Buffers in turn, all but the last full; each is filled once what it held is written."""
        number = filled = 0
        for data in objects:
            left = np.frombuffer(data, np.uint8)
            while len(left):
                buffer = self._buffers[number % _BUFFERS]
                if not filled and number >= _BUFFERS:
                    under_way[number - _BUFFERS].exception()
                left, filled = _fill(buffer, filled, left)
                if filled == _BUFFER_BYTES:
                    yield buffer.data
                    number, filled = number + 1, 0
        if filled:
            yield self._buffers[number % _BUFFERS][:filled].data


def _fill(buffer: NDArray[np.uint8], at: int, data: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], int]:
    """What of `data` did not fit, and where the next goes; zeros follow its end up to a block."""
    count = min(len(data), len(buffer) - at)
    buffer[at : at + count] = data[:count]  # NumPy lets other threads run meanwhile
    end = blocks_of(at + count) * BLOCK_BYTES
    buffer[at + count : end] = 0
    return data[count:], end


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """A file system may take less at a time."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
