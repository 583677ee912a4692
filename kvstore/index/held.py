"""One object of the index, as the engine holds on to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvstore.index.entry import Described, ObjectKey
from kvstore_codec import Quality

if TYPE_CHECKING:
    from kvstore.index.index import Index


class Entry:
    """One object in the index. `held` is False once it is gone, also where another object took its row."""

    __slots__ = ("_birth", "_index", "row")

    def __init__(self, index: Index, row: int) -> None:
        self._index, self.row = index, row
        self._birth = int(index.columns["birth"][row])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entry) and (self._index, self.row, self._birth) == (
            other._index, other.row, other._birth,
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash((self.row, self._birth))

    @property
    def held(self) -> bool:
        return int(self._index.columns["birth"][self.row]) == self._birth and self.row in self._index

    @property
    def version(self) -> int:
        """Changes whenever what a tier holds of this object changes: what was read before and after is the same bytes
        if this is the same."""
        return int(self._index.columns["version"][self.row])

    @property
    def key(self) -> ObjectKey:
        return self._index.key_of(self.row)

    @property
    def described(self) -> Described:
        return self._index.described(self.row)

    @property
    def tiers(self) -> tuple[str, ...]:
        """Those that hold it or a prefix of it, fastest first."""
        return tuple(
            name for name, layers in zip(self._index.tiers, self._index.layers_by_tier(self.row), strict=True) if layers
        )

    def layers_in(self, tier: str) -> int:
        """Quality layers that a tier holds; 0: none."""
        return int(self._index.order(tier).layers[self.row])

    def length_in(self, tier: str) -> int:
        """Bytes that a tier holds of it."""
        return self._index.length_of(self.row, self.layers_in(tier))

    @property
    def layers(self) -> int:
        """The most quality layers that a tier holds."""
        return max(self._index.layers_by_tier(self.row))

    @property
    def length(self) -> int:
        return self._index.length_of(self.row, self.layers)

    @property
    def quality(self) -> Quality:
        """The best that is held."""
        return self.described.quality_of(self.layers)

    def at_least(self, quality: int) -> bool:
        """Holds `quality` or better."""
        return self.quality <= quality

    @property
    def last_use(self) -> int:
        """Of two objects the one used later has the larger; those of one prefix have the same."""
        return int(self._index.columns["last_use"][self.row])

    @property
    def last_use_s(self) -> float:
        return float(self._index.columns["last_use_s"][self.row])

    @property
    def reads(self) -> int:
        return int(self._index.columns["reads"][self.row])

    def count_read(self) -> None:
        self._index.columns["reads"][self.row] += np.uint32(1)
