"""Filling an empty index with what a tier holds from before, a million objects in seconds.

Column by column where `Index.add` goes object by object; the result is the same.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvstore.index.index import DEPTH_MAX, Index
from kvstore.tiers.base import StoredColumns


def load(index: Index, tier: str, stored: Iterable[StoredColumns], now_s: float) -> None:
    """`stored`: each object once, least recently used first."""
    assert not len(index), "only an empty index is loaded"
    parents = [_append(index, piece, now_s) for piece in stored]
    if parents:
        _link(index, np.concatenate(parents))
        index.order(tier).load(np.arange(len(index)), now_s)


def _append(index: Index, piece: StoredColumns, now_s: float) -> npt.NDArray[np.uint64]:
    """The hashes of their parents, [n, 4]."""
    columns = index.columns
    rows = columns.take_many(len(piece.tokens))
    index.enter(rows, piece.namespaces, piece.parts, piece.hashes)
    columns["first_position"][rows] = piece.first_positions
    columns["tokens"][rows] = piece.tokens
    columns["quality"][rows] = piece.qualities
    columns["provenance"][rows] = piece.provenances
    columns["whole_layers"][rows] = piece.layers
    columns["layer_bytes"][rows] = piece.layer_bytes
    columns["last_use"][rows] = rows
    columns["last_use_s"][rows] = now_s
    return piece.parents.copy()  # of memory that would else keep the whole piece


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
