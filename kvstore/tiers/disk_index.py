"""The index file: what the segments hold, one slot of 256 bytes an object, written in place.

    ROOT/index    slot 0: magic, version, zeros; slots 1…: an object each, or zeros

    slot: the object's header, as it is in the object (192, codec/FORMAT.md) · parent hash (32) · segment u32 ·
          block u32 · length held u64 · XXH3-64 of the 240 bytes before · last use u64, which is not checked

A slot is born by one write of 256 bytes that never crosses a sector of a disk or a page of memory, so no crash leaves
half of one; it dies by zeros. There is no log to replay and nothing to compact: opening reads the file once, front to
back. What a bad sector takes is the two slots in it. A page of 16 slots that are all free is a hole in the file.
"""

from __future__ import annotations

import errno
import heapq
import os
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

import kvstore_codec as codec
from kvstore.errors import DiskUnusable
from kvstore.index.entry import ObjectKey
from kvstore.tiers.base import StoredColumns
from kvstore.tiers.disk_segments import data_runs, punch
from kvstore.tiers.disk_writer import BLOCK_BYTES
from kvstore_codec import Quality

SLOT_BYTES = 256
PAGE_SLOTS = BLOCK_BYTES // SLOT_BYTES
_MAGIC = struct.Struct("<8sI")
_OWN_MAGIC, VERSION = b"KVCINDEX", 1
_PLACE = struct.Struct("<32sIIQQQ")
_CHECKED, _LAST_USE = 240, 248
assert codec.HEADER_BYTES + _PLACE.size == SLOT_BYTES
_KEY = slice(8, 76)  # namespace, chunk hash and part in the object's header
_PIECE_SLOTS = 1 << 12  # read at a time: a mebibyte, which stays in the processor's cache
_ZEROS = bytes(SLOT_BYTES)

#: What the node's index wants, at the offsets of codec/FORMAT.md and of the slot: namespace, hash, part, tokens, first
#: position, quality, quality layers, provenance, bytes of each quality layer; parent, length held.
_COLUMNS = np.dtype(
    {
        "names": [
            "namespace", "hash", "part", "tokens", "first_position", "quality", "layers", "provenance", "layer_bytes",
            "parent", "length",
        ],
        "formats": [("<u8", 4), ("<u8", 4), "<u4", "<u4", "<u8", "u1", "u1", "u1", ("<u8", 3), ("<u8", 4), "<u8"],
        "offsets": [8, 40, 72, 76, 80, 90, 91, 92, 136, 192, 232],
        "itemsize": SLOT_BYTES,
    }
)  # fmt: skip
_ROW = np.dtype(
    {
        "names": ["segment", "block", "length", "checksum", "last_use"],
        "formats": ["<u4", "<u4", "<u8", "<u8", "<u8"],
        "offsets": [224, 228, 232, _CHECKED, _LAST_USE],
        "itemsize": SLOT_BYTES,
    }
)


class Slot(NamedTuple):
    """A slot's content: the bytes an object begins with, and where the object is."""

    header_bytes: bytes
    parent: bytes
    segment: int
    block: int
    length: int
    last_use: int

    def pack(self) -> bytes:
        body = self.header_bytes + _PLACE.pack(self.parent, self.segment, self.block, self.length, 0, 0)[:-16]
        return body + struct.pack("<QQ", xxhash.xxh3_64_intdigest(body), self.last_use)


class Loaded(NamedTuple):
    """Intact slots, as columns. `fingerprints` stand for keys."""

    slots: NDArray[np.int64]
    fingerprints: NDArray[np.int64]
    segments: NDArray[np.int64]
    blocks: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    def places(self) -> NDArray[np.int64]:
        """Segment and block as one number."""
        return self.segments << 32 | self.blocks


def fingerprint(key: ObjectKey) -> int:
    """60 bits that stand for a key in memory, secret since Python's hash of bytes is (PYTHONHASHSEED).

    Of a million objects two share one with a probability of 4e-7; then one of them is lost: a miss, since whoever
    reads an object compares its key."""
    return hash(key.namespace_id + key.chunk_hash + key.part.to_bytes(4, "little")) & _FINGERPRINT


_FINGERPRINT = (1 << 60) - 1  # an int of 32 bytes


