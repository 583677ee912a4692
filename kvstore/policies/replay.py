"""Replays a trace of requests against one tier and one policy, in the way that the node drives it.

Every object begins at its best quality. Where a tier may degrade, the objects used the longest ago lose their finest
quality layers, down to the coarsest of `sizes`, before the policy is asked what goes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.policies.base import Policy
from kvstore.policies.trace import Trace

_MASK = (1 << 64) - 1
PROGRESS_REQUESTS = 256


@dataclass(frozen=True)
class Outcome:
    """Hits are blocks of the contiguous stored prefix. `hit_tokens` is None where the trace has no lengths.

    `refused`: blocks without room, as their request alone was larger than what may go.
    """

    requests: int
    blocks: int
    hits: int
    hit_tokens: int | None
    hits_by_quality: tuple[int, ...]  # best first
    stored: int
    evicted: int
    refused: int

    @property
    def hit_rate(self) -> float:
        return self.hits / self.blocks if self.blocks else 0.0


def fingerprint(block: int) -> int:
    """64 bits that name a block, as a chunk's hash would (the generator splitmix64)."""
    x = (block + 1) * 0x9E3779B97F4A7C15 & _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


class _Tier:
    """What the node's index knows of one tier, for a replay: which block is in which slot, and who is a leaf."""

    def __init__(self, policy: Policy, capacity: int, sizes: Sequence[int]) -> None:
        slots = capacity // sizes[-1]
        self.policy = policy
        self.sizes = sizes
        self.room = capacity
        self.slot_of: dict[int, int] = {}
        self.quality = [0] * slots
        self.used_in = [-1] * slots  # request
        self.evicted = 0
        self.request = 0
        self._block_of = [-1] * slots
        self._parent = [-1] * slots
        self._children = [0] * slots
        self._free = list(range(slots - 1, -1, -1))
        self._finer: OrderedDict[int, None] = OrderedDict()  # than the coarsest; the longest ago used first

    def may_go(self, slot: int) -> bool:
        return not self._children[slot] and self.used_in[slot] != self.request

    def use(self, slots: Sequence[int], now_s: float) -> None:
        for slot in slots:
            self.used_in[slot] = self.request
            if slot in self._finer:
                self._finer.move_to_end(slot)
        self.policy.touch(slots, now_s)

    def store(self, block: int, parent: int, position: int, now_s: float) -> int | None:
        """Returns its slot, or None where no room can be made."""
        size = self.sizes[0]
        while self.room < size or not self._free:
            if not self._degrade() and not self._evict():
                return None
        self.room -= size
        slot = self._free.pop()
        self.slot_of[block] = slot
        self._block_of[slot], self._parent[slot], self._children[slot] = block, parent, 0
        self.quality[slot], self.used_in[slot] = 0, self.request
        if len(self.sizes) > 1:
            self._finer[slot] = None
        if parent >= 0:
            self._children[parent] += 1
        self.policy.insert(slot, fingerprint(block), parent, position, size, now_s)
        return slot

    def _degrade(self) -> bool:
        slot = next(iter(self._finer), None)
        if slot is None or self.used_in[slot] == self.request:
            return False
        quality = self.quality[slot]
        self.room += self.sizes[quality] - self.sizes[quality + 1]
        self.quality[slot] = quality + 1
        if quality + 2 == len(self.sizes):
            del self._finer[slot]
        return True

    def _evict(self) -> bool:
        slot = self.policy.victim(self.may_go)
        if slot is None:
            return False
        self.policy.remove(slot)
        del self.slot_of[self._block_of[slot]]
        self._finer.pop(slot, None)
        if self._parent[slot] >= 0:
            self._children[self._parent[slot]] -= 1
        self._free.append(slot)
        self.room += self.sizes[self.quality[slot]]
        self.evicted += 1
        return True


def replay(
    trace: Trace, policy: Policy, capacity: int, sizes: Sequence[int] = (1,),
    progress: Callable[[int], None] = lambda _: None,
) -> Outcome:  # fmt: skip
    """A request uses its stored prefix and stores the rest; what it is using may not go.

    `capacity` and `sizes` in any one unit: of an object at each quality that the tier may degrade to, best first.
    `progress` is told how many requests were done since the last time.
    """
    tier = _Tier(policy, capacity, sizes)
    by_quality = [0] * len(sizes)
    hit_tokens = stored = refused = 0
    for tier.request, (now_s, blocks) in enumerate(zip(trace.times_s, trace.requests, strict=True)):
        slots: list[int] = []
        for block in blocks:
            slot = tier.slot_of.get(block)
            if slot is None:
                break
            slots.append(slot)
            by_quality[tier.quality[slot]] += 1
        if trace.tokens:
            hit_tokens += min(len(slots) * trace.block_tokens, trace.tokens[tier.request])
        tier.use(slots, now_s)
        parent = slots[-1] if slots else -1
        for position in range(len(slots), len(blocks)):
            made = tier.store(blocks[position], parent, position, now_s)
            if made is None:
                refused += len(blocks) - position
                break
            parent = made
            stored += 1
        if (tier.request + 1) % PROGRESS_REQUESTS == 0:
            progress(PROGRESS_REQUESTS)
    progress(len(trace.requests) % PROGRESS_REQUESTS)
    return Outcome(
        requests=len(trace.requests), blocks=trace.blocks, hits=sum(by_quality),
        hit_tokens=hit_tokens if trace.tokens else None, hits_by_quality=tuple(by_quality), stored=stored,
        evicted=tier.evicted, refused=refused,
    )  # fmt: skip
