"""Redis tiers on the servers of redis_process.py, and what they told while they were used."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

from redis_process import RedisCluster, RedisProcess

from kvstore.tiers.circuit import State
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_connection import Credentials
from kvstore.tiers.redis_server import FailureKind
from kvstore.tiers.redis_url import parse_redis_urls


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
