"""Segments: large files that objects are appended to, and that give back the blocks of those which leave.

    ROOT/segments/00000001.seg    objects one after the other, each from a block's start, zeros up to the next block

Objects leave in another order than they came. Their blocks go at once, by a hole punched into the file
(`fallocate(FALLOC_FL_PUNCH_HOLE)`): nothing is moved, so nothing is written twice. A place, (segment, block), is never
used again: new objects are appended behind old ones, and the numbers of segments only rise. So whoever holds a place
from before reads what was there, zeros or no file, never another object. A segment without objects is removed.

The file system's own map of data and holes (`SEEK_DATA`, `SEEK_HOLE`) says what is really there: recovery relies on it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvstore.tiers.base import Bytes
from kvstore.tiers.disk_writer import BLOCK_BYTES, DiskWriter, aligned, blocks_of, open_direct

log = logging.getLogger(__name__)

SEGMENT_BYTES = 256 << 20  # a segment that is longer gets no more objects
_NAME = re.compile(r"(\d{8,10})\.seg")
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def punch(descriptor: int, offset: int, length: int) -> None:
    """Gives back the blocks of a range; it reads as zeros then. Raises OSError."""
    if _fallocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, offset, length):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def data_runs(descriptor: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of a file that is not a hole, in bytes. Raises OSError."""
    end = 0
    while True:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no more data
                return
            raise
        yield start, end


class Segments:
    """The segments below `folder`. One thread appends and releases; any may read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._objects: Counter[int] = Counter()  # in each segment
        self._last = 0  # the number of the newest segment
        self._descriptor: int | None = None  # of the newest, while it is appended to
        self._end = 0
        self._writer = DiskWriter()

    def numbers(self) -> list[int]:
        """Those that there are. Raises OSError."""
        found = (_NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def is_segment(self, path: Path) -> bool:
        match = _NAME.fullmatch(path.name)
        return match is not None and path == self.path(int(match[1])) and path.is_file() and not path.is_symlink()

    def path(self, segment: int) -> Path:
        return self._folder / f"{segment:08d}.seg"

    def adopt(self, objects: Counter[int], last: int) -> None:
        """What recovery found: objects by segment, and the highest number ever used."""
        self._objects, self._last = objects, last

    def append(self, objects: Sequence[Bytes]) -> list[tuple[int, int]]:
        """The (segment, block) of each object, all of them synced. Raises OSError; then none of them is there."""
        descriptor = self._writable()
        start = at = self._end
        places: list[tuple[int, int]] = []
        for data in objects:
            places.append((self._last, at // BLOCK_BYTES))
            at += blocks_of(len(data)) * BLOCK_BYTES
        try:
            # Room first: a full disk says so before anything is written, and writes that extend no file may overlap.
            os.posix_fallocate(descriptor, start, at - start)
            self._writer.write(descriptor, objects, start)
            os.fdatasync(descriptor)
        except OSError:
            # After a failed sync nobody knows which pages are on the medium: this file is never appended to again.
            self.retract(places)
            raise
        self._end = at
        self._objects[self._last] += len(objects)
        return places

    def retract(self, places: Sequence[tuple[int, int]]) -> None:
        """Cuts off what the last `append` wrote, or was to write, and ends the segment."""
        assert self._descriptor is not None, "what is retracted was just appended"
        start = places[0][1] * BLOCK_BYTES
        if self._end > start:
            self._objects[self._last] -= len(places)
        try:
            os.ftruncate(self._descriptor, start)
        except OSError as error:
            log.warning("%s: %s; what could not be written takes room until a restart", self.path(self._last), error)
        self._finish()

    def release(self, place: tuple[int, int], skip: int, length: int) -> None:
        """Gives back the blocks of an object of `length` bytes but its first `skip` blocks. Raises OSError."""
        segment, block = place
        if not skip:
            self._objects[segment] -= 1
            if not self._objects[segment] and not self._is_open(segment):
                self._remove(segment)
                return
        offset, size = (block + skip) * BLOCK_BYTES, (blocks_of(length) - skip) * BLOCK_BYTES
        if size:
            self.punch(segment, offset, size)

    def punch(self, segment: int, offset: int, size: int) -> None:
        """Raises OSError."""
        descriptor = os.open(self.path(segment), os.O_WRONLY)
        try:
            punch(descriptor, offset, size)
        finally:
            os.close(descriptor)

    def read(self, place: tuple[int, int], length: int) -> memoryview | None:
        """None where the file ends before, or is gone. Raises OSError."""
        try:
            descriptor = open_direct(self.path(place[0]), os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            view, at = aligned(blocks_of(length) * BLOCK_BYTES), 0
            while at < length:
                count = os.preadv(descriptor, [view[at:]], place[1] * BLOCK_BYTES + at)
                if not count:
                    return None
                at += count
            return view[:length]
        finally:
            os.close(descriptor)

    def close(self) -> None:
        if self._descriptor is not None:
            self._finish()
        self._writer.close()

    def _is_open(self, segment: int) -> bool:
        return self._descriptor is not None and segment == self._last

    def _writable(self) -> int:
        if self._descriptor is not None and self._end >= SEGMENT_BYTES:
            self._finish()
        if self._descriptor is None:
            path = self.path(self._last + 1)
            descriptor = open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                sync_directory(self._folder)
            except OSError:
                os.close(descriptor)
                path.unlink()
                raise
            self._descriptor, self._end = descriptor, 0
            self._last += 1
        return self._descriptor

    def _finish(self) -> None:
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor = None
        if not self._objects[self._last]:
            try:
                self._remove(self._last)
            except OSError as error:
                log.warning("%s cannot be removed: %s; it takes room until a restart", self.path(self._last), error)

    def _remove(self, segment: int) -> None:
        self.path(segment).unlink(missing_ok=True)
        del self._objects[segment]


def sync_directory(path: Path) -> None:
    """Its entries survive a loss of power. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
