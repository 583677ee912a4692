"""Tiers that a test opened are closed when it ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvstore.tiers.disk import DiskTier


@pytest.fixture
def opened() -> Iterator[list[DiskTier]]:
    """Disk tiers to be closed when the test ends."""
    tiers: list[DiskTier] = []
    yield tiers
    for tier in tiers:
        tier.close()
