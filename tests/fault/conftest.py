"""Redis Clusters of a test's own, and what tiers tell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from redis_process import RedisCluster
from redis_tiers import Told


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RedisCluster]:
    found = RedisCluster(tmp_path / "cluster")
    yield found
    found.stop()


@pytest.fixture
def told() -> Told:
    return Told()
