"""The index against a plain model of it: any order of adds, uses, leases, drops, cuts and evictions."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.index.entry import Described, ObjectKey, Retention
from kvstore.index.held import Entry
from kvstore.index.index import Index
from kvstore.policies.lru import Lru
from kvstore_codec import Quality

TIERS = ("host", "disk")
TOKENS = 16
LAYERS = (100, 200, 300)
FLOOR = Quality.MEDIUM

# A forest: two prompts that share three chunks, one of them branching again, and a prompt of its own.
PARENTS: dict[int, int | None] = {
    0: None, 1: 0, 2: 1, 3: 2, 4: 3, 5: 2, 6: 5, 7: 5, 8: None, 9: 8,
    # What a writer may claim: to be its own parent, each other's parents, a chunk after its own child.
    10: 10, 11: 12, 12: 11, 13: 4,
}  # fmt: skip
POSITIONS = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 3, 6: 4, 7: 4, 8: 0, 9: 1, 10: 1, 11: 1, 12: 2, 13: 1}

nodes = st.sampled_from(sorted(PARENTS))
tiers = st.sampled_from(TIERS)


def key_of(node: int) -> ObjectKey:
    return ObjectKey(bytes(32), bytes([node + 1]) * 32, 0)


def parent_of(node: int) -> bytes:
    parent = PARENTS[node]
    return bytes(32) if parent is None else key_of(parent).chunk_hash


def described(parent: bytes, position: int) -> Described:
    return Described(parent, position * TOKENS, TOKENS, Quality.HIGH, Quality.LOSSLESS, LAYERS)


def describe(node: int) -> Described:
    return described(parent_of(node), POSITIONS[node])


def anything(_: Entry) -> bool:
    return True


def chain_to(node: int) -> list[int]:
    """The prompt that ends with `node`, first chunk first."""
    chain: list[int] = []
    at: int | None = node
    while at is not None and at not in chain:
        chain.append(at)
        at = PARENTS[at]
    return chain[::-1]


def is_child(node: int, of: int) -> bool:
    return PARENTS[node] == of and POSITIONS[node] == POSITIONS[of] + 1


@dataclass
class Known:
    layers: dict[str, int] = field(default_factory=dict)  # by tier


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.leased: set[int] = set()
        self.model: dict[int, Known] = {}
        self.forgotten: list[int] = []
        self.index = Index(
            TIERS,
            Lru,
            floor=FLOOR,
            is_held=lambda row: self.node_at(row) in self.leased,
            on_forget=self.forgotten.append,
        )

    def node_at(self, row: int) -> int:
        return self.index.key_of(row).chunk_hash[0] - 1

    def entry(self, node: int) -> Entry:
        entry = self.index.get(key_of(node))
        assert entry is not None
        return entry

    def leaves(self, tier: str) -> set[int]:
        """Of a tier, without what is leased."""
        held = [node for node, known in self.model.items() if tier in known.layers]
        return {node for node in held if not any(is_child(other, node) for other in held)} - self.leased

    def forget(self, node: int, tier: str) -> None:
        self.model[node].layers.pop(tier, None)
        if not self.model[node].layers:
            del self.model[node]

    @rule(node=nodes, tier=tiers, layers=st.integers(1, 3))
    def add(self, node: int, tier: str, layers: int) -> None:
        entry = self.index.add(key_of(node), describe(node), tier, layers, 0.0)
        self.model.setdefault(node, Known()).layers[tier] = layers
        assert entry == self.index.get(key_of(node))

    @rule(node=nodes, tier=tiers)
    def drop(self, node: int, tier: str) -> None:
        entry = self.index.get(key_of(node))
        if entry is not None:
            version = entry.version
            held = tier in entry.tiers
            self.index.drop(entry, tier)
            assert (entry.version != version) == held, "who read it meanwhile can tell"
            self.index.drop(entry, tier)  # idempotent
            self.forget(node, tier)

    @rule(node=nodes)
    def replace(self, node: int) -> None:
        entry = self.index.get(key_of(node))
        if entry is not None:
            self.index.replace(entry, describe(node))
            self.index.add(key_of(node), describe(node), "host", 3, 0.0)
            self.model[node].layers = {"host": 3}
            assert entry.held, "what held it still does"

    @rule(node=nodes)
    def use_a_prefix(self, node: int) -> None:
        chain = chain_to(node)
        rows = self.index.prefix(bytes(32), [key_of(each).chunk_hash for each in chain], 0)
        stored = 0
        while stored < len(chain) and chain[stored] in self.model:
            stored += 1
        assert [self.node_at(row) for row in rows] == chain[:stored]
        self.index.touch(rows, 1.0)
        if stored:
            state = self.index.state(rows)
            entries = [self.entry(each) for each in chain[:stored]]
            assert state.stored_bytes == [entry.length for entry in entries]
            assert state.qualities == [entry.quality for entry in entries]
            for entry, tier in zip(entries, state.tiers, strict=True):
                assert tier == next(name for name in entry.tiers if entry.layers_in(name) == entry.layers)

    @rule(node=nodes)
    def lease(self, node: int) -> None:
        self.leased ^= {node}

    @rule(tier=tiers, protected=st.none() | nodes)
    def ask_for_a_victim(self, tier: str, protected: int | None) -> None:
        victim = self.index.victim(tier, lambda entry: protected is None or entry.key != key_of(protected), 0.0)
        expected = self.leaves(tier) - {protected}
        assert (victim is None) == (not expected)
        assert victim is None or self.node_at(victim.row) in expected

    @rule(tier=tiers, count=st.integers(1, 20))
    def evict(self, tier: str, count: int) -> None:
        for _ in range(count):
            expected = self.leaves(tier)
            victim = self.index.victim(tier, anything, 0.0)
            assert (victim is None) == (not expected)
            if victim is None:
                return
            node = self.node_at(victim.row)
            assert node in expected
            self.index.drop(victim, tier)
            self.forget(node, tier)

    @rule(tier=tiers)
    def shrink(self, tier: str) -> None:
        expected = {node for node, known in self.model.items() if known.layers.get(tier, 0) == 3} - self.leased
        entry = self.index.shrinkable(tier, anything)
        assert (entry is None) == (not expected), "of three layers one may go before the floor"
        if entry is not None:
            node = self.node_at(entry.row)
            assert node in expected
            self.index.shrink(entry, tier, 2)
            self.model[node].layers[tier] = 2

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        assert len(self.index) == len(self.model) == len(self.index.keys())
        assert {entry.key: {tier: entry.layers_in(tier) for tier in entry.tiers} for entry in self.index} == {
            key_of(node): known.layers for node, known in self.model.items()
        }
        for node, known in self.model.items():
            entry = self.entry(node)
            assert entry.described == describe(node), "the parent's hash is known, stored or not"
            assert entry.tiers == tuple(tier for tier in TIERS if tier in known.layers), "fastest first"
            assert entry.length == LAYERS[max(known.layers.values()) - 1]

    @invariant()
    def counts_children_of_what_is_held(self) -> None:
        for tier in TIERS:
            for node in self.model:
                held = [other for other, known in self.model.items() if tier in known.layers and is_child(other, node)]
                assert int(self.index.order(tier).children[self.entry(node).row]) == len(held)

    def teardown(self) -> None:
        """Without leases everything can be evicted, and then nothing is left behind."""
        self.leased.clear()
        for tier in TIERS:
            while (victim := self.index.victim(tier, anything, 0.0)) is not None:
                self.index.drop(victim, tier)
        assert len(self.index) == 0
        assert (self.index._absent_parents, self.index._waiting) == ({}, {})
        assert not len(self.index._table.live_rows())


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestIndex = pytest.mark.slow(TestIndex)


def filled(count: int) -> tuple[Index, list[Entry]]:
    """An index of one chain."""
    index = Index(TIERS, Lru)
    entries = []
    for position in range(count):
        parent = (position - 1).to_bytes(32, "big", signed=True)
        key = ObjectKey(bytes(32), position.to_bytes(32, "big"), 0)
        entries.append(index.add(key, described(parent, position), "host", 3, 0.0))
    return index, entries


def test_a_chain_goes_from_its_end() -> None:
    index, entries = filled(50)
    going = []
    while (victim := index.victim("host", anything, 0.0)) is not None:
        going.append(victim)
        index.drop(victim, "host")
    assert going == entries[::-1]


def test_children_added_before_their_parents_still_protect_them() -> None:
    index = Index(TIERS, Lru)
    for node in (3, 2, 1, 0):
        index.add(key_of(node), describe(node), "host", 3, 0.0)
    going = []
    while (victim := index.victim("host", anything, 0.0)) is not None:
        going.append(victim.key)
        index.drop(victim, "host")
    assert going == [key_of(node) for node in (3, 2, 1, 0)]


def test_a_row_is_used_again_and_who_had_it_before_can_tell() -> None:
    index, entries = filled(1)
    gone = entries[0]
    index.drop(gone, "host")
    (new,) = [index.add(key_of(0), describe(0), "host", 3, 0.0)]
    assert new.row == gone.row
    assert (gone.held, new.held, gone == new) == (False, True, False)


def test_a_better_version_that_claims_another_place_makes_no_circle() -> None:
    index = Index(TIERS, Lru)
    first, second = (index.add(key_of(node), describe(node), "host", 3, 0.0) for node in (0, 1))
    after_its_child = described(second.key.chunk_hash, 2)
    index.replace(first, after_its_child)
    index.add(first.key, after_its_child, "host", 3, 0.0)
    going = []
    while (victim := index.victim("host", anything, 0.0)) is not None:
        going.append(victim.row)
        index.drop(victim, "host")
    assert len(going) == 2


def test_what_writers_asked_to_retain_goes_last_least_priority_first_until_its_time_is_over() -> None:
    index = Index(TIERS, Lru)
    order = [(5, 100.0), (1, 100.0), None, (1, 50.0), None]
    for number, hint in enumerate(order):
        key = ObjectKey(bytes(32), bytes([number]) * 32, 0)
        retention = None if hint is None else Retention(*hint)
        index.add(key, described(bytes(32), 0), "host", 3, 0.0, retention)

    def going(now_s: float, count: int) -> list[int]:
        gone = []
        for _ in range(count):
            victim = index.victim("host", anything, now_s)
            assert victim is not None
            gone.append(victim.key.chunk_hash[0])
            index.drop(victim, "host")
        return gone

    assert going(10.0, 1) == [2]
    assert going(60.0, 2) == [3, 4], "the hint of 3 has run out"
    assert going(60.0, 2) == [1, 0]


def test_a_lookup_of_nothing_is_nothing() -> None:
    index, _ = filled(3)
    rows = index.prefix(bytes(32), [b"x" * 32], 0)
    assert len(rows) == 0
    index.touch(rows, 1.0)
    assert index.prefix(b"y" * 32, [bytes(32)], 0).dtype == np.int64


def test_the_same_chunk_of_two_namespaces_or_parts_are_two_objects() -> None:
    index = Index(TIERS, Lru)
    key = key_of(0)
    for other in (key, key._replace(part=1), key._replace(namespace_id=b"\x01" * 32)):
        index.add(other, describe(0), "host", 3, 0.0)
    assert len(index) == 3
    (row,) = index.prefix(key.namespace_id, [key.chunk_hash], 1)
    assert index.key_of(row).part == 1
    assert len(index.prefix(key.namespace_id, [key.chunk_hash], 2)) == 0
    assert len(index.keys(key.namespace_id)) == 2
