"""The process's memory, where Python's own care is not enough."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

_ARENA_MAX = -8  # of mallopt, malloc.h
_ARENAS = 2


def share_arenas() -> None:
    """Lets all threads allocate from two arenas; to be called before there are many. glibc gives each thread its own,
    up to eight a core, and what one thread allocates and another frees (gRPC's messages) leaves holes in all of them: a
    node grew by a MiB a minute, for nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENA_MAX, _ARENAS)


def return_memory() -> None:
    """Gives free memory back to the system. glibc keeps what a million objects were loaded through: hundreds of bytes
    each, for nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_out_of_collections() -> None:
    """What there is by now stays for the process's life: looking for cycles passes it by. Every call leaves a cycle of
    gRPC's behind, and Python looks at all of them only when they are a quarter of what there was before: megabytes,
    where that is whole libraries."""
    gc.collect()
    gc.freeze()


@contextmanager
def without_collecting() -> Iterator[None]:
    """While inside, cycles are not looked for: among millions of new tuples that takes a third of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
