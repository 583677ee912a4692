"""Made traces of the kinds of use that recorded traces lack, so that a policy is not judged by two of them alone.

Each is seeded and drawn from a handful of named quantities. What they stand for: agents (chains that grow by a tool
call every few seconds, with branches in parallel), retrieval (a few hot documents behind a shared prompt, in varying
order), scans (a batch job reads everything once, beside conversations), tenants (conversations, agents and retrieval
at once) and shift (what is popular changes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, count
from random import Random

from kvstore.policies.trace import Trace, number

Request = tuple[float, list[int], None]
Make = Callable[[Random, int], Iterator[Request]]


@dataclass(frozen=True)
class Workload:
    """A name for the table, and what makes `requests` requests from a seed."""

    name: str
    make: Make

    def trace(self, seed: int = 0, requests: int = 6000) -> Trace:
        made = sorted(self.make(Random(seed), requests), key=lambda request: request[0])
        return number(self.name, made[:requests])


def agentic(
    random: Random, requests: int, *, prompts: int = 12, prompt_blocks: int = 12, steps_mean: float = 15.0,
    step_blocks_mean: float = 3.0, step_s_mean: float = 8.0, branch_share: float = 0.15, starts_s_mean: float = 6.0,
) -> Iterator[Request]:  # fmt: skip
    """Agents start from one of a few system prompts; every step extends the chain; some steps fork subagents."""
    blocks = count()
    shared = [[next(blocks) for _ in range(prompt_blocks)] for _ in range(prompts)]
    popularity = _zipf(prompts, 1.0)
    started, made = 0.0, 0
    while made < requests:
        started += random.expovariate(1 / starts_s_mean)
        chain = random.choices(shared, cum_weights=popularity)[0] + _new(blocks, random, 6.0)
        pending = [(started, chain, 1 + int(random.expovariate(1 / steps_mean)))]
        while pending:
            now, chain, steps = pending.pop()
            for _ in range(steps):
                yield now, [*chain, next(blocks)], None  # the last block is partial: it will never be a prefix
                made += 1
                if random.random() < branch_share:
                    pending.append((now, chain + _new(blocks, random, step_blocks_mean), steps // 3))
                now += random.expovariate(1 / step_s_mean)
                chain = chain + _new(blocks, random, step_blocks_mean)


def retrieval(
    random: Random, requests: int, *, documents: int = 600, blocks_mean: float = 8.0, per_request: int = 3,
    skew: float = 1.0, arrivals_s_mean: float = 0.5,
) -> Iterator[Request]:  # fmt: skip
    """A prompt, then documents by Zipf popularity, best first or not: each order is another chain. Then a question."""
    blocks = count()
    prompt = _new(blocks, random, 6.0)
    popularity = _zipf(documents, skew)
    lengths = [1 + int(random.expovariate(1 / blocks_mean)) for _ in range(documents)]
    known: dict[tuple[int, ...], list[int]] = {}
    now = 0.0
    for _ in range(requests):
        now += random.expovariate(1 / arrivals_s_mean)
        chosen = list(dict.fromkeys(random.choices(range(documents), cum_weights=popularity, k=per_request)))
        chain = list(prompt)
        for place in range(1, len(chosen) + 1):
            after = tuple(chosen[:place])
            if after not in known:
                known[after] = [next(blocks) for _ in range(lengths[chosen[place - 1]])]
            chain += known[after]
        yield now, [*chain, next(blocks)], None


def conversations(
    random: Random, requests: int, *, first_blocks_mean: float = 12.0, turn_blocks_mean: float = 4.0,
    goes_on: float = 0.55, think_s_mean: float = 90.0, starts_s_mean: float = 0.6,
) -> Iterator[Request]:  # fmt: skip
    """People talk behind one system prompt; after every answer they go on with the same probability, or leave."""
    blocks = count()
    prompt = [next(blocks), next(blocks)]
    started, made = 0.0, 0
    while made < requests:
        started += random.expovariate(1 / starts_s_mean)
        now, chain = started, prompt + _new(blocks, random, first_blocks_mean)
        while True:
            yield now, [*chain, next(blocks)], None
            made += 1
            if random.random() >= goes_on:
                break
            now += 5 + random.gammavariate(2.0, think_s_mean / 2)
            chain = chain + _new(blocks, random, turn_blocks_mean)


def scans(random: Random, requests: int) -> Iterator[Request]:
    """Conversations, and twice a batch job that reads long documents once each, as fast as it can."""
    talk = list(conversations(random, requests * 3 // 4))
    yield from talk
    blocks = count(1 << 40)
    for start in (talk[len(talk) // 3][0], talk[2 * len(talk) // 3][0]):
        for job in range(requests // 8):
            yield start + 0.4 * job, [next(blocks) for _ in range(60)], None


def tenants(random: Random, requests: int) -> Iterator[Request]:
    """Conversations, agents and retrieval at once."""
    kinds: tuple[Make, ...] = (conversations, agentic, retrieval)
    for tenant, make in enumerate(kinds):
        for now, chain, tokens in make(random, requests // 3):
            yield now, [block + (tenant << 40) for block in chain], tokens


def shift(random: Random, requests: int, *, phases: int = 4) -> Iterator[Request]:
    """Retrieval whose documents are replaced by others, phase after phase."""
    begins = 0.0
    for phase in range(phases):
        now = begins
        for now, chain, tokens in retrieval(random, requests // phases, documents=200):
            yield begins + now, [block + (phase << 40) for block in chain], tokens
        begins += now


WORKLOADS = tuple(Workload(make.__name__, make) for make in (agentic, retrieval, conversations, scans, tenants, shift))


def _new(blocks: Iterator[int], random: Random, mean: float) -> list[int]:
    return [next(blocks) for _ in range(1 + int(random.expovariate(1 / mean)))]


def _zipf(items: int, skew: float) -> list[float]:
    return list(accumulate(1 / (rank + 1) ** skew for rank in range(items)))
