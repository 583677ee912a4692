"""Tiers that a test opened are closed when it ends; the Redis servers under them serve all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis_process import RedisCluster, RedisProcess

from kvstore.tiers.disk import DiskTier

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
