"""The table of hashes against a dict; hashes that crowd included."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from kvstore.engine.shared import described_of
from kvstore.index.columns import Columns
from kvstore.index.entry import ObjectKey
from kvstore.index.hash_table import HashTable, words
from kvstore.index.index import Index
from kvstore.index.loading import load
from kvstore.policies.lru import Lru
from kvstore.tiers.base import StoredColumns, StoredObject

Key = tuple[int, bytes]

# Few first words, so that most hashes look alike to the table and only a whole comparison tells them apart.
hashes = st.builds(
    lambda head, tail: head.to_bytes(8, "little") + tail.to_bytes(24, "little"), st.integers(0, 3), st.integers(0, 40)
)
keys = st.tuples(st.integers(0, 2), hashes)
kinds = st.sampled_from(["enter", "enter", "leave", "many"])
operations = st.lists(st.tuples(kinds, st.lists(keys, min_size=1, max_size=40)), max_size=40)


class Tables:
    """The table, and a dict that says what it must find."""

    def __init__(self) -> None:
        self.columns = Columns(tiers=1)
        self.table = HashTable(self.columns)
        self.model: dict[Key, int] = {}

    def row_for(self, key: Key) -> int:
        row = self.columns.take()
        self.columns["group"][row] = key[0]
        self.columns["hash"][row] = words(key[1])[0]
        self.model[key] = row
        return row

    def check(self, asked: list[Key]) -> None:
        for group in {group for group, _ in asked}:
            wanted = [chunk_hash for other, chunk_hash in asked if other == group]
            expected = [self.model.get((group, chunk_hash), -1) for chunk_hash in wanted]
            assert self.table.find(group, words(b"".join(wanted))).tolist() == expected
            assert [self.table.find_one(group, chunk_hash) for chunk_hash in wanted] == expected
        assert sorted(self.table.live_rows().tolist()) == sorted(self.model.values())


@given(operations)
@settings(max_examples=200, deadline=None)
def test_any_mix_of_operations_against_a_dict(todo: list[tuple[str, list[Key]]]) -> None:
    tables = Tables()
    for what, named in todo:
        new = [key for key in dict.fromkeys(named) if key not in tables.model]
        if what == "enter":
            for key in new:
                tables.table.enter_one(key[0], tables.row_for(key))
        elif what == "many":
            for group in {group for group, _ in new}:
                rows = [tables.row_for(key) for key in new if key[0] == group]
                tables.table.enter(group, np.array(rows))
        else:
            for key in [key for key in dict.fromkeys(named) if key in tables.model]:
                row = tables.model.pop(key)
                tables.table.leave(row)
                tables.columns.give_back(row)
        tables.check(named)


def test_it_grows_and_forgets_what_is_gone() -> None:
    tables = Tables()
    rng = np.random.default_rng(1)
    every = [(0, rng.bytes(32)) for _ in range(50_000)]
    for key in every:
        tables.table.enter_one(0, tables.row_for(key))
    assert tables.table.nbytes / len(every) < 12
    tables.check(every)
    for key in every:
        row = tables.model.pop(key)
        tables.table.leave(row)
        tables.columns.give_back(row)
    tables.check(every[:100])
    before = tables.table.nbytes
    for _ in range(10):  # what comes and goes takes the places of what went
        for key in every[:30_000]:
            tables.table.enter_one(0, tables.row_for(key))
        for key in every[:30_000]:
            row = tables.model.pop(key)
            tables.table.leave(row)
            tables.columns.give_back(row)
    assert tables.table.nbytes <= before


def columns_of(stored: list[StoredObject]) -> StoredColumns:
    lengths = [(*each.layer_bytes, 0, 0)[:3] for each in stored]
    return StoredColumns(
        words(b"".join(each.key.namespace_id for each in stored)),
        words(b"".join(each.key.chunk_hash for each in stored)),
        np.array([each.key.part for each in stored], np.uint32), words(b"".join(each.parent for each in stored)),
        np.array([each.first_position for each in stored], np.uint64),
        np.array([each.tokens for each in stored], np.uint32), np.array([each.quality for each in stored]),
        np.array([each.provenance for each in stored], np.uint8), np.array([len(each.layer_bytes) for each in stored]),
        np.array(lengths, np.uint64),
    )  # fmt: skip


def test_loading_is_the_same_as_adding_one_by_one() -> None:

    rng = np.random.default_rng(2)
    stored = []
    for chain in range(30):
        parent = bytes(32)
        for position in range(int(rng.integers(1, 8))):
            chunk_hash = rng.bytes(32)
            key = ObjectKey(bytes([chain % 3]) * 32, chunk_hash, chain % 2)
            layers = int(rng.integers(1, 4))
            stored.append(
                StoredObject(key, parent, 16 * position, 16, 5 - layers, 1, (100, 200, 300)[:layers], 100 * layers)
            )
            parent = chunk_hash
    stored = [each for number, each in enumerate(stored) if number % 7 != 3]  # some parents are missing
    order = rng.permutation(len(stored))
    loaded, added = Index(("host", "disk"), Lru), Index(("host", "disk"), Lru)
    load(loaded, "disk", [columns_of([stored[number] for number in order])], 5.0)
    for number in order:
        each = stored[number]
        described = described_of(each)
        added.add(each.key, described, "disk", described.layers, 5.0)
    assert set(loaded.keys()) == set(added.keys())
    for each in stored:
        one, other = loaded.get(each.key), added.get(each.key)
        assert one is not None
        assert other is not None
        assert (one.described, one.tiers, one.length) == (other.described, other.tiers, other.length)
        assert loaded.order("disk").children[one.row] == added.order("disk").children[other.row]
    while (victim := loaded.victim("disk", lambda _: True, 0.0)) is not None:
        loaded.drop(victim, "disk")
    assert len(loaded) == 0
