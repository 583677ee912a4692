"""Tiers that a test opened are closed when it ends; the Redis servers under them serve all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis_objects import MakeRedis, Server
from redis_process import RedisCluster, RedisProcess
from redis_tiers import Told, flush, redis_tier

from kvstore.tiers.disk import DiskTier
from kvstore.tiers.redis import RedisTier

ROOMY = 64 << 20


@pytest.fixture
def opened() -> Iterator[list[DiskTier]]:
    """Disk tiers to be closed when the test ends."""
    tiers: list[DiskTier] = []
    yield tiers
    for tier in tiers:
        tier.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture
def reopen(root: Path, opened: list[DiskTier]) -> Callable[[], DiskTier]:
    """Ends the tier opened last and opens the next one."""

    def again() -> DiskTier:
        if opened:
            opened.pop().close()
        opened.append(DiskTier(root, ROOMY))
        return opened[-1]

    return again


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    server = RedisProcess(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    cluster = RedisCluster(tmp_path_factory.mktemp("redis-cluster"))
    yield cluster
    cluster.stop()


@pytest.fixture(params=["redis_server", "redis_cluster"])
def server(request: pytest.FixtureRequest) -> Server:
    """Empty, at the start of a test."""
    found: Server = request.getfixturevalue(request.param)
    flush(found)
    return found


@pytest.fixture
def one(redis_server: RedisProcess) -> RedisProcess:
    """The stand-alone server, for what does not depend on there being several."""
    flush(redis_server)
    return redis_server


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def make(told: Told) -> Iterator[MakeRedis]:
    tiers: list[RedisTier] = []

    def tier(on: Server, **options: Any) -> RedisTier:
        tiers.append(redis_tier(on, told, **options))
        return tiers[-1]

    yield tier
    for each in tiers:
        each.close()
