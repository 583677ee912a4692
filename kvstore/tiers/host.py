"""Objects in this node's memory: one arena, which other processes of the machine can map (`fd`, `location`)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

from kvstore.errors import TierFull
from kvstore.index.entry import ObjectKey
from kvstore.tiers.allocator import aligned
from kvstore.tiers.arena import Arena, Block, Location
from kvstore.tiers.base import Bytes, StoredObject


class Reserved:
    """Room in memory for an object that is still arriving; made by `HostTier.reserve`.

    `view` is written by its only holder, then it is either adopted as an object or released; a view that somebody
    holds on to keeps the room, so that a late write hits nothing else."""

    __slots__ = ("adopted", "block", "view")

    def __init__(self, block: Block, view: memoryview) -> None:
        self.block, self.view, self.adopted = block, view, False

    def __len__(self) -> int:
        return self.block.length


class HostTier:
    """Copies what it is given, and lends read-only views of it that never change, whatever happens to the object.

    `used_bytes` counts each object in multiples of 512 bytes, and objects that are gone while views of them are held.
    The process takes at most a sixteenth (at least 1 MiB) more memory than `capacity_bytes`, and only as objects come.
    Every method may be called from any thread; one runs at a time. Raises ConfigError where the machine has not
    the addresses or the huge pages."""

    name = "host"

    def __init__(self, capacity_bytes: int, huge_pages: bool = False) -> None:
        self.capacity_bytes = capacity_bytes
        self._arena = Arena(capacity_bytes, huge_pages=huge_pages)
        self._blocks: dict[ObjectKey, Block] = {}
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return self._arena.used_bytes

    @property
    def objects(self) -> int:
        return len(self._blocks)

    @property
    def waiting_bytes(self) -> int:
        """The part of `used_bytes` that is deleted, cut or replaced, but still being read."""
        with self._lock:
            return self._arena.waiting_bytes

    @property
    def memory_bytes(self) -> int:
        """Memory committed by the system: for objects, and free for the next ones."""
        with self._lock:
            return self._arena.memory_bytes

    @property
    def fragmentation_ratio(self) -> float:
        """Free memory that is of no use to an object of a page or more, as a part of the capacity."""
        with self._lock:
            return self._arena.stranded_bytes / max(self.capacity_bytes, 1)

    @property
    def remapped_bytes(self) -> int:
        """Memory given back to the system and taken anew so far, since no free place was large enough."""
        with self._lock:
            return self._arena.given_up_bytes

    @property
    def fd(self) -> int:
        """Of the memory that `location` speaks of; it is open for writing."""
        return self._arena.fd

    def cost_bytes(self, length: int) -> int:
        return aligned(max(length, 1))

    def room_for(self, length: int, replacing: ObjectKey | None = None) -> bool:
        """Whether `put` has room for an object; with `replacing`, once that one is deleted.

        It becomes true by deleting others, unless too many of them are being read."""
        with self._lock:
            replaced = None if replacing is None else self._blocks.get(replacing)
            freed_bytes = replaced.placed_bytes if replaced is not None and replaced.lent() is None else 0
            if self._arena.used_bytes - freed_bytes + self.cost_bytes(length) > self.capacity_bytes:
                return False
            return self._arena.fits(length, replaced)

    def put(self, key: ObjectKey, parent: bytes, data: Bytes) -> None:
        """While it is written, a replacement stands beside what it replaces: delete that first where room is scarce."""
        with self._lock:
            block = None
            free = self.capacity_bytes - self._arena.used_bytes
            if self.cost_bytes(len(data)) <= free:
                block = self._arena.store(data)
            if block is None:
                raise TierFull("host tier has no room", needed=self.cost_bytes(len(data)), free=free)
            replaced = self._blocks.get(key)
            self._blocks[key] = block
            if replaced is not None:
                self._arena.free(replaced)

    def reserve(self, length: int) -> Reserved | None:
        """Room for an object of `length` bytes, which counts as used; None where there is none. It is given back by
        `adopt` or `release`. Raises TierFailed."""
        with self._lock:
            if self.cost_bytes(length) > self.capacity_bytes - self._arena.used_bytes:
                return None
            block = self._arena.reserve(length)
            return None if block is None else Reserved(block, self._arena.writable(block))

    def adopt(self, key: ObjectKey, reserved: Reserved) -> None:
        """What was written there is the object of this key from now on, as after `put`, without a copy."""
        with self._lock:
            replaced = self._blocks.get(key)
            self._blocks[key] = reserved.block
            reserved.adopted = True
            if replaced is not None:
                self._arena.free(replaced)

    def release(self, reserved: Reserved) -> None:
        """Gives back what is not wanted; not after `adopt`."""
        with contextlib.suppress(BufferError):  # somebody is still at it: the room waits for them
            reserved.view.release()
        with self._lock:
            self._arena.free(reserved.block)

    def read(self, key: ObjectKey, length: int) -> memoryview | None:
        with self._lock:
            block = self._blocks.get(key)
            return self._arena.view(block, length) if block is not None and block.length >= length else None

    def read_many(self, keys: Sequence[ObjectKey], lengths: Sequence[int], bytes_max: float) -> list[memoryview]:
        """`read` of each key that there is a length for, up to the first that is not here, and to the one with which
        they have `bytes_max`."""
        found: list[memoryview] = []
        size = 0
        with self._lock:
            for key, length in zip(keys, lengths, strict=False):
                block = self._blocks.get(key)
                if block is None or block.length < length or size >= bytes_max:
                    break
                found.append(self._arena.view(block, length))
                size += length
        return found

    def truncate(self, key: ObjectKey, length: int) -> bool:
        with self._lock:
            block = self._blocks.get(key)
            if block is not None and length < block.length:
                self._arena.cut(block, length)
            return block is not None

    def delete(self, key: ObjectKey) -> bool:
        with self._lock:
            block = self._blocks.pop(key, None)
            if block is not None:
                self._arena.free(block)
            return block is not None

    def location(self, key: ObjectKey) -> Location | None:
        """Where the object is in the memory behind `fd`."""
        with self._lock:
            block = self._blocks.get(key)
            return None if block is None else Location(block.offset, block.length, block.generation)

    def place_of(self, view: memoryview) -> int | None:
        """The offset in the memory behind `fd` of a view that `read` gave; None for other memory."""
        return self._arena.offset_of(view)

    @property
    def space_bytes(self) -> int:
        """Of the memory behind `fd`, most of it never committed."""
        return self._arena.space_bytes

    def scan(self) -> Iterator[StoredObject]:
        """Nothing: memory does not outlive the process."""
        return iter(())

    def close(self) -> None:
        """Views that are held stay good. No other call after this one."""
        with self._lock:
            self._blocks.clear()
            self._arena.close()
