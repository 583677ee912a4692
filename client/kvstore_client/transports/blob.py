"""Whole objects as they arrive, in memory that is used again: fetching fresh pages costs more than receiving into old
ones."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

KEPT_BYTES_MAX = 256 << 20  # of free buffers
_GRAIN = 128 << 10  # objects of one kind differ by less, so that each fits where another was


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Blob:
    """One object. `done` is called once, when nobody reads `data` any more, from any thread. `in_place`: it lies in the
    node's own memory, and is good only if the fetch that brought it is confirmed."""

    data: memoryview
    done: Callable[[], None] = _nothing
    in_place: bool = False


class Buffers:
    """Free memory of earlier objects; any thread may call it."""

    def __init__(self, kept_bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._kept_bytes_max = kept_bytes_max
        self._lock = threading.Lock()
        self._free: list[npt.NDArray[np.uint8]] = []  # smallest first

    def take(self, size: int) -> tuple[npt.NDArray[np.uint8], memoryview]:
        """(the buffer, for `give_back`; its first `size` bytes)."""
        with self._lock:
            fitting = next((index for index, each in enumerate(self._free) if each.nbytes >= size), None)
            buffer = self._free.pop(fitting) if fitting is not None else None
        if buffer is None:
            buffer = np.empty(-(-size // _GRAIN) * _GRAIN, np.uint8)
        return buffer, buffer.data[:size]

    def give_back(self, buffer: npt.NDArray[np.uint8]) -> None:
        with self._lock:
            self._free.append(buffer)
            self._free.sort(key=lambda each: each.nbytes)
            while sum(each.nbytes for each in self._free) > self._kept_bytes_max:
                self._free.pop(0)
