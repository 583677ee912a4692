"""The index: which objects are stored, how much of each in which tier, and which of them would go first.

Pure bookkeeping: no bytes, no I/O, no clock of its own. One thread uses it (the node's event loop). An object is a row
of `Columns` and a hash in a table of its namespace and part; the engine names it by an `Entry`, which says whether the
row is still that object's.

Eviction is leaf-first: an object is a victim in a tier only while no child of it is held there, because a chunk without
its prefix is dead weight. In what order leaves go, a `Policy` says. What leases and pins hold (`is_held`) never goes.

Who a chunk's parent is, its writer says. It counts as a child only of an object that ends where it begins, so no
claim, however wrong, makes a circle in which nothing is a leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.index.columns import Columns
from kvstore.index.entry import Described, ObjectKey, Retention
from kvstore.index.hash_table import HashTable, Rows, words
from kvstore.index.held import Entry
from kvstore.index.order import TierOrder
from kvstore.policies.base import Policy
from kvstore_codec import Quality

DEPTH_MAX = (1 << 32) - 1
HASH_BYTES = 32
NewPolicy = Callable[[], Policy]


class PrefixState(NamedTuple):
    """One value a chunk: `qualities` and `stored_bytes` are the best held, `tiers` the fastest that hold that."""

    tokens: list[int]
    qualities: list[int]
    provenances: list[int]
    stored_bytes: list[int]
    tiers: list[str]


class Index:
    def __init__(
        self, tiers: Sequence[str], policy: NewPolicy, *, floor: Quality | None = None,
        is_held: Callable[[int], bool] = lambda _: False, on_forget: Callable[[int], object] = lambda _: None,
    ) -> None:  # fmt: skip
        """`tiers`: names, fastest first. `floor`: quality below which nothing is shrunk; None: nothing is.
        `is_held`: whether a row must not go. `on_forget`: told of rows that did."""
        self.tiers = tuple(tiers)
        self.columns = Columns(len(self.tiers))
        self._on_forget = on_forget
        self._orders = {
            name: TierOrder(self.columns, number, policy(), floor, is_held) for number, name in enumerate(self.tiers)
        }
        self._groups: list[tuple[bytes, int]] = []  # namespace and part, by number
        self._numbers: dict[tuple[bytes, int], int] = {}
        self._table = HashTable(self.columns)
        #: hashes of parents that are not stored, and, where the position says there is one, who waits for them
        self._absent_parents: dict[int, bytes] = {}
        self._waiting: dict[tuple[int, bytes], set[int]] = {}
        self._shared: dict[bytes, bytes] = {}  # the first chunks of a namespace all have the same parent
        self._count = self._uses = 0

    def __len__(self) -> int:
        return self._count

    @property
    def uses(self) -> int:
        """So far: what is used next has a larger `last_use`."""
        return self._uses

    def __iter__(self) -> Iterator[Entry]:
        return (Entry(self, row) for row in self._table.live_rows().tolist())

    def __contains__(self, row: int) -> bool:
        return bool(self.columns["whole_layers"][row])

    def order(self, tier: str) -> TierOrder:
        return self._orders[tier]

    def get(self, key: ObjectKey) -> Entry | None:
        row = self.row_of(key)
        return None if row is None else Entry(self, row)

    def row_of(self, key: ObjectKey) -> int | None:
        group = self._numbers.get((key.namespace_id, key.part))
        return None if group is None else self._row_in(group, key.chunk_hash)

    def key_of(self, row: int) -> ObjectKey:
        namespace_id, part = self._groups[self.columns["group"][row]]
        return ObjectKey(namespace_id, self._hash_of(row), part)

    def keys(self, namespace_id: bytes | None = None) -> list[ObjectKey]:
        """Of one namespace or all, in no order."""
        rows = self._table.live_rows()
        groups = self.columns["group"][rows]
        if namespace_id is not None:
            wanted = [number for number, (namespace, _) in enumerate(self._groups) if namespace == namespace_id]
            chosen = np.isin(groups, wanted)
            rows, groups = rows[chosen], groups[chosen]
        hashes = self.columns["hash"][rows].tobytes()
        found = zip(groups.tolist(), range(0, len(hashes), HASH_BYTES), strict=True)
        return [
            ObjectKey(self._groups[group][0], hashes[at : at + HASH_BYTES], self._groups[group][1])
            for group, at in found
        ]

    def named(self, hashes: Sequence[bytes], namespace_id: bytes | None = None) -> list[Entry]:
        """The objects of these chunks, of every part, in one namespace or all."""
        wanted = words(b"".join(dict.fromkeys(hashes)))
        return [
            Entry(self, row)
            for (namespace, _), group in self._numbers.items()
            if namespace_id in (None, namespace)
            for row in self._table.find(group, wanted).tolist()
            if row >= 0
        ]

    def described(self, row: int) -> Described:
        columns = self.columns
        parent = int(columns["parent"][row])
        return Described(
            self._absent_parents[row] if parent < 0 else self._hash_of(parent),
            int(columns["first_position"][row]), int(columns["tokens"][row]),
            Quality(int(columns["quality"][row])), Quality(int(columns["provenance"][row])),
            tuple(columns["layer_bytes"][row, : columns["whole_layers"][row]].tolist()),
        )  # fmt: skip

    def length_of(self, row: int, layers: int) -> int:
        """Bytes of the first `layers` quality layers; 0 of none."""
        return int(self.columns["layer_bytes"][row, layers - 1]) if layers else 0

    def layers_by_tier(self, row: int) -> list[int]:
        return [int(order.layers[row]) for order in self._orders.values()]

    def enter(
        self, rows: Rows, namespaces: npt.NDArray[np.uint64], parts: npt.NDArray[np.uint32],
        hashes: npt.NDArray[np.uint64],
    ) -> None:  # fmt: skip
        """Gives new objects their rows. `namespaces`, `hashes`: [n, 4], 32 bytes as numbers."""
        columns = self.columns
        columns["hash"][rows] = hashes
        names = np.column_stack([namespaces, parts])
        left = np.arange(len(rows))
        while len(left):  # the objects of one group after the other: there are few
            alike = (names[left] == names[left[0]]).all(axis=1)
            here, name = rows[left[alike]], names[left[0]]
            columns["group"][here] = group = self._group(name[:4].tobytes(), int(name[4]))
            self._table.enter(group, here)
            left = left[~alike]
        self._count += len(rows)
        self._uses += len(rows)

    def find_parents(self, rows: Rows, parents: npt.NDArray[np.uint64]) -> Rows:
        """The row of each row's parent, which is in the same group; -1: not stored. `parents`: hashes as [n, 4]."""
        groups = self.columns["group"][rows]
        found = np.full(len(rows), -1, np.int64)
        for group in np.unique(groups).tolist():
            chosen = groups == group
            found[chosen] = self._table.find(group, parents[chosen])
        return found

    def prefix(self, namespace_id: bytes, hashes: Sequence[bytes], part: int) -> Rows:
        """Rows of the longest stored prefix of a chain, in one pass."""
        group = self._numbers.get((namespace_id, part))
        if group is None or not hashes:
            return np.empty(0, np.int64)
        rows = self._table.find(group, words(b"".join(hashes)))
        return rows[: int((rows < 0).argmax())] if (rows < 0).any() else rows

    def state(self, rows: Rows) -> PrefixState:
        """What a lookup tells of a prefix, as columns."""
        columns = self.columns
        layers = self._layers(rows)
        best = layers.max(axis=0)
        fastest = (layers == best).argmax(axis=0)  # the first of those that hold as much
        return PrefixState(
            columns["tokens"].take(rows).tolist(),
            (columns["quality"].take(rows) + columns["whole_layers"].take(rows) - best).tolist(),
            columns["provenance"].take(rows).tolist(), columns["layer_bytes"][rows, best - 1].tolist(),
            [self.tiers[number] for number in fastest.tolist()],
        )  # fmt: skip

    def readable(self, rows: Rows, quality: int, tier: str) -> tuple[list[int], list[Quality]]:
        """(bytes, quality) that a read at `quality` gives of each, up to the first that `tier` holds less of than
        another does."""
        columns = self.columns
        stored, whole = columns["quality"][rows].astype(np.int64), columns["whole_layers"][rows].astype(np.int64)
        layers = np.minimum(np.maximum(whole - np.maximum(quality - stored, 0), 1), self._layers(rows).max(axis=0))
        lacking = self._orders[tier].layers[rows] < layers
        end = int(lacking.argmax()) if lacking.any() else len(rows)
        lengths = columns["layer_bytes"][rows[:end], layers[:end] - 1]
        return lengths.tolist(), [Quality(each) for each in (stored + whole - layers)[:end].tolist()]

    def _layers(self, rows: Rows) -> npt.NDArray[np.uint8]:
        """How many quality layers each tier holds of each: [tiers, rows]."""
        return np.array([order.layers.take(rows) for order in self._orders.values()])

    def count_reads(self, rows: Rows) -> None:
        np.add.at(self.columns["reads"], rows, np.uint32(1))

    def touch(self, rows: Rows, now_s: float) -> None:
        """Marks a prefix as used now."""
        self._uses += 1
        self.columns["last_use"][rows] = self._uses
        self.columns["last_use_s"][rows] = now_s
        for order in self._orders.values():
            order.touch(rows, now_s)

    def add(
        self, key: ObjectKey, described: Described, tier: str, layers: int, now_s: float,
        retention: Retention | None = None,
    ) -> Entry:  # fmt: skip
        """The first `layers` quality layers of an object are now held in `tier`; makes its row where there is none."""
        row = self.row_of(key)
        if row is None:
            row = self._new(key, described, now_s)
        if retention is not None:
            self.columns["priority"][row] = retention.priority
            self.columns["retain_until_s"][row] = retention.until_s
        self._count_change(row)
        order, parent = self._orders[tier], int(self.columns["parent"][row])
        if order.layers[row]:
            order.resize(row, layers)
        else:
            order.insert(row, parent, layers, _fingerprint(key.chunk_hash), now_s)
        return Entry(self, row)

    def replace(self, entry: Entry, described: Described) -> None:
        """A better version of an object comes in place of the one held, whose leases and pins then hold it. It is held
        nowhere until it is added."""
        row = entry.row
        self._count_change(row)
        for tier in entry.tiers:
            self._orders[tier].remove(row, int(self.columns["parent"][row]))
        self._leave_parent(row)
        if (self.columns["first_position"][row], self._end_of(row)) != (
            described.first_position, described.end_position,
        ):  # fmt: skip
            self._orphan_children(row)  # a claim that would make a circle
        self._describe(row, described)
        self._adopt(row, entry.key.chunk_hash, described.end_position)

    def shrink(self, entry: Entry, tier: str, layers: int) -> None:
        """A tier now holds fewer quality layers of an object."""
        self._count_change(entry.row)
        self._orders[tier].resize(entry.row, layers)

    def drop(self, entry: Entry, tier: str) -> None:
        """The object is no longer held in `tier`; forgets it when that was the last one. Idempotent."""
        row, order = entry.row, self._orders[tier]
        if not entry.held or not order.layers[row]:
            return
        self._count_change(row)
        order.remove(row, int(self.columns["parent"][row]))
        if not any(self.layers_by_tier(row)):
            self._forget(row)

    def victim(self, tier: str, may_go: Callable[[Entry], bool], now_s: float) -> Entry | None:
        """The leaf that goes next from `tier`, or None if none may go. It stays until dropped."""
        row = self._orders[tier].victim(lambda row: may_go(Entry(self, row)), now_s)
        return None if row is None else Entry(self, row)

    def shrinkable(self, tier: str, may_shrink: Callable[[Entry], bool]) -> Entry | None:
        """The object of `tier` that loses its finest layer next, or None where all are down to the floor, or held."""
        row = self._orders[tier].shrinkable(lambda row: may_shrink(Entry(self, row)))
        return None if row is None else Entry(self, row)

    def _new(self, key: ObjectKey, described: Described, now_s: float) -> int:
        columns, row = self.columns, self.columns.take()
        columns["hash"][row] = words(key.chunk_hash)[0]
        columns["group"][row] = group = self._group(key.namespace_id, key.part)
        self._uses += 1
        columns["last_use"][row] = self._uses
        columns["last_use_s"][row] = now_s
        self._table.enter_one(group, row)
        self._count += 1
        self._describe(row, described)
        self._adopt(row, key.chunk_hash, described.end_position)
        return row

    def _group(self, namespace_id: bytes, part: int) -> int:
        name = (namespace_id, part)
        group = self._numbers.get(name)
        if group is None:
            group = self._numbers[name] = len(self._groups)
            self._groups.append(name)
        return group

    def _row_in(self, group: int, chunk_hash: bytes) -> int | None:
        row = self._table.find_one(group, chunk_hash)
        return None if row < 0 else row

    def _hash_of(self, row: int) -> bytes:
        chunk_hash: bytes = self.columns["hash"][row].tobytes()
        return chunk_hash

    def _describe(self, row: int, described: Described) -> None:
        columns = self.columns
        columns["first_position"][row] = described.first_position
        columns["tokens"][row] = described.tokens
        columns["layer_bytes"][row, : described.layers] = described.layer_bytes
        columns["whole_layers"][row] = described.layers
        columns["quality"][row] = described.quality
        columns["provenance"][row] = described.provenance
        self._find_parent(row, described)

    def _find_parent(self, row: int, described: Described) -> None:
        columns = self.columns
        group = int(columns["group"][row])
        found = self._row_in(group, described.parent)
        parent = -1 if found is None or self._end_of(found) != described.first_position else found
        columns["parent"][row] = parent
        if parent >= 0:
            columns["depth"][row] = columns["depth"][parent] + 1
            return
        columns["depth"][row] = min(described.first_position // max(1, described.tokens), DEPTH_MAX)
        self.miss_parent(row, described.parent)

    def miss_parent(self, row: int, parent: bytes) -> None:
        """Notes the parent of an object whose parent is not stored."""
        if self.columns["first_position"][row]:
            self._absent_parents[row] = parent
            self._waiting.setdefault((int(self.columns["group"][row]), parent), set()).add(row)
        else:
            self._absent_parents[row] = self._shared.setdefault(parent, parent)

    def _leave_parent(self, row: int) -> None:
        if int(self.columns["parent"][row]) < 0:
            self._stop_waiting(row, int(self.columns["group"][row]), self._absent_parents.pop(row))

    def _adopt(self, row: int, chunk_hash: bytes, end_position: int) -> None:
        """Makes the object the parent of those that came before it."""
        group = int(self.columns["group"][row])
        waiting = self._waiting.get((group, chunk_hash), ())
        for child in [each for each in waiting if self.columns["first_position"][each] == end_position]:
            self._stop_waiting(child, group, chunk_hash)
            del self._absent_parents[child]
            self.columns["parent"][child] = row
            for order in self._orders.values():
                order.adopt(row, child)

    def _forget(self, row: int) -> None:
        self._leave_parent(row)
        self._orphan_children(row)
        self._table.leave(row)
        self._count -= 1
        self.columns.give_back(row)
        self._on_forget(row)

    def _orphan_children(self, row: int) -> None:
        """The object is gone before its children, as damage and deletion do."""
        columns = self.columns
        if not any(order.children[row] for order in self._orders.values()):
            return
        chunk_hash = self._hash_of(row)
        waiting = self._waiting.setdefault((int(columns["group"][row]), chunk_hash), set())
        for child in np.flatnonzero(columns["parent"][: columns.rows] == row).tolist():
            if child in self and child != row:
                columns["parent"][child] = -1
                self._absent_parents[child] = chunk_hash
                waiting.add(child)
        for order in self._orders.values():
            order.children[row] = 0

    def _stop_waiting(self, row: int, group: int, parent_hash: bytes) -> None:
        rows = self._waiting.get((group, parent_hash))
        if rows is not None:
            rows.discard(row)
            if not rows:
                del self._waiting[group, parent_hash]

    def _count_change(self, row: int) -> None:
        self.columns["version"][row] += np.uint32(1)

    def _end_of(self, row: int) -> int:
        return int(self.columns["first_position"][row]) + int(self.columns["tokens"][row])


def _fingerprint(chunk_hash: bytes) -> int:
    return int.from_bytes(chunk_hash[:8], "little")
