"""Filling an empty index with what a tier holds from before, a million objects in seconds.

Column by column where `Index.add` goes object by object; the result is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import numpy.typing as npt

from kvstore.index.hash_table import words
from kvstore.index.index import DEPTH_MAX, Index
from kvstore.tiers.base import StoredObject

PIECE = 1 << 14


def load(index: Index, tier: str, stored: Iterable[StoredObject], now_s: float) -> None:
    """`stored`: each object once, least recently used first."""
    assert not len(index), "only an empty index is loaded"
    parents = [_append(index, piece, now_s) for piece in _pieces(stored)]
    if parents:
        _link(index, np.concatenate(parents))
        index.order(tier).load(np.arange(len(index)), now_s)


def _pieces(stored: Iterable[StoredObject]) -> Iterator[list[StoredObject]]:
    remaining = iter(stored)
    while piece := list(islice(remaining, PIECE)):
        yield piece


def _append(index: Index, piece: list[StoredObject], now_s: float) -> npt.NDArray[np.uint64]:
    """The hashes of their parents, [n, 4]."""
    columns = index.columns
    rows = columns.take_many(len(piece))
    keys, parents, first_positions, tokens, qualities, provenances, layer_bytes, *_ = zip(*piece, strict=True)
    index.enter(rows, keys)
    columns["first_position"][rows] = first_positions
    columns["tokens"][rows] = tokens
    columns["quality"][rows] = qualities
    columns["provenance"][rows] = provenances
    layers = np.fromiter(map(len, layer_bytes), np.uint8, len(piece))
    columns["whole_layers"][rows] = layers
    for count in np.unique(layers).tolist():
        alike = np.flatnonzero(layers == count)
        columns["layer_bytes"][rows[alike], :count] = [layer_bytes[number] for number in alike.tolist()]
    columns["last_use"][rows] = rows
    columns["last_use_s"][rows] = now_s
    return words(b"".join(parents))


def _link(index: Index, parents: npt.NDArray[np.uint64]) -> None:
    columns, rows = index.columns, np.arange(len(parents))
    first = columns["first_position"][rows].astype(np.int64)
    end = first + columns["tokens"][rows]
    found = index.find_parents(rows, parents)
    found[(found >= 0) & (end[found] != first)] = -1
    columns["parent"][rows] = found
    columns["depth"][rows] = np.minimum(first // np.maximum(columns["tokens"][rows], 1), DEPTH_MAX)
    for row in np.flatnonzero(found < 0).tolist():
        index.miss_parent(row, parents[row].tobytes())
