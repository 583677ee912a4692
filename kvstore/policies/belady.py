"""Belady's optimum: what a cache of a size could hit at most, if it knew the future.

The block whose next use is the farthest goes (MIN, Belady 1966), and a newcomer that would be that block is not stored
at all. Blocks are hashes of prefixes, so a request that uses one uses all before it: no block is needed sooner than
the block before it. With ties going to the deeper block, the farthest next use is therefore always a leaf, every hit
lies in the contiguous stored prefix, and MIN with bypass is the exact optimum of block hits for blocks of equal size.
"""

from __future__ import annotations

from heapq import heappop, heappush

from kvstore.policies.replay import Outcome
from kvstore.policies.trace import Trace


def optimum(trace: Trace, capacity: int) -> Outcome:
    """`capacity`: blocks."""
    never = len(trace.requests)
    next_uses = _next_uses(trace)
    due: dict[int, int] = {}  # residents, and the request that uses each next
    farthest: list[tuple[int, int, int]] = []  # (-request, -position, block): a heap; entries may be out of date
    hits = hit_tokens = stored = evicted = 0
    for request, (blocks, uses) in enumerate(zip(trace.requests, next_uses, strict=True)):
        held = 0
        for position, (block, use) in enumerate(zip(blocks, uses, strict=True)):
            if block in due:
                held += 1
            elif use == never:
                continue
            else:
                if len(due) >= capacity:
                    while due.get(farthest[0][2]) != -farthest[0][0]:
                        heappop(farthest)
                    if (-farthest[0][0], -farthest[0][1]) <= (use, position):
                        continue
                    del due[heappop(farthest)[2]]
                    evicted += 1
                stored += 1
            due[block] = use
            heappush(farthest, (-use, -position, block))
        hits += held
        if trace.tokens:
            hit_tokens += min(held * trace.block_tokens, trace.tokens[request])
    return Outcome(
        requests=len(trace.requests), blocks=trace.blocks, hits=hits, hit_tokens=hit_tokens if trace.tokens else None,
        hits_by_quality=(hits,), stored=stored, evicted=evicted, refused=0,
    )  # fmt: skip


def _next_uses(trace: Trace) -> list[list[int]]:
    """For each request and block, the next request that uses the block, or the number of requests."""
    never = len(trace.requests)
    upcoming = [never] * trace.unique_blocks
    found: list[list[int]] = []
    for request in range(never - 1, -1, -1):
        blocks = trace.requests[request]
        found.append([upcoming[block] for block in blocks])
        for block in blocks:
            upcoming[block] = request
    found.reverse()
    return found
