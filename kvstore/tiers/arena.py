"""One piece of shared memory (a memfd) that holds blocks of bytes, and lends read-only views into it without copying.

A view is good for as long as somebody holds it: a block that is freed or cut while it is lent keeps its place until
its last view has died, on whatever thread that happens. Memory is committed when a block is first written and given
back only when other blocks need it (allocator.py): a freed page is taken again within moments, and fetching a new one
costs several times what writing it does.

Not thread-safe, except that views may die anywhere; the tier has the lock.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.errors import ConfigError, TierFailed
from kvstore.tiers.allocator import Allocator, Placement, Range, aligned
from kvstore.tiers.base import Bytes

#: addresses for each byte of memory: with four, no hole is large enough only where the blocks in the way are on average
#: smaller than a third of the new one, and spread out by an enemy
SPACE_FACTOR = 4
#: memory beyond the capacity, as a part of it and at least: what pieces of pages at the edges of blocks may take, and
#: room to choose a place that needs no new memory
SPARE_PART, SPARE_BYTES_MIN = 16, 1 << 20
_THP = Path("/sys/kernel/mm/transparent_hugepage")
_MADV_POPULATE_WRITE = 23  # Linux 5.14; the module mmap has no name for it

Exporter = npt.NDArray[np.uint8]


class Location(NamedTuple):
    """Where an object's bytes are. Another `generation` under the same key: they were replaced, cut or moved."""

    offset: int
    length: int
    generation: int


@dataclass(slots=True, eq=False)
class Block:
    """`length` bytes of content at the start of `placed_bytes` from `offset`; `exporter` is what its views hang on."""

    offset: int
    length: int
    placed_bytes: int
    generation: int
    exporter: weakref.ref[Exporter] | None = None

    @property
    def range(self) -> Range:
        return Range(self.offset, self.offset + self.placed_bytes)

    def lent(self) -> Exporter | None:
        return None if self.exporter is None else self.exporter()


