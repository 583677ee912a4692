"""Columns of numbers, one row a stored object: tens of bytes where Python objects would take a kilobyte."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_codec.container import QUALITY_LAYERS_MAX

_FIRST_ROWS = 1024
_GROWTH = 1.25  # rows that are not used yet cost memory too

ROW = np.dtype([
    ("hash", np.uint64, 4),  # the chunk's
    ("group", np.uint32),  # namespace and part
    ("parent", np.int32),  # row of the chunk before it, or -1
    ("depth", np.uint32),  # chunks before it
    ("first_position", np.uint64),
    ("tokens", np.uint32),
    ("layer_bytes", np.uint32, QUALITY_LAYERS_MAX),
    ("whole_layers", np.uint8),
    ("quality", np.uint8),
    ("provenance", np.uint8),
    ("priority", np.uint8),
    ("version", np.uint32),  # counts changes of what is held, whatever object the row was for
    ("birth", np.uint32),  # counts the objects that the row was for
    ("reads", np.uint32),
    ("leases", np.uint32),  # that hold it
    ("last_use", np.uint64),  # which of the index's uses was the last
    ("last_use_s", np.float64),
    ("retain_until_s", np.float64),
])  # fmt: skip


class Columns:
    """One array a field of ROW, all equally long; and per tier how much of an object is there. Rows are reused."""

    def __init__(self, tiers: int) -> None:
        self._rows = 0  # that were ever used
        self._free: list[int] = []
        self._columns: dict[str, npt.NDArray[Any]] = {
            name: np.zeros((_FIRST_ROWS, *ROW[name].shape), ROW[name].base) for name in ROW.names or ()
        }
        #: by tier: quality layers held, 0 for none
        self.layers = [np.zeros(_FIRST_ROWS, np.uint8) for _ in range(tiers)]
        #: by tier: children held there
        self.children = [np.zeros(_FIRST_ROWS, np.uint32) for _ in range(tiers)]

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self._columns[name]

    @property
    def rows(self) -> int:
        """Rows in use are below this."""
        return self._rows

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in (*self._columns.values(), *self.layers, *self.children))

    def take(self) -> int:
        """A row, all zeros but its version and birth."""
        if self._free:
            return self._free.pop()
        if self._rows == len(self.layers[0]):
            self._grow()
        self._rows += 1
        return self._rows - 1

    def take_many(self, count: int) -> npt.NDArray[np.int64]:
        """Rows that follow each other, of columns that were never used otherwise."""
        first = self._rows
        while first + count > len(self.layers[0]):
            self._grow()
        self._rows += count
        return np.arange(first, first + count)

    def give_back(self, row: int) -> None:
        for name, column in self._columns.items():
            column[row] = column[row] + 1 if name in ("version", "birth") else 0
        for layers, children in zip(self.layers, self.children, strict=True):
            layers[row] = children[row] = 0
        self._free.append(row)

    def _grow(self) -> None:
        rows = int(len(self.layers[0]) * _GROWTH)

        def longer(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
            grown: npt.NDArray[Any] = np.zeros((rows, *column.shape[1:]), column.dtype)
            grown[: len(column)] = column
            return grown

        self._columns = {name: longer(column) for name, column in self._columns.items()}
        self.layers = [longer(column) for column in self.layers]
        self.children = [longer(column) for column in self.children]
