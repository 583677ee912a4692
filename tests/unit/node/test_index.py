"""The index against a plain model of it: any order of adds, uses, leases, drops and evictions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import hypothesis.strategies as st
import kv_objects as kv
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import kvstore_codec as codec
from kvstore.index.entry import Entry, ObjectKey
from kvstore.index.index import Index

TIERS = ("host", "disk")
TOKENS = 16
HEADER = replace(codec.parse_header(kv.chunks(kv.small_layout(), 1, seed=1)[0].blob), tokens=TOKENS)

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


def header_of(node: int) -> codec.ObjectHeader:
    return replace(HEADER, chunk_hash=key_of(node).chunk_hash, first_position=POSITIONS[node] * TOKENS)


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
    last_use: int
    tiers: set[str] = field(default_factory=set)


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.leased: set[int] = set()
        self.model: dict[int, Known] = {}
        self.uses = 0
        self.index = Index(TIERS, lambda key: key.chunk_hash[0] - 1 in self.leased)

    def used(self) -> int:
        self.uses += 1
        return self.uses

    def entry(self, node: int) -> Entry:
        entry = self.index.get(key_of(node))
        assert entry is not None
        return entry

    def candidates(self, tier: str) -> list[int]:
        """Leaves of a tier that nobody leased, least recently used first."""
        held = [node for node, known in self.model.items() if tier in known.tiers]
        leaves = [node for node in held if not any(is_child(other, node) for other in held)]
        return sorted((leaf for leaf in leaves if leaf not in self.leased), key=lambda leaf: self.model[leaf].last_use)

    def forget(self, node: int, tier: str) -> None:
        self.model[node].tiers.discard(tier)
        if not self.model[node].tiers:
            del self.model[node]

    @rule(node=nodes, tier=tiers)
    def add(self, node: int, tier: str) -> None:
        entry = self.index.add(key_of(node), parent_of(node), header_of(node), tier, 0.0)
        if node not in self.model:
            self.model[node] = Known(self.used())
        self.model[node].tiers.add(tier)
        assert entry is self.index.get(key_of(node))

    @rule(node=nodes, tier=tiers)
    def drop(self, node: int, tier: str) -> None:
        entry = self.index.get(key_of(node))
        if entry is not None:
            self.index.drop(entry, tier)
            self.index.drop(entry, tier)  # idempotent
            self.forget(node, tier)

    @rule(node=nodes)
    def use_a_prefix(self, node: int) -> None:
        chain = chain_to(node)
        found = self.index.prefix(bytes(32), [key_of(each).chunk_hash for each in chain], 0)
        stored = 0
        while stored < len(chain) and chain[stored] in self.model:
            stored += 1
        assert [entry.key for entry in found] == [key_of(each) for each in chain[:stored]]
        self.index.touch(found, 1.0)
        for each in reversed(chain[:stored]):
            self.model[each].last_use = self.used()

    @rule(node=nodes)
    def lease(self, node: int) -> None:
        self.leased ^= {node}

    @rule(tier=tiers, protected=st.none() | nodes)
    def ask_for_a_victim(self, tier: str, protected: int | None) -> None:
        victim = self.index.victim(tier, lambda entry: protected is None or entry.key != key_of(protected))
        expected = [node for node in self.candidates(tier) if node != protected]
        assert (None if victim is None else victim.key) == (key_of(expected[0]) if expected else None)

    @rule(tier=tiers, count=st.integers(1, 20))
    def evict(self, tier: str, count: int) -> None:
        for _ in range(count):
            victim = self.index.victim(tier)
            expected = self.candidates(tier)
            assert (victim is None) == (not expected)
            if victim is None:
                return
            assert victim.key == key_of(expected[0])
            self.index.drop(victim, tier)
            self.forget(expected[0], tier)

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        assert len(self.index) == len(self.model)
        assert {entry.key: set(entry.tiers) for entry in self.index} == {
            key_of(node): known.tiers for node, known in self.model.items()
        }
        for node, known in self.model.items():
            entry = self.entry(node)
            assert entry.last_use == known.last_use
            assert entry.tiers == tuple(tier for tier in TIERS if tier in known.tiers), "fastest first"

    @invariant()
    def keeps_no_more_than_it_needs(self) -> None:
        assert sum(self.index._children.values()) == sum(len(known.tiers) for known in self.model.values())
        for queue in self.index._queues.values():
            assert len(queue) <= 64 + 4 * len(self.index)

    def teardown(self) -> None:
        """Without leases everything can be evicted, and then nothing is left behind."""
        self.leased.clear()
        for tier in TIERS:
            while (victim := self.index.victim(tier)) is not None:
                self.index.drop(victim, tier)
        assert len(self.index) == 0
        assert self.index._children == {}
        assert not any(self.index._queues.values())


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestIndex = pytest.mark.slow(TestIndex)


def filled(count: int) -> tuple[Index, list[Entry]]:
    """An index of one chain."""
    index = Index(TIERS)
    entries = []
    for position in range(count):
        key = ObjectKey(bytes(32), position.to_bytes(32, "big"), 0)
        header = replace(HEADER, chunk_hash=key.chunk_hash, first_position=position * TOKENS)
        parent = (position - 1).to_bytes(32, "big", signed=True)
        entries.append(index.add(key, parent, header, "host", 0.0))
    return index, entries


def test_a_chain_goes_from_its_end() -> None:
    index, entries = filled(50)
    going = []
    while (victim := index.victim("host")) is not None:
        going.append(victim)
        index.drop(victim, "host")
    assert going == entries[::-1]


def test_children_added_before_their_parents_still_protect_them() -> None:
    index = Index(TIERS)
    for node in (3, 2, 1, 0):
        index.add(key_of(node), parent_of(node), header_of(node), "host", 0.0)
    going = []
    while (victim := index.victim("host")) is not None:
        going.append(victim.key)
        index.drop(victim, "host")
    assert going == [key_of(node) for node in (3, 2, 1, 0)]


def test_uses_without_end_do_not_grow_the_queues() -> None:
    index, entries = filled(20)
    index.add(entries[-1].key, entries[-1].parent, entries[-1].header, "disk", 0.0)
    for _ in range(1000):
        index.touch(entries, 0.0)
    assert all(len(queue) <= 64 + 4 * len(index) for queue in index._queues.values())
    assert index.victim("host") is entries[-1]


def test_dropping_everything_but_one_frees_the_queue() -> None:
    index = Index(TIERS)
    entries = [
        index.add(ObjectKey(bytes(32), number.to_bytes(32, "big"), 0), bytes(32), HEADER, "host", 0.0)
        for number in range(5000)
    ]
    for entry in entries[1:]:
        index.drop(entry, "host")
    assert len(index._queues["host"]) <= 64 + 4
    assert index.victim("host") is entries[0]


def test_the_same_chunk_of_two_namespaces_or_parts_are_two_objects() -> None:
    index = Index(TIERS)
    key = key_of(0)
    for other in (key, key._replace(part=1), key._replace(namespace_id=b"\x01" * 32)):
        index.add(other, bytes(32), HEADER, "host", 0.0)
    assert len(index) == 3
    assert index.prefix(key.namespace_id, [key.chunk_hash], 1)[0].key.part == 1
    assert index.prefix(key.namespace_id, [key.chunk_hash], 2) == []
