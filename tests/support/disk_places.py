"""Where the disk tier keeps an object, so that a test can damage it; and what its files take on the disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kvstore.index.entry import ObjectKey
from kvstore.tiers.disk_index import SLOT_BYTES, IndexFile
from kvstore.tiers.disk_segments import data_runs, punch
from kvstore.tiers.disk_writer import BLOCK_BYTES, blocks_of


@dataclass(frozen=True)
class Place:
    """An object's bytes in its segment, and its slot in the index."""

    segment: Path
    offset: int
    length: int
    index: Path
    slot: int

    def write(self, at: int, data: bytes) -> None:
        """Over the object's bytes from `at` on."""
        write(self.segment, self.offset + at, data)

    def flip(self, at: int, bit: int) -> None:
        flip(self.segment, self.offset + at, bit)

    def punch(self, at: int = 0) -> None:
        """Makes a hole of its blocks from byte `at` on."""
        first = blocks_of(at)
        descriptor = os.open(self.segment, os.O_WRONLY)
        punch(descriptor, self.offset + first * BLOCK_BYTES, (blocks_of(self.length) - first) * BLOCK_BYTES)
        os.close(descriptor)

    def slot_bytes(self) -> bytes:
        return self.index.read_bytes()[self.slot * SLOT_BYTES :][:SLOT_BYTES]

    def write_slot(self, data: bytes) -> None:
        write(self.index, self.slot * SLOT_BYTES, data)


def place_of(root: Path, key: ObjectKey) -> Place:
    """Raises LookupError where the index has no such object."""
    index = IndexFile(root / "index")
    try:
        loaded, _ = index.load()
        for slot in loaded.slots.tolist():
            content = index.read(slot)
            assert content is not None
            head = content.header_bytes
            if (head[8:40], head[40:72], int.from_bytes(head[72:76], "little")) == key:
                segment = root / "segments" / f"{content.segment:08d}.seg"
                return Place(segment, content.block * BLOCK_BYTES, content.length, root / "index", slot)
    finally:
        index.close()
    raise LookupError(key)


def taken_bytes(root: Path) -> int:
    """Of all segments."""
    return sum(map(data_bytes, (root / "segments").iterdir()))


def data_bytes(path: Path) -> int:
    """Whole blocks of a file that the file system's map says are no holes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return sum(blocks_of(end - start) * BLOCK_BYTES for start, end in data_runs(descriptor))
    finally:
        os.close(descriptor)


def allocated_bytes(root: Path) -> int:
    """What `du` says of the segments."""
    return sum(path.stat().st_blocks * 512 for path in (root / "segments").iterdir())


def files(root: Path) -> list[str]:
    """Every file below ROOT, but the lock and the layouts."""
    found = (path.relative_to(root) for path in root.rglob("*") if not path.is_dir() or path.is_symlink())
    return sorted(str(path) for path in found if path.parts[0] not in ("lock", "namespaces"))


def write(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        file.write(data)


def flip(path: Path, offset: int, bit: int) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        byte = file.read(1)[0]
    write(path, offset, bytes([byte ^ 1 << bit]))