def allocator_for(capacity_bytes: int, page_bytes: int) -> Allocator:
    memory_bytes_max = aligned(capacity_bytes + max(capacity_bytes // SPARE_PART, SPARE_BYTES_MIN), page_bytes)
    return Allocator(SPACE_FACTOR * memory_bytes_max, memory_bytes_max, page_bytes)


class Arena:
    """Holds up to `capacity_bytes` and takes a sixteenth (at least 1 MiB) more memory at most; starts with none.

    `huge_pages` (of 2 MiB on x86) have to be allowed for shared memory, by a kernel of 5.14 or later. Raises
    ConfigError."""

    def __init__(self, capacity_bytes: int, *, huge_pages: bool) -> None:
        self._allocator = allocator_for(capacity_bytes, _huge_page_bytes() if huge_pages else mmap.PAGESIZE)
        self._huge_pages = huge_pages
        self.fd, self._mapping = _map(self._allocator.space_bytes, huge_pages)
        self._close_fd = weakref.finalize(self, os.close, self.fd)
        self._bytes = memoryview(self._mapping)
        self._address = _address(self._bytes)
        self._generation = 0
        self._returned: deque[weakref.ref[Exporter]] = deque()
        self._waiting: dict[int, tuple[weakref.ref[Exporter], Range]] = {}
        self._waiting_bytes = 0

    @property
    def space_bytes(self) -> int:
        return self._allocator.space_bytes

    @property
    def used_bytes(self) -> int:
        """Blocks, and what waits for its last view."""
        self._take_back()
        return self._allocator.used_bytes

    @property
    def waiting_bytes(self) -> int:
        """Freed, but still lent."""
        self._take_back()
        return self._waiting_bytes

    @property
    def memory_bytes(self) -> int:
        """Committed by the system."""
        return self._allocator.memory_bytes

    @property
    def stranded_bytes(self) -> int:
        """Free memory that only blocks smaller than a page could have."""
        self._take_back()
        return self._allocator.stranded_bytes

    @property
    def given_up_bytes(self) -> int:
        """Memory given back so far for blocks that no free range was large enough for."""
        return self._allocator.given_up_bytes

    def fits(self, length: int, freed: Block | None = None) -> bool:
        """Whether there is a place; with `freed`, once that block is free, which it cannot be while it is lent."""
        self._take_back()
        spare = freed.range if freed is not None and freed.lent() is None else None
        return self._allocator.fits(_placed_bytes(length), spare)

    def store(self, data: Bytes) -> Block | None:
        """A copy of `data`; None where there is no place. Raises TierFailed where the system has no memory."""
        block = self.reserve(len(data))
        if block is not None:
            self._bytes[block.offset : block.offset + len(data)] = data
        return block

    def reserve(self, length: int) -> Block | None:
        """A place for `length` bytes, with whatever was there before; None and errors as of `store`."""
        self._take_back()
        placed_bytes = _placed_bytes(length)
        placement = self._allocator.place(placed_bytes)
        if placement is None:
            return None
        try:
            for start, end in placement.give_up:
                self._mapping.madvise(mmap.MADV_REMOVE, start, end - start)
            for pages in placement.cold:
                self._commit(pages)
        except OSError as error:
            self._retract(placement, placed_bytes)
            raise TierFailed(f"no memory for the host tier: {error.strerror}", errno=error.errno) from error
        return Block(placement.offset, length, placed_bytes, self._next_generation())

    def view(self, block: Block, length: int) -> memoryview:
        """Its first `length` bytes, read-only and in place."""
        return self._lend(block)[:length].toreadonly()

    def writable(self, block: Block) -> memoryview:
        """All of a block that nobody reads yet."""
        return self._lend(block)

    def offset_of(self, view: memoryview) -> int | None:
        """Where a view starts; None for one of other memory."""
        offset = _address(view) - self._address
        return offset if 0 <= offset < self.space_bytes else None

    def cut(self, block: Block, length: int) -> None:
        """Keeps the first `length` bytes. What is lent of the rest stays until views of before and since have died."""
        kept = _placed_bytes(length)
        if kept < block.placed_bytes:
            self._release(block, Range(block.offset + kept, block.offset + block.placed_bytes))
        block.length, block.placed_bytes, block.generation = length, kept, self._next_generation()

    def free(self, block: Block) -> None:
        """The block is not to be used any more."""
        self._release(block, block.range)

    def close(self) -> None:
        """Views that are still held stay good; the memory goes with the last of them. Idempotent."""
        self._close_fd()
        self._bytes.release()
        with contextlib.suppress(BufferError):  # lent: the mapping goes when the last exporter does
            self._mapping.close()

    def _commit(self, pages: Range) -> None:
        """By a system call, which reports a lack of memory; touching the pages would end the process (SIGBUS)."""
        if self._huge_pages:  # of which fallocate takes none
            self._mapping.madvise(_MADV_POPULATE_WRITE, pages.start, pages.length)
        else:
            os.posix_fallocate(self.fd, pages.start, pages.length)

    def _retract(self, placement: Placement, placed_bytes: int) -> None:
        self._allocator.retract(placement, placed_bytes)
        for start, end in placement.cold:
            self._mapping.madvise(mmap.MADV_REMOVE, start, end - start)

    def _lend(self, block: Block) -> memoryview:
        self._take_back()
        exporter = block.lent()
        if exporter is None:
            exporter = np.frombuffer(self._mapping, np.uint8, block.length, block.offset)
            block.exporter = weakref.ref(exporter)
        return exporter.data

    def _release(self, block: Block, place: Range) -> None:
        exporter = block.lent()
        if exporter is None:
            self._allocator.free(place.start, place.length)
            return
        # The callback is nothing but an append: it may run on any thread, and in the middle of anything here.
        death = weakref.ref(exporter, self._returned.append)
        self._waiting[id(death)] = death, place
        self._waiting_bytes += place.length

    def _take_back(self) -> None:
        while self._returned:
            _, place = self._waiting.pop(id(self._returned.popleft()))
            self._waiting_bytes -= place.length
            self._allocator.free(place.start, place.length)

    def _next_generation(self) -> int:
        self._generation += 1
        return self._generation


def _address(view: memoryview) -> int:
    address: int = np.frombuffer(view, np.uint8).ctypes.data
    return address


def _placed_bytes(length: int) -> int:
    return aligned(max(length, 1))


def _map(space_bytes: int, huge_pages: bool) -> tuple[int, mmap.mmap]:
    fd = os.memfd_create("kvstore-host", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, space_bytes)
        os.fchmod(fd, 0o400)  # who it is shared with does not open it for writing by mistake
        mapping = mmap.mmap(fd, space_bytes)
        if huge_pages:
            mapping.madvise(mmap.MADV_HUGEPAGE)
            mapping.madvise(_MADV_POPULATE_WRITE, 0, 0)  # refused where it is not known
    except OSError as error:
        os.close(fd)
        raise ConfigError(
            [
                f"host_capacity: {space_bytes} bytes of addresses cannot be mapped: {error.strerror}: "
                f"lower it, or raise the process's limits (ulimit -v){', or turn huge pages off' * huge_pages}"
            ]
        ) from error
    return fd, mapping


def _huge_page_bytes() -> int:
    try:
        allowed = (_THP / "shmem_enabled").read_text()
        page_bytes = int((_THP / "hpage_pmd_size").read_text())
    except OSError:
        allowed, page_bytes = "[never]", 0
    if any(f"[{refusal}]" in allowed for refusal in ("never", "deny")):
        raise ConfigError(
            [
                "huge pages: the system allows none for shared memory: as root `echo advise > "
                f"{_THP}/shmem_enabled`, or leave them off"
            ]
        )
    return page_bytes
