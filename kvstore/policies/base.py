"""What an eviction policy is: the order in which the objects of one tier go.

Pure: no I/O, no bytes, no clock or randomness of its own, so the node and `kvstore bench trace` run the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt


class Policy(Protocol):
    """Which object of one tier goes next.

    A `slot` is a small int that names a resident; the caller reuses it after `remove`. The chunks of a chain are
    inserted in the order of the prefix, right after a `touch` of what was stored of it.
    """

    name: str

    def insert(self, slot: int, fingerprint: int, parent: int, position: int, size: int, now_s: float) -> None:
        """A new resident. `fingerprint`: 64 bits of the chunk's hash, by which a policy remembers what went; `parent`:
        slot of the chunk before it, or -1; `position`: chunks before it in its chain; `size`: bytes."""
        ...

    def touch(self, slots: Sequence[int], now_s: float) -> None:
        """A stored prefix, in order, was used."""
        ...

    def remove(self, slot: int) -> None:
        """The resident was evicted or deleted; its children, if any, have no parent from now on."""
        ...

    def victim(self, may_go: Callable[[int], bool]) -> int | None:
        """The resident that goes next, or None where none may go. It stays until removed.

        `may_go` covers leases, pins and leafness: an object with children held may not go.
        """
        ...


@runtime_checkable
class Loading(Protocol):
    """A policy that takes what a tier held before a restart all at once: a million calls take seconds."""

    def load(self, fingerprints: npt.NDArray[np.uint64], parents: npt.NDArray[np.int32]) -> None:
        """Residents 0, 1, 2 … of a policy that has none, least recently used first; arguments as of `insert`."""
        ...
