"""From a chunk's hash to its row: open addressing over one array of row numbers, eight bytes an object.

A dict of bytes takes twenty times as much, which at a million objects decides what a node can hold. The hashes are a
column of the index and are compared whole, so two that look alike are still two. The places are scrambled by a secret
of the process: who may choose hashes (a client) cannot make them crowd.
"""

from __future__ import annotations

import secrets

import numpy as np
import numpy.typing as npt

from kvstore.index.columns import Columns

Rows = npt.NDArray[np.int64]

_EMPTY, _GONE = -1, -2
_FIRST_PLACES = 1 << 11
_FULL = 0.6  # of the places taken, objects that are gone included
_WORD = np.dtype("<u8")
_WORDS = 4  # in a hash
_FOUR_BOOLS, _FOUR_TRUE = np.uint32, np.uint32(0x01010101)
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: groups that follow each other start far apart


def words(hashes: bytes) -> npt.NDArray[np.uint64]:
    """[n, 4]: n hashes of 32 bytes as numbers."""
    return np.frombuffer(hashes, _WORD).reshape(-1, _WORDS)


class HashTable:
    """Of the rows of `columns` (whose `hash` and `group` are the key), each entered once."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._salt = secrets.randbits(64)
        self._factor = secrets.randbits(64) | 1
        self._make(_FIRST_PLACES)

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    def find(self, group: int, hashes: npt.NDArray[np.uint64]) -> Rows:
        """The row of each hash, -1 where there is none. `hashes`: [n, 4]."""
        stored, groups = self._columns["hash"], self._columns["group"]
        found = np.full(len(hashes), _EMPTY, np.int64)
        asked = np.arange(len(hashes))
        places = self._places(group, hashes)
        while len(asked):  # `take` is several times as fast as an index, and so is one comparison of all four words
            rows = self._rows.take(places)
            equal = (stored.take(rows, axis=0) == hashes.take(asked, axis=0)).view(_FOUR_BOOLS).ravel() == _FOUR_TRUE
            same = (rows >= 0) & (groups.take(rows) == group) & equal
            found[asked[same]] = rows[same]
            further = ~same & (rows != _EMPTY)
            asked, places = asked[further], (places[further] + 1) & self._mask
        return found

    def find_one(self, group: int, chunk_hash: bytes) -> int:
        """The same for one hash, without the cost of arrays."""
        stored, groups, rows = self._columns["hash"], self._columns["group"], self._rows
        place = self._place_of(group, chunk_hash)
        while (row := int(rows[place])) != _EMPTY:
            if row >= 0 and groups[row] == group and stored[row].tobytes() == chunk_hash:
                return row
            place = place + 1 & self._mask
        return _EMPTY

    def enter_one(self, group: int, row: int) -> None:
        """A row whose key is in the columns and not in the table yet."""
        if self._taken >= _FULL * len(self._rows):
            self._rebuild(1)
        place = self._place_of(group, self._columns["hash"][row].tobytes())
        while self._rows[place] >= 0:
            place = place + 1 & self._mask
        self._rows[place] = row
        self._taken += 1
        self._live += 1

    def enter(self, group: int, rows: Rows) -> None:
        """The same for many."""
        if self._taken + len(rows) > _FULL * len(self._rows):
            self._rebuild(len(rows))
        self._place(self._places(group, self._columns["hash"][rows]), rows)
        self._taken += len(rows)
        self._live += len(rows)

    def leave(self, row: int) -> None:
        """A row that was entered; its key is still in the columns."""
        place = self._place_of(int(self._columns["group"][row]), self._columns["hash"][row].tobytes())
        while self._rows[place] != row:
            place = place + 1 & self._mask
        self._rows[place] = _GONE
        self._live -= 1

    def live_rows(self) -> Rows:
        """All rows entered, in no order."""
        return self._rows[self._rows >= 0].astype(np.int64)

    def _make(self, places: int) -> None:
        self._rows = np.full(places, _EMPTY, np.int32)
        self._mask = places - 1
        self._shift = 64 - self._mask.bit_length()
        self._taken = self._live = 0

    def _rebuild(self, more: int) -> None:
        rows = self.live_rows()
        places = len(self._rows)
        while len(rows) + more > _FULL / 1.5 * places:
            places *= 2
        self._make(places)
        groups, hashes = self._columns["group"][rows], self._columns["hash"][rows]
        for group in np.unique(groups).tolist():
            chosen = groups == group
            self._place(self._places(group, hashes[chosen]), rows[chosen])
        self._taken = self._live = len(rows)

    def _places(self, group: int, hashes: npt.NDArray[np.uint64]) -> Rows:
        """Where each hash is looked for first: multiply-shift of its first word."""
        mixed = (hashes[:, 0] ^ np.uint64(self._salt_of(group))) * np.uint64(self._factor)
        return (mixed >> np.uint64(self._shift)).astype(np.int64)

    def _place_of(self, group: int, chunk_hash: bytes) -> int:
        word = int.from_bytes(chunk_hash[:8], "little") ^ self._salt_of(group)
        return (word * self._factor & _MASK64) >> self._shift

    def _salt_of(self, group: int) -> int:
        return self._salt ^ (group * _GOLDEN & _MASK64)

    def _place(self, places: Rows, rows: Rows) -> None:
        while len(rows):
            free = self._rows[places] < 0
            self._rows[places[free]] = rows[free]  # of two for one place the last stays
            left = self._rows[places] != rows
            places, rows = (places[left] + 1) & self._mask, rows[left]