class IndexFile:
    """Raises DiskUnusable from the constructor for a file of another version, OSError otherwise. One thread writes,
    any may `touch`."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            self._begin(path)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._free: list[int] = []  # a heap: new objects fill the lowest pages
        self._end = os.fstat(self._descriptor).st_size // SLOT_BYTES
        self._objects_by_page = array("B")
        self._pages_taken = 0
        self.last_use = 0

    @property
    def slots(self) -> int:
        """One more than the highest that is used, or was."""
        return self._end

    @property
    def taken_bytes(self) -> int:
        """Of the file's pages that are no holes."""
        return self._pages_taken * BLOCK_BYTES

    def load(self) -> tuple[Loaded, list[int]]:
        """Every intact slot, and the numbers of damaged ones. Raises OSError."""
        pieces: list[Loaded] = []
        damaged: list[int] = []
        digest = xxhash.xxh3_64_intdigest
        for first, raw in self._pieces():
            rows = np.frombuffer(raw, _ROW)
            used = np.flatnonzero(rows["length"])
            starts = (used * SLOT_BYTES).tolist()
            checksums = np.fromiter((digest(raw[at : at + _CHECKED]) for at in starts), np.uint64, len(starts))
            intact = used[checksums == rows["checksum"][used]]
            damaged += (first + np.setdiff1d(used, intact, assume_unique=True)).tolist()
            keys = (hash(raw[at + _KEY.start : at + _KEY.stop]) & _FINGERPRINT for at in (intact * SLOT_BYTES).tolist())
            prints = np.fromiter(keys, np.int64, len(intact))
            chosen = rows[intact]
            place = (chosen[name].astype(np.int64) for name in ("segment", "block", "length"))
            pieces.append(Loaded(first + intact, prints, *place))
            self.last_use = max(self.last_use, int(chosen["last_use"].max(initial=0)))
        return Loaded(*(np.concatenate(column) for column in zip(*pieces, strict=True))), damaged

    def adopt(self, slots: NDArray[np.int64]) -> None:
        """What recovery found to be objects; pages without any become holes. Raises OSError."""
        pages = -(-self._end // PAGE_SLOTS)
        by_page = np.bincount(slots // PAGE_SLOTS, minlength=pages)
        by_page[0] += 1  # the header
        for start, end in list(data_runs(self._descriptor)):
            for page in np.flatnonzero(by_page[start // BLOCK_BYTES : end // BLOCK_BYTES] == 0).tolist():
                punch(self._descriptor, start + page * BLOCK_BYTES, BLOCK_BYTES)
        self._objects_by_page = array("B", by_page.astype(np.uint8).tobytes())
        self._pages_taken = int(np.count_nonzero(by_page))
        taken = np.zeros(self._end, bool)
        taken[0] = taken[slots] = True
        self._free = np.flatnonzero(~taken).tolist()  # sorted, so a heap

    def take(self) -> int:
        """The number of a free slot."""
        if self._free:
            slot = heapq.heappop(self._free)
        else:
            slot, self._end = self._end, self._end + 1
        page = slot // PAGE_SLOTS
        if page == len(self._objects_by_page):
            self._objects_by_page.append(0)
        self._objects_by_page[page] += 1
        self._pages_taken += self._objects_by_page[page] == 1
        return slot

    def free(self, slot: int) -> None:
        """The opposite of `take`; the slot holds zeros afterwards. Raises OSError."""
        page = slot // PAGE_SLOTS
        if self._objects_by_page[page] == 1:
            punch(self._descriptor, page * BLOCK_BYTES, BLOCK_BYTES)
        else:
            self.clear(slot)
        self._objects_by_page[page] -= 1
        self._pages_taken -= not self._objects_by_page[page]
        heapq.heappush(self._free, slot)

    def write(self, slot: int, content: Slot) -> None:
        """Raises OSError."""
        _write(self._descriptor, content.pack(), slot * SLOT_BYTES)

    def clear(self, slot: int) -> None:
        """Raises OSError."""
        _write(self._descriptor, _ZEROS, slot * SLOT_BYTES)

    def read(self, slot: int) -> Slot | None:
        """None for one that is not intact. Raises OSError."""
        raw = self._read(slot, 1)
        parent, segment, block, length, checksum, last_use = _PLACE.unpack_from(raw, codec.HEADER_BYTES)
        if not length or checksum != xxhash.xxh3_64_intdigest(raw[:_CHECKED]):
            return None
        return Slot(raw[: codec.HEADER_BYTES], parent, segment, block, length, last_use)

    def touch(self, slot: int) -> None:
        """Used now. Raises OSError."""
        os.pwrite(self._descriptor, self.next_use().to_bytes(8, "little"), slot * SLOT_BYTES + _LAST_USE)

    def next_use(self) -> int:
        """Ticks of this count order the uses."""
        self.last_use += 1
        return self.last_use

    def sync(self) -> None:
        """Raises OSError."""
        os.fdatasync(self._descriptor)

    def stored_columns(self) -> Iterator[StoredColumns]:
        """Every object, least recently used first, some thousands at a time. Raises OSError."""
        return map(_columns, self._raw_in_order())

    def _raw_in_order(self) -> Iterator[bytes]:
        """All slots of objects, least recently used first, in pieces."""
        numbers: list[NDArray[np.int64]] = []
        uses: list[NDArray[np.uint64]] = []
        for first, raw in self._pieces():
            rows = np.frombuffer(raw, _ROW)
            used = np.flatnonzero(rows["length"])
            numbers.append(first + used)
            uses.append(rows["last_use"][used])
        slots = np.concatenate(numbers)[np.argsort(np.concatenate(uses), kind="stable")]
        for at in range(0, len(slots), _PIECE_SLOTS):
            piece = slots[at : at + _PIECE_SLOTS]
            runs = np.split(piece, np.flatnonzero(np.diff(piece) != 1) + 1)
            yield b"".join(self._read(int(run[0]), len(run)) for run in runs if len(run))

    def close(self) -> None:
        os.close(self._descriptor)

    def _begin(self, path: Path) -> None:
        head = os.pread(self._descriptor, SLOT_BYTES, 0)
        if not head:
            _write(self._descriptor, _MAGIC.pack(_OWN_MAGIC, VERSION).ljust(SLOT_BYTES, b"\0"), 0)
            return
        magic, version = _MAGIC.unpack_from(head.ljust(_MAGIC.size, b"\0"))
        if magic != _OWN_MAGIC or version != VERSION:
            raise DiskUnusable(
                f"disk_path {path.parent} has an index that this version of kvstore does not know: choose another "
                "disk_path, or remove this directory's content if it may go"
            )

    def _pieces(self) -> Iterator[tuple[int, bytes]]:
        """(number of the first slot, whole slots) of the file, its header slot as zeros."""
        for first in range(0, self._end, _PIECE_SLOTS):
            raw = self._read(first, min(_PIECE_SLOTS, self._end - first))
            yield first, raw if first else _ZEROS + raw[SLOT_BYTES:]

    def _read(self, slot: int, count: int) -> bytes:
        """Raises OSError."""
        raw = os.pread(self._descriptor, count * SLOT_BYTES, slot * SLOT_BYTES)
        if len(raw) != count * SLOT_BYTES:  # a regular file gives all of so little, or an error
            raise OSError(errno.EIO, "the index ends before its end")
        return raw


def _columns(raw: bytes) -> StoredColumns:
    rows = np.frombuffer(raw, _COLUMNS)
    lengths, layers = rows["layer_bytes"], rows["layers"].astype(np.int64)
    # Cut after it was put, or before: then the layers that its length still holds.
    there = (lengths <= rows["length"][:, None]) & (np.arange(lengths.shape[1]) < layers[:, None])
    held = there.sum(axis=1)
    quality = np.where(held < layers, Quality.LOW + 1 - held, rows["quality"])
    return StoredColumns(
        rows["namespace"], rows["hash"], rows["part"], rows["parent"], rows["first_position"], rows["tokens"], quality,
        rows["provenance"], held, np.where(there, lengths, 0),
    )  # fmt: skip


def _write(descriptor: int, data: bytes, offset: int) -> None:
    """Raises OSError."""
    if os.pwrite(descriptor, data, offset) != len(data):  # only a full disk takes less of so little
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
