"""Pages of our own, of the shape of the engine's: KV waits there for its encoder while the engine goes on.

A fixed pool, allocated once and touched, so that a copy costs a copy. What finds no room is refused, not waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

#: one layer's K or V as `PagedKV` has them, in any order in memory
PagePlane = npt.NDArray[Any]


class Staging:
    """`caches`: (k, v) of each layer of the engine. `pages`: how many the pool has."""

    def __init__(self, caches: Sequence[tuple[PagePlane, PagePlane]], pages: int) -> None:
        self._engine = caches
        self.caches = [(_like(k, pages), _like(v, pages)) for k, v in caches]
        self._free = list(range(pages))
        self._lock = threading.Lock()

    def take(self, block_ids: Sequence[int]) -> list[int] | None:
        """A copy of these blocks of all layers: its page numbers here, to be given back. None: there is no room."""
        with self._lock:
            if len(block_ids) > len(self._free):
                return None
            taken = [self._free.pop() for _ in block_ids]
        for ours, theirs in zip(self.caches, self._engine, strict=True):
            for plane, source in zip(ours, theirs, strict=True):
                for page, block in zip(taken, block_ids, strict=True):
                    plane[page] = source[block]
        return taken

    def give_back(self, pages: Sequence[int]) -> None:
        with self._lock:
            self._free.extend(pages)


def _like(plane: PagePlane, pages: int) -> PagePlane:
    """`pages` pages laid out inside as those of `plane` are, so that copying one is copying runs of memory."""
    order = [0, *sorted(range(1, plane.ndim), key=lambda axis: -plane.strides[axis])]
    shape = (pages, *plane.shape[1:])
    memory = np.zeros([shape[axis] for axis in order], plane.dtype)
    memory.fill(0)  # touches every page of memory
    return memory.transpose(np.argsort(order))
