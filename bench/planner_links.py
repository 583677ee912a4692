"""Emulated links for `bench.planner`, in virtual time: a rate that changes, and a latency."""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

MBIT = 1e6 / 8  # bytes a second
GBIT = 1e9 / 8
RATE_MIN, RATE_MAX = 50 * MBIT, 40 * GBIT
_WALK_STEP_S, _WALK_SIGMA = 0.1, 0.35
_WALK_STEPS = 4000


@dataclass(frozen=True)
class Link:
    """`rates[i]` bytes a second from `starts[i]` (seconds; the first is 0) to the next; the last holds for ever."""

    name: str
    starts: Sequence[float]
    rates: Sequence[float]
    latency_s: float

    @cached_property
    def _sent(self) -> list[float]:
        """Bytes that could have gone by each start."""
        sent = [0.0]
        for begin, end, rate in zip(self.starts, self.starts[1:], self.rates, strict=False):
            sent.append(sent[-1] + (end - begin) * rate)
        return sent

    def sent_by(self, at: float) -> float:
        """Bytes that could have gone by then, from 0 on."""
        index = bisect.bisect_right(self.starts, at) - 1
        return self._sent[index] + (at - self.starts[index]) * self.rates[index]

    def arrival(self, begin: float, size_bytes: float) -> float:
        """When so many bytes have gone that begin to go then."""
        target = self.sent_by(begin) + size_bytes
        index = bisect.bisect_right(self._sent, target) - 1
        return self.starts[index] + (target - self._sent[index]) / self.rates[index]


def links(deadline_s: float, latency_s: float, seed: int, walks: int) -> Iterator[Link]:
    """Fixed rates, steps at three tenths of the deadline, and random walks between RATE_MIN and RATE_MAX."""
    for label, rate in (("50M", 50 * MBIT), ("200M", 200 * MBIT), ("1G", GBIT), ("5G", 5 * GBIT), ("10G", 10 * GBIT),
                        ("40G", 40 * GBIT)):  # fmt: skip
        yield Link(f"fixed {label}", (0.0,), (rate,), latency_s)
    for label, before, after in (("10G→1G", 10 * GBIT, GBIT), ("1G→10G", GBIT, 10 * GBIT),
                                 ("1G→100M", GBIT, 100 * MBIT), ("200M→5G", 200 * MBIT, 5 * GBIT)):  # fmt: skip
        yield Link(f"step {label}", (0.0, 0.3 * deadline_s), (before, after), latency_s)
    for number in range(walks):
        yield _walk(random.Random(f"{seed} {number}"), latency_s, f"walk {number}")


def _walk(rng: random.Random, latency_s: float, name: str) -> Link:
    low, high = math.log(RATE_MIN), math.log(RATE_MAX)
    level = rng.uniform(low, high)
    rates = []
    for _ in range(_WALK_STEPS):
        rates.append(math.exp(level))
        level = min(high, max(low, level + rng.gauss(0, _WALK_SIGMA)))
    return Link(name, [_WALK_STEP_S * step for step in range(_WALK_STEPS)], rates, latency_s)
