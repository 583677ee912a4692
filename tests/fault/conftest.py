"""Redis servers and Clusters of a test's own, tiers on them, and what these tell."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis_process import RedisCluster, RedisProcess
from redis_tiers import TIMEOUT_S, Told, redis_tier

from kvstore.tiers.redis import RedisTier

Launch = Callable[..., RedisProcess]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RedisCluster]:
    found = RedisCluster(tmp_path / "cluster")
    yield found
    found.stop()


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Starts a server, with options; it is gone when the test ends."""
    with contextlib.ExitStack() as started:

        def start(*options: str, **more: Any) -> RedisProcess:
            server = RedisProcess(tmp_path / "redis", *options, **more)
            started.callback(server.stop, signal.SIGKILL)
            return server

        yield start


@pytest.fixture
def server(launch: Launch) -> RedisProcess:
    return launch()


@pytest.fixture
def tier(server: RedisProcess, told: Told) -> Iterator[RedisTier]:
    found = redis_tier(server, told, timeout_s=TIMEOUT_S)
    yield found
    found.close()
