"""Which bytes of an arena belong to whom: offsets only, no memory is touched.

The arena's address space is several times what it may hold, because addresses cost nothing and memory does. An address
is part of a block, *warm* (free, with memory behind it) or *cold* (free, without). A block goes where memory is: into
the smallest warm range that holds it (best fit). Where there is none, though enough is free in pieces, nothing is
moved: the block goes into the smallest gap between blocks, warm and cold together, and for the pages that it lacks
there, whole pages of the largest warm ranges elsewhere are given up. The page tables do the compacting, so free memory
is lost to fragmentation only in pieces of less than a page, at the edges of blocks. Moving blocks together instead
would stall the caller for as long as it takes to copy everything in the way, and could not touch what somebody reads.
"""

from __future__ import annotations

from typing import NamedTuple

from sortedcontainers import SortedList

ALIGNMENT_BYTES = 512  # what disks want of memory that they read themselves; more than numpy, AVX-512 and GPUs do


def aligned(length: int, alignment: int = ALIGNMENT_BYTES) -> int:
    """`length` rounded up."""
    return -(-length // alignment) * alignment


class Range(NamedTuple):
    """The addresses from `start` up to, without, `end`."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


class Placement(NamedTuple):
    """Where a block goes. Before it is written, the memory behind `give_up` has to be given back, and the pages `cold`
    need memory: none for a block in a warm range; the last may reach beyond the block."""

    offset: int
    cold: tuple[Range, ...]
    give_up: tuple[Range, ...]


class FreeRanges:
    """Disjoint ranges, adjacent ones joined, found by their length or by an end. Every call is O(log n)."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._end_of: dict[int, int] = {}
        self._start_of: dict[int, int] = {}
        self._by_length: SortedList[tuple[int, int]] = SortedList()
        self.total_bytes = 0
        self.whole_pages_bytes = 0

    def __len__(self) -> int:
        return len(self._end_of)

    def add(self, start: int, end: int) -> int:
        """Start of the range that it has become part of."""
        if start == end:
            return start
        before, after = self._start_of.get(start), self._end_of.get(end)
        if before is not None:
            self.remove(before)
            start = before
        if after is not None:
            self.remove(end)
            end = after
        self._end_of[start], self._start_of[end] = end, start
        self._by_length.add((end - start, start))
        self._count(start, end, 1)
        return start

    def remove(self, start: int) -> int:
        """Takes out the range that starts there, and returns its end."""
        end = self._end_of.pop(start)
        del self._start_of[end]
        self._by_length.remove((end - start, start))
        self._count(start, end, -1)
        return end

    def best_fit(self, length: int) -> int | None:
        """Start of the smallest range of at least `length`, of several the lowest."""
        index = self._by_length.bisect_left((length, 0))
        return self._by_length[index][1] if index < len(self._by_length) else None

    def ending_at(self, end: int) -> int | None:
        """Start of the range that ends there."""
        return self._start_of.get(end)

    def __contains__(self, start: int) -> bool:
        """Whether a range starts there."""
        return start in self._end_of

    def take_pages(self, wanted_bytes: int) -> list[Range]:
        """Takes out whole pages of this many bytes, from the largest ranges. There are as many."""
        chosen = []
        for length, start in reversed(self._by_length):
            if wanted_bytes <= 0:
                break
            pages = self.pages_of(start, start + length)
            if pages.length:
                chosen.append((start, Range(max(pages.start, pages.end - wanted_bytes), pages.end)))
                wanted_bytes -= chosen[-1][1].length
        for start, part in chosen:
            end = self.remove(start)
            self.add(start, part.start)
            self.add(part.end, end)
        return [part for _, part in chosen]

    def pages_of(self, start: int, end: int) -> Range:
        """The whole pages inside; empty where there are none."""
        first = aligned(start, self._page_bytes)
        return Range(first, max(first, end // self._page_bytes * self._page_bytes))

    def _count(self, start: int, end: int, sign: int) -> None:
        self.total_bytes += sign * (end - start)
        self.whole_pages_bytes += sign * self.pages_of(start, end).length


class Allocator:
    """Blocks in `space_bytes` of addresses, of which `memory_bytes_max` may have memory behind them at a time.

    Lengths are positive multiples of ALIGNMENT_BYTES, the two limits of `page_bytes`."""

    def __init__(self, space_bytes: int, memory_bytes_max: int, page_bytes: int) -> None:
        assert space_bytes % page_bytes == memory_bytes_max % page_bytes == 0, "limits are whole pages"
        self.space_bytes, self.memory_bytes_max, self.page_bytes = space_bytes, memory_bytes_max, page_bytes
        self._warm, self._cold = FreeRanges(page_bytes), FreeRanges(page_bytes)
        self._gaps = FreeRanges(page_bytes)  # both, joined: what lies between two blocks
        self._cold.add(0, space_bytes)
        self._gaps.add(0, space_bytes)
        self.given_up_bytes = 0

    @property
    def memory_bytes(self) -> int:
        """What has memory behind it: blocks, and what is free and warm."""
        return self.space_bytes - self._cold.total_bytes

    @property
    def used_bytes(self) -> int:
        return self.memory_bytes - self._warm.total_bytes

    @property
    def stranded_bytes(self) -> int:
        """Free memory that no large block could have: pieces of pages whose other pieces are in use."""
        return self._warm.total_bytes - self._warm.whole_pages_bytes

    def fits(self, length: int, freed: Range | None = None) -> bool:
        """Whether a block can be placed; with `freed`, once that block is."""
        if self._warm.best_fit(length) is not None or (freed is not None and length <= freed.length):
            return True
        return self._fits_gap(length, self._warm.pages_of(*freed).length if freed is not None else 0)

    def place(self, length: int) -> Placement | None:
        """None where it does not fit."""
        start = self._warm.best_fit(length)
        if start is not None:
            self._take_from_gap(start, start + length)
            self._warm.add(start + length, self._warm.remove(start))
            return Placement(start, (), ())
        return self._place_in_gap(length) if self._fits_gap(length, 0) else None

    def free(self, offset: int, length: int) -> None:
        """Of a block, or of a part of it."""
        self._warm.add(offset, offset + length)
        self._gaps.add(offset, offset + length)

    def retract(self, placement: Placement, length: int) -> None:
        """Of a block that could not be written: its cold pages are cold again."""
        self._gaps.add(placement.offset, placement.offset + length)
        start = self._warm.add(placement.offset, placement.offset + length)
        for pages in placement.cold:
            end = self._warm.remove(start)
            self._warm.add(start, pages.start)
            self._cold.add(*pages)
            start = pages.end
            self._warm.add(start, end)

    def _fits_gap(self, length: int, freed_bytes: int) -> bool:
        """`freed_bytes`: whole pages that will be warm besides those that are."""
        kept_bytes = self.memory_bytes - self._warm.whole_pages_bytes - freed_bytes
        enough_memory = kept_bytes + aligned(length, self.page_bytes) <= self.memory_bytes_max
        return enough_memory and self._gaps.best_fit(length) is not None

    def _place_in_gap(self, length: int) -> Placement:
        offset = self._gaps.best_fit(length)
        assert offset is not None, "it fits"
        end = offset + length
        self._gaps.add(end, self._gaps.remove(offset))
        at, cold = offset, []
        while at < end:
            if at in self._warm:
                reached = self._warm.remove(at)
            else:
                cold_end = self._cold.remove(at)
                reached = min(cold_end, aligned(end, self.page_bytes))
                self._cold.add(reached, cold_end)
                cold.append(Range(at, reached))
            at = reached
        self._warm.add(end, at)
        give_up = self._warm.take_pages(self.memory_bytes - self.memory_bytes_max)
        for pages in give_up:
            self._cold.add(*pages)
            self.given_up_bytes += pages.length
        return Placement(offset, tuple(cold), tuple(give_up))

    def _take_from_gap(self, start: int, end: int) -> None:
        gap_start = start
        while (before := self._before(gap_start)) is not None:
            gap_start = before
        gap_end = self._gaps.remove(gap_start)
        self._gaps.add(gap_start, start)
        self._gaps.add(end, gap_end)

    def _before(self, start: int) -> int | None:
        """Start of the free range that ends where this one starts."""
        warm = self._warm.ending_at(start)
        return self._cold.ending_at(start) if warm is None else warm
