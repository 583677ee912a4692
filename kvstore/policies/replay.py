"""Replays a trace of requests against one tier and one policy, in the way that the node drives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvstore.policies.base import Policy
from kvstore.policies.trace import Trace

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Outcome:
    """`stored`: blocks that found room; `refused`: that did not, as a request alone was larger than what may go."""

    requests: int
    blocks: int
    hits: int
    hit_requests: int
    stored: int
    refused: int
    evicted: int

    @property
    def hit_rate(self) -> float:
        return self.hits / self.blocks if self.blocks else 0.0


def fingerprint(block: int) -> int:
    """64 bits that name a block, as a chunk's hash would (the finaliser of splitmix64)."""
    x = (block + 1) * _GOLDEN & _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def replay(trace: Trace, policy: Policy, capacity: int, progress: Callable[[int], None] = lambda _: None) -> Outcome:
    """`capacity`: blocks. A request uses its stored prefix and stores the rest; what it is storing may not go.

    `progress` is told how many requests are done, now and then.
    """
    slot_of: dict[int, int] = {}
    block_of: list[int] = [-1] * capacity
    parent_slot: list[int] = [-1] * capacity
    children: list[int] = [0] * capacity
    used_in: list[int] = [-1] * capacity  # request that used it last
    free = list(range(capacity - 1, -1, -1))
    hits = hit_requests = stored = refused = evicted = 0
    request = 0

    def may_go(slot: int) -> bool:
        return not children[slot] and used_in[slot] != request

    for request, (now_s, blocks) in enumerate(zip(trace.times_s, trace.requests, strict=True)):
        slots: list[int] = []
        for block in blocks:
            slot = slot_of.get(block, -1)
            if slot < 0:
                break
            slots.append(slot)
            used_in[slot] = request
        hits += len(slots)
        hit_requests += bool(slots)
        policy.touch(slots, now_s)
        parent = slots[-1] if slots else -1
        for position in range(len(slots), len(blocks)):
            block = blocks[position]
            if not free:
                victim = policy.victim(may_go)
                if victim is None:
                    refused += len(blocks) - position
                    break
                policy.remove(victim)
                del slot_of[block_of[victim]]
                if parent_slot[victim] >= 0:
                    children[parent_slot[victim]] -= 1
                free.append(victim)
                evicted += 1
            slot = free.pop()
            slot_of[block] = slot
            block_of[slot], parent_slot[slot], children[slot], used_in[slot] = block, parent, 0, request
            if parent >= 0:
                children[parent] += 1
            policy.insert(slot, fingerprint(block), parent, position, 1, now_s)
            stored += 1
            parent = slot
        if request % 256 == 0:
            progress(request)
    progress(len(trace.requests))
    return Outcome(len(trace.requests), sum(map(len, trace.requests)), hits, hit_requests, stored, refused, evicted)
