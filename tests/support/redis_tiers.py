"""Redis tiers on the servers of redis_process.py, and what they told while they were used."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from redis_process import RedisCluster, RedisProcess

from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_connection import CALL_TIMEOUTS, Credentials
from kvstore.tiers.redis_server import FailureKind
from kvstore.tiers.redis_url import parse_redis_urls
from kvstore_client.circuit import PAUSE_S_MAX, State

TIMEOUT_S = 0.2  # of the tiers under faults
SLACK_S = 0.4  # for a busy machine to schedule us
CALL_S_MAX = CALL_TIMEOUTS * TIMEOUT_S + SLACK_S
RECOVERY_S_MAX = PAUSE_S_MAX + CALL_S_MAX
R = TypeVar("R")


@dataclass
class Told:
    """An `Events` that remembers."""

    failures: Counter[tuple[str, FailureKind]] = field(default_factory=Counter)
    damages: Counter[str] = field(default_factory=Counter)
    circuits: list[State] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def failed(self, operation: str, kind: FailureKind, problem: str) -> None:
        self.failures[operation, kind] += 1
        self.problems.append(problem)

    def damaged(self, reason: str) -> None:
        self.damages[reason] += 1

    def circuit(self, server: str, state: State) -> None:
        self.circuits.append(state)

    def kinds(self) -> set[FailureKind]:
        return {kind for _, kind in self.failures}


NOTHING = Credentials()


class Addressed(Protocol):
    """Something that a redis_url leads to."""

    url: str


def redis_tier(
    server: Addressed, told: Told | None = None, *, credentials: Credentials = NOTHING, **options: Any
) -> RedisTier:
    """A tier on `server`; its jitter follows from a seed."""
    options.setdefault("cluster", isinstance(server, RedisCluster))
    options.setdefault("rng", random.Random(1))
    return RedisTier(parse_redis_urls(server.url), credentials, told or Told(), **options)


def flush(server: RedisProcess | RedisCluster) -> None:
    for each in server.masters if isinstance(server, RedisCluster) else [server]:
        each.client.flushall()


def bounded(call: Callable[[], R]) -> R:
    """What a call returns or raises; it may not take longer than promised."""
    start_s = time.monotonic()
    try:
        return call()
    finally:
        took_s = time.monotonic() - start_s
        assert took_s < CALL_S_MAX, f"took {took_s:.2f} s"
