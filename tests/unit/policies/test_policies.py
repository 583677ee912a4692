"""What every policy must keep, whatever its order; and the order of the simple ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest

from kvstore.policies.base import Policy
from kvstore.policies.choice import POLICIES
from kvstore.policies.replay import fingerprint

every_policy = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES.keys())
Make = Callable[[], Policy]


@dataclass
class Forest:
    """Residents as the node's index has them, beside the policy that is tested."""

    policy: Policy
    parents: dict[int, int] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)
    made: int = 0

    def insert(self, slot: int, parent: int = -1) -> None:
        self.made += 1
        self.policy.insert(slot, fingerprint(self.made), parent, 0, 1, 0.0)
        self.parents[slot] = parent

    def chain(self, *slots: int) -> None:
        for parent, slot in zip((-1, *slots), slots, strict=False):
            self.insert(slot, parent)

    def may_go(self, slot: int) -> bool:
        assert slot in self.parents, "only residents are asked about"
        return slot not in self.held and slot not in self.parents.values()

    def victim(self) -> int | None:
        return self.policy.victim(self.may_go)

    def evict(self) -> int:
        slot = self.victim()
        assert slot is not None
        assert self.may_go(slot)
        self.remove(slot)
        return slot

    def remove(self, slot: int) -> None:
        self.policy.remove(slot)
        del self.parents[slot]


@every_policy
def test_a_chain_goes_from_its_end(make: Make) -> None:
    forest = Forest(make())
    forest.chain(3, 1, 2, 0)
    forest.policy.touch([3, 1], 1.0)
    assert [forest.evict() for _ in range(4)] == [0, 2, 1, 3]
    assert forest.victim() is None


@every_policy
def test_what_is_held_stays_until_it_is_not(make: Make) -> None:
    forest = Forest(make())
    for slot in range(8):
        forest.insert(slot)
    forest.held = set(range(8))
    assert forest.victim() is None
    forest.held = {0, 1, 2, 3, 4, 6, 7}
    assert forest.evict() == 5
    assert forest.victim() is None
    forest.held = set()
    assert sorted(forest.evict() for _ in range(7)) == [0, 1, 2, 3, 4, 6, 7]


@every_policy
def test_a_victim_stays_until_it_is_removed(make: Make) -> None:
    forest = Forest(make())
    forest.chain(0, 1)
    assert forest.victim() == forest.victim() == 1
    forest.insert(2, 1)
    assert forest.victim() == 2


@every_policy
def test_a_parent_that_is_not_held_counts_as_none(make: Make) -> None:
    forest = Forest(make())
    forest.policy.insert(0, 1, 77, 5, 1, 0.0)
    forest.parents[0] = -1
    assert forest.evict() == 0


@every_policy
@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_calls_leaves_only_evictable_leaves_as_victims(make: Make, seed: int) -> None:
    """Against a model: chains grow and fork, are used, deleted and evicted, and leases come and go."""
    random, forest = Random(seed), Forest(make())
    free = list(range(64))
    for now in range(3000):
        choice = random.random()
        if choice < 0.5 and free:
            start = random.choice([-1, *forest.parents])
            path = [start] if start >= 0 else []
            while path and forest.parents[path[-1]] >= 0:
                path.append(forest.parents[path[-1]])
            forest.policy.touch(path[::-1], float(now))
            for _ in range(random.randint(1, 5)):
                if not free:
                    break
                slot = free.pop(random.randrange(len(free)))
                forest.insert(slot, start)
                start = slot
        elif choice < 0.6:
            forest.held = set(random.sample(sorted(forest.parents), len(forest.parents) // 4))
        elif choice < 0.65:
            leaves = [slot for slot in forest.parents if slot not in forest.parents.values()]
            if leaves:
                forest.remove(leaves[0])
                free.append(leaves[0])
                forest.held.discard(leaves[0])
        else:
            may_go = [slot for slot in forest.parents if forest.may_go(slot)]
            victim = forest.victim()
            assert (victim is not None) == bool(may_go)
            if victim is not None:
                assert victim in may_go
                if random.random() < 0.9:
                    forest.remove(victim)
                    free.append(victim)


def test_lru_evicts_the_least_recently_used() -> None:
    forest = Forest(POLICIES["lru"]())
    for slot in range(4):
        forest.insert(slot)
    forest.policy.touch([0], 1.0)
    forest.policy.touch([2], 2.0)
    assert [forest.evict() for _ in range(4)] == [1, 3, 0, 2]


def test_sieve_spares_what_was_used_and_leaves_it_in_place() -> None:
    forest = Forest(POLICIES["sieve"]())
    for slot in range(4):
        forest.insert(slot)
    forest.policy.touch([0], 1.0)
    assert forest.evict() == 1
    forest.insert(9)
    assert [forest.evict() for _ in range(4)] == [2, 3, 9, 0]


def test_s3_fifo_evicts_one_hit_wonders_before_what_was_used() -> None:
    forest = Forest(POLICIES["s3-fifo"]())
    for slot in range(20):
        forest.insert(slot)
    forest.policy.touch([0], 1.0)
    assert [forest.evict() for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("name", ["2q", "s3-fifo"])
def test_what_comes_back_soon_after_eviction_is_kept_longer(name: str) -> None:
    forest = Forest(POLICIES[name]())
    for slot in range(20):
        forest.insert(slot)
    assert forest.evict() == 0
    forest.policy.insert(0, fingerprint(1), -1, 0, 1, 1.0)  # the same object again
    forest.parents[0] = -1
    assert 0 not in [forest.evict() for _ in range(10)]
