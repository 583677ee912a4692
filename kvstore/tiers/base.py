"""What a place that holds objects must do.

A tier stores bytes under a key and knows its room; it decides nothing. Its methods block: the engine calls the
host tier on its loop and the disk tier from threads, writes of one tier one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvstore.index.entry import ObjectKey

Bytes = bytes | bytearray | memoryview


class StoredObject(NamedTuple):
    """One object found by `scan`. `quality` and `layer_bytes` are of what is held, which may be less than was put:
    `layer_bytes[q]` is the length of its prefix with quality layers 0…q, `length` the last of them."""

    key: ObjectKey
    parent: bytes
    first_position: int
    tokens: int
    quality: int
    provenance: int
    layer_bytes: tuple[int, ...]
    length: int


class StoredColumns(NamedTuple):
    """Objects found by a scan, as columns. `namespaces`, `hashes` and `parents`: [n, 4], 32 bytes as numbers;
    `layers`: quality layers held; `layer_bytes`: [n, 3], zeros for those that are not held; all as of StoredObject."""

    namespaces: npt.NDArray[np.uint64]
    hashes: npt.NDArray[np.uint64]
    parts: npt.NDArray[np.uint32]
    parents: npt.NDArray[np.uint64]
    first_positions: npt.NDArray[np.uint64]
    tokens: npt.NDArray[np.uint32]
    qualities: npt.NDArray[np.int64]
    provenances: npt.NDArray[np.uint8]
    layers: npt.NDArray[np.int64]
    layer_bytes: npt.NDArray[np.uint64]

    def objects(self) -> Iterator[StoredObject]:
        """The same one by one."""
        for row, layers in enumerate(self.layers.tolist()):
            key = ObjectKey(self.namespaces[row].tobytes(), self.hashes[row].tobytes(), int(self.parts[row]))
            lengths = tuple(self.layer_bytes[row, :layers].tolist())
            yield StoredObject(
                key, self.parents[row].tobytes(), int(self.first_positions[row]), int(self.tokens[row]),
                int(self.qualities[row]), int(self.provenances[row]), lengths, lengths[-1],
            )  # fmt: skip


class Tier(Protocol):
    name: str

    @property
    def capacity_bytes(self) -> int: ...

    @property
    def used_bytes(self) -> int:
        """Bytes taken, the tier's own overhead included; never above capacity_bytes."""

    @property
    def objects(self) -> int: ...

    def cost_bytes(self, length: int) -> int:
        """What an object of `length` bytes takes."""

    def put(self, key: ObjectKey, parent: bytes, data: Bytes) -> None:
        """Stores or replaces; when it returns, the object survives what the tier survives.

        Raises TierFull (no room: the engine makes it first; nothing has changed) or TierFailed (the medium refused:
        under `key` there is what was there before, or nothing)."""

    def read(self, key: ObjectKey, length: int) -> memoryview | None:
        """The first `length` bytes of the object, or None where it is not (all) there."""

    def truncate(self, key: ObjectKey, length: int) -> bool:
        """Keeps the first `length` bytes (the end of a quality layer), freeing the rest; whether it was there."""

    def delete(self, key: ObjectKey) -> bool:
        """Whether it was there."""

    def scan(self) -> Iterator[StoredObject]:
        """What is held from before, least recently used first."""
