"""Opening: index and segments are brought into agreement, whatever instant the last process, or the power, died at.

Objects are appended and synced before the index names them; freed blocks become holes after the index has forgotten
them. So of what the index says, only this can be wrong:

- Blocks that hold data and that no slot names: a write or a delete was cut short. They are given back.
- A slot that names a hole: power was lost, the hole reached the medium and the slot's change did not. Where the hole
  covers all of the object it had been deleted, where it covers its end it had been truncated: so it is again.
- Two slots of one key: the older of a replacement. Places rise with time, so the higher one is kept.
- A slot that is not intact: a bad sector. It is cleared.

One look at the index and at the map of holes tells; no object is read. Whether an object's bytes are right, every read
finds out by its checksums.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import kvstore_codec as codec
from kvstore.tiers import disk_root
from kvstore.tiers.disk_index import IndexFile, Loaded
from kvstore.tiers.disk_segments import Segments, data_runs, punch
from kvstore.tiers.disk_writer import BLOCK_BYTES

log = logging.getLogger(__name__)


def recover(index: IndexFile, segments: Segments, folder: Path) -> Loaded:
    """What there is, oldest place first; nothing else is left on disk. Raises OSError."""
    for path in folder.iterdir():
        if not segments.is_segment(path):
            log.warning("removed %s: not a segment", path)
            disk_root.remove(path)
    found, gone = index.load()
    damaged = len(gone)
    numbers = segments.numbers()
    last = max(int(found.segments.max(initial=0)), *numbers, 0)
    found = _take(found, np.lexsort((found.blocks, found.segments)))
    lengths = found.lengths
    kept = _newest_of_each_key(found)
    replaced = len(kept) - np.count_nonzero(kept)
    freed_bytes = 0
    for number in numbers:
        first, end = np.searchsorted(found.segments, [number, number + 1])
        here = first + np.flatnonzero(kept[first:end])
        starts, intact = found.blocks[here], lengths[here]
        path = segments.path(number)
        if len(here):
            descriptor = os.open(path, os.O_RDWR)
            try:
                held = _map_of_data(descriptor, int((starts + _blocks(intact)).max()))
                reaches = _reach(held, starts)
                for row in np.flatnonzero(reaches < _blocks(intact)).tolist():
                    end = starts[row] + _blocks(intact)[row]
                    intact[row] = _shorten(index, int(found.slots[here[row]]), int(reaches[row]) * BLOCK_BYTES)
                    held[starts[row] + reaches[row] : end] = True  # a hole may still be allocated: it goes as well
                kept[here], lengths[here] = intact > 0, intact
                freed_bytes += _sweep(descriptor, held, starts, _blocks(intact))
            finally:
                os.close(descriptor)
        if not kept[here].any():
            freed_bytes += path.stat().st_blocks * 512
            path.unlink()
    kept &= np.isin(found.segments, numbers)
    gone += found.slots[~kept].tolist()
    for slot in gone:
        index.clear(slot)
    lost = len(kept) - np.count_nonzero(kept) - replaced
    if damaged or lost or replaced or freed_bytes:
        log.warning(
            "%s: removed %d damaged entries, %d deleted, %d replaced, %d bytes of unfinished writes and deletes",
            folder.parent, damaged, lost, replaced, freed_bytes,
        )  # fmt: skip
    found = _take(found, np.flatnonzero(kept))
    index.adopt(found.slots)
    index.sync()  # what was cleared stays so: its places may not come to life below new segments
    numbers_used, counts = np.unique(found.segments, return_counts=True)
    segments.adopt(Counter(dict(zip(numbers_used.tolist(), counts.tolist(), strict=True))), last)
    return found


def _take(found: Loaded, rows: NDArray[np.int64]) -> Loaded:
    return Loaded(*(column[rows] for column in found))


def _newest_of_each_key(found: Loaded) -> NDArray[np.bool_]:
    """`found` is ordered by place."""
    order = np.argsort(found.fingerprints, kind="stable")
    prints = found.fingerprints[order]
    kept = np.ones(len(order), bool)
    kept[order[:-1]] = prints[:-1] != prints[1:]
    return kept


def _blocks(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return -(-lengths // BLOCK_BYTES)


def _map_of_data(descriptor: int, blocks: int) -> NDArray[np.bool_]:
    """Whether each of the first `blocks` of a file holds data."""
    held = np.zeros(blocks, bool)
    for start, end in data_runs(descriptor):
        held[start // BLOCK_BYTES : -(-end // BLOCK_BYTES)] = True
    return held


def _reach(held: NDArray[np.bool_], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Blocks from each start up to the next hole."""
    holes = np.append(np.flatnonzero(~held), len(held))
    reach: NDArray[np.int64] = holes[np.searchsorted(holes, starts)] - starts
    return reach


def _shorten(index: IndexFile, slot: int, reach: int) -> int:
    """The length of the longest quality that the first `reach` bytes of an object hold, now the slot's; 0: none."""
    content = index.read(slot)
    if content is None:
        return 0
    try:
        layer_bytes = codec.parse_header(content.header_bytes).layer_bytes
    except codec.ObjectError:
        return 0
    length = max((each for each in layer_bytes if each <= min(reach, content.length)), default=0)
    if length:
        index.write(slot, content._replace(length=length))
    return length


def _sweep(descriptor: int, held: NDArray[np.bool_], starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> int:
    """Gives back what no object covers; bytes of it."""
    edges = np.zeros(len(held) + 1, np.int64)
    np.add.at(edges, starts, sizes > 0)
    np.subtract.at(edges, starts + sizes, sizes > 0)
    wanted = np.cumsum(edges[:-1]) > 0
    end = int(np.flatnonzero(wanted).max(initial=-1)) + 1
    surplus = max(0, os.fstat(descriptor).st_size - end * BLOCK_BYTES)
    if surplus:
        os.ftruncate(descriptor, end * BLOCK_BYTES)
    edges_of_stray = np.flatnonzero(np.diff(held & ~wanted, prepend=False, append=False))
    freed = 0
    for first, after in edges_of_stray.reshape(-1, 2).tolist():
        if first < end:
            punch(descriptor, first * BLOCK_BYTES, (after - first) * BLOCK_BYTES)
            freed += (after - first) * BLOCK_BYTES
    return freed + surplus
