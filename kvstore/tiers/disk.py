"""Objects on a local file system, in append segments with an index file (docs/design/0011).

A put appends its objects to a segment, syncs it, writes their slots in the index, and syncs that: then they are
durable, and visible. A process killed, or a machine losing power, at any instant leaves each object whole or absent,
and opening gives back whatever was under way (disk_recovery.py). In memory an object costs an entry of a dict of ints
and two columns of 8 bytes (docs/performance.md has the sum); its key is in the index file and in the object.

A medium that fails does not take the node with it: after a failed write the tier is `read_only`, after failed reads in
a row it is `off`, and from time to time one call tries whether that is over (circuit.py).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

import kvstore_codec as codec
from kvstore.errors import DiskUnusable, TierFailed, TierFull
from kvstore.index.entry import ObjectKey
from kvstore.memory import return_memory
from kvstore.tiers import disk_root
from kvstore.tiers.base import Bytes, StoredColumns, StoredObject
from kvstore.tiers.disk_index import SLOT_BYTES, IndexFile, Slot, fingerprint
from kvstore.tiers.disk_recovery import recover
from kvstore.tiers.disk_segments import Segments, sync_directory
from kvstore.tiers.disk_writer import BLOCK_BYTES, blocks_of
from kvstore_client.circuit import Circuit

log = logging.getLogger(__name__)

State = Literal["ok", "read_only", "off"]

READ_FAILURES_MAX = 8  # in a row; a single bad sector is a miss, not the end of the disk
#: Pages of the index that few objects keep are not in what an object costs: beyond this share, the tier counts as full.
_OVER_CAPACITY_MAX = 0.01


class NewObject(NamedTuple):
    """An object, or its prefix up to the end of a quality layer."""

    key: ObjectKey
    parent: bytes
    data: Bytes


class DiskTier:
    """Raises DiskUnusable from the constructor when ROOT cannot be used or another node uses it.

    One thread calls what changes the tier, any may read."""

    name = "disk"

    def __init__(
        self, root: Path, capacity_bytes: int, *, clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:  # fmt: skip
        self.capacity_bytes = capacity_bytes
        rng = rng or random.Random()
        self._writing, self._reading = Circuit(clock, rng, 1), Circuit(clock, rng, READ_FAILURES_MAX)
        self._stray_bytes = 0  # what the medium would not give back
        self._unrecorded_uses = 0
        with contextlib.ExitStack() as opened:
            try:
                self._lock = disk_root.claim(root)
                opened.callback(os.close, self._lock)
                disk_root.check_file_system(root, self._lock)
                disk_root.remove_old_format(root)
                folder = root / "segments"
                folder.mkdir(exist_ok=True)
                self._index = IndexFile(root / "index")
                opened.callback(self._index.close)
                self._segments = Segments(folder)
                sync_directory(root)
                found = recover(self._index, self._segments, folder)
            except OSError as error:
                raise DiskUnusable(
                    f"disk_path {root} cannot be used: {error.strerror}: choose a directory that this process may write"
                ) from error
            opened.pop_all()
        # The dict leads to a slot; the columns are indexed by it.
        self._slots = dict(zip(found.fingerprints.tolist(), found.slots.tolist(), strict=True))
        self._places = _column(self._index.slots, found.slots, found.places)
        self._lengths = _column(self._index.slots, found.slots, found.lengths)
        blocks = int((-(-found.lengths // BLOCK_BYTES)).sum())
        self._used_bytes = blocks * BLOCK_BYTES + len(found.slots) * SLOT_BYTES
        del found
        return_memory()

    @property
    def used_bytes(self) -> int:
        return self._used_bytes + self._stray_bytes

    @property
    def stray_bytes(self) -> int:
        """What the medium would not give back; part of `used_bytes` until the next start."""
        return self._stray_bytes

    @property
    def objects(self) -> int:
        return len(self._slots)

    @property
    def state(self) -> State:
        """`read_only` after a failed write, `off` after failed reads, until one succeeds."""
        if self._reading.state != "closed":
            return "off"
        return "ok" if self._writing.state == "closed" else "read_only"

    def cost_bytes(self, length: int) -> int:
        """Whole blocks, and a slot of the index."""
        return blocks_of(length) * BLOCK_BYTES + SLOT_BYTES

    def put(self, key: ObjectKey, parent: bytes, data: Bytes) -> None:
        self.put_many([NewObject(key, parent, data)])

    def put_many(self, objects: Sequence[NewObject]) -> None:
        """Stores or replaces all of them, with one sync of data and one of the index, or none.

        Raises TierFull and TierFailed as `put` does, codec.ObjectError for what is no object."""
        slots = [_slot_for(each) for each in objects]
        cost = sum(self.cost_bytes(len(each.data)) for each in objects)
        # While it is written, a replacement stands beside what it replaces.
        if self.used_bytes + cost > self.capacity_bytes or self._over_capacity(cost):
            raise TierFull("disk tier has no room", needed=cost, free=self.capacity_bytes - self.used_bytes)
        if not self._writing.allow():
            raise TierFailed("disk tier takes no writes for now, after one that failed", state=self.state)
        try:
            places = self._segments.append([each.data for each in objects])
            try:
                numbers = self._enter(slots, places)
            except OSError:
                self._segments.retract(places)
                raise
        except OSError as error:
            raise self._write_failed(error) from error
        if self._writing.succeed():
            log.warning("disk tier takes writes again")
        for each, number, (segment, block) in zip(objects, numbers, places, strict=True):
            self._show(fingerprint(each.key), number, segment << 32 | block, len(each.data))

    def read(self, key: ObjectKey, length: int) -> memoryview | None:
        """Raises TierFailed where the medium cannot be read."""
        name = fingerprint(key)
        slot = self._slots.get(name)
        if slot is None:
            return None
        place = self._places[slot]
        if self._lengths[slot] < length:
            return None
        if not self._reading.allow():
            raise TierFailed("disk tier is off for now, after reads that failed", state=self.state)
        try:
            data = self._segments.read(divmod(place, 1 << 32), length)
        except OSError as error:
            healthy = self._reading.state == "closed"
            if self._reading.fail() and healthy:
                log.warning("disk tier is off: %s; one read tries again from time to time", error.strerror)
            raise TierFailed(f"disk tier cannot read: {error.strerror}", errno=error.errno) from error
        if self._reading.succeed():
            log.warning("disk tier can be read again")
        # Meanwhile it may have gone, or been replaced or cut: places are not used again, so this tells.
        if self._slots.get(name) != slot or self._places[slot] != place or self._lengths[slot] < length:
            return None
        self._record_use(slot)
        return data

    def truncate(self, key: ObjectKey, length: int) -> bool:
        """Raises TierFailed where the medium refuses: the object is as it was."""
        slot = self._slots.get(fingerprint(key))
        if slot is None:
            return False
        held = self._lengths[slot]
        if length >= held:
            return True
        place = divmod(self._places[slot], 1 << 32)
        try:
            content = self._index.read(slot)
            if content is None:
                raise OSError(errno.EIO, "its entry in the index is damaged")
            self._index.write(slot, content._replace(length=length))
        except OSError as error:
            raise TierFailed(f"disk tier cannot truncate: {error.strerror}", errno=error.errno) from error
        self._lengths[slot] = length
        self._used_bytes -= self.cost_bytes(held) - self.cost_bytes(length)
        self._give_back(place, blocks_of(length), held)
        return True

    def delete(self, key: ObjectKey) -> bool:
        """Raises TierFailed where the medium refuses: the object is still there."""
        name = fingerprint(key)
        slot = self._slots.pop(name, None)
        if slot is None:
            return False
        try:
            self._index.free(slot)
        except OSError as error:
            self._slots[name] = slot
            raise TierFailed(f"disk tier cannot delete: {error.strerror}", errno=error.errno) from error
        self._forget(slot)
        return True

    def scan(self) -> Iterator[StoredObject]:
        """Raises TierFailed."""
        for piece in self.scan_columns():
            yield from piece.objects()

    def scan_columns(self) -> Iterator[StoredColumns]:
        """`scan` as columns. Raises TierFailed."""
        try:
            yield from self._index.stored_columns()
        except OSError as error:
            raise TierFailed(f"disk tier cannot be scanned: {error.strerror}", errno=error.errno) from error

    def close(self) -> None:
        self._segments.close()
        self._index.close()
        os.close(self._lock)

    def _enter(self, contents: Sequence[Slot], places: Sequence[tuple[int, int]]) -> list[int]:
        """The slots of objects just appended, synced. Raises OSError; then none has any."""
        taken: list[int] = []
        try:
            for content, (segment, block) in zip(contents, places, strict=True):
                taken.append(self._index.take())
                last_use = self._index.next_use()
                self._index.write(taken[-1], content._replace(segment=segment, block=block, last_use=last_use))
            self._index.sync()
        except OSError:
            for slot in taken:
                with contextlib.suppress(OSError):  # the first error is reported; this names a hole, so it goes later
                    self._index.free(slot)
            raise
        return taken

    def _show(self, name: int, slot: int, place: int, length: int) -> None:
        """Makes an object readable; what it replaces goes."""
        while slot >= len(self._places):  # by more than one where slots that failed could not be freed
            self._places.append(0)
            self._lengths.append(0)
        self._places[slot], self._lengths[slot] = place, length
        replaced = self._slots.get(name)
        self._slots[name] = slot
        self._used_bytes += self.cost_bytes(length)
        if replaced is not None:
            try:
                self._index.free(replaced)
            except OSError as error:  # the next start sees which of the two is older
                log.warning("disk tier cannot clear what was replaced: %s", error.strerror)
            self._forget(replaced)

    def _forget(self, slot: int) -> None:
        place, length = self._places[slot], self._lengths[slot]
        self._used_bytes -= self.cost_bytes(length)
        self._give_back(divmod(place, 1 << 32), 0, length)

    def _give_back(self, place: tuple[int, int], skip: int, length: int) -> None:
        try:
            self._segments.release(place, skip, length)
        except OSError as error:
            if not self._stray_bytes:
                log.warning("disk tier cannot free blocks: %s; they stay taken until a restart", error.strerror)
            self._stray_bytes += (blocks_of(length) - skip) * BLOCK_BYTES

    def _over_capacity(self, cost: int) -> bool:
        spread_bytes = self._index.taken_bytes - self.objects * SLOT_BYTES - 2 * BLOCK_BYTES
        return self.used_bytes + cost + spread_bytes > self.capacity_bytes * (1 + _OVER_CAPACITY_MAX)

    def _write_failed(self, error: OSError) -> TierFailed:
        healthy = self._writing.state == "closed"
        self._writing.fail()
        if healthy:
            log.warning("disk tier is read-only: %s; one write tries again from time to time", error.strerror)
        return TierFailed(f"disk tier cannot write: {error.strerror}", errno=error.errno)

    def _record_use(self, slot: int) -> None:
        """The order of use outlives the process, where the file system lets it."""
        try:
            self._index.touch(slot)
        except OSError as error:
            if not self._unrecorded_uses:
                log.warning("uses of objects cannot be recorded: %s; after a restart others go first", error.strerror)
            self._unrecorded_uses += 1


def _slot_for(new: NewObject) -> Slot:
    """Without its place. Raises codec.ObjectError for what is no object or another one, ends inside a quality layer."""
    header_bytes = bytes(memoryview(new.data)[: codec.HEADER_BYTES])
    header = codec.parse_header(header_bytes)
    header.layers_in(len(new.data))
    if ObjectKey.of(header) != new.key:
        raise codec.ForeignObject("the object is another than its key says", found=header.chunk_hash.hex()[:16])
    return Slot(header_bytes, new.parent, 0, 0, len(new.data), 0)


def _column(slots: int, where: NDArray[np.int64], values: NDArray[np.int64]) -> array[int]:
    """Values by slot, in an array that grows and is quick to index (twice as quick as NumPy's)."""
    column = np.zeros(slots, np.uint64)
    column[where] = values
    return array("Q", column.tobytes())
