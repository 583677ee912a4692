"""The store fails while a real engine loads and saves: `make vllm-chaos` in short, see vllm_chaos.py."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import vllm_chaos

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(2400)]

REQUESTS = 112  # of each arrangement: every fault twice, every fault of both places once


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> vllm_chaos.Reference:
    return vllm_chaos.Reference.measured(tmp_path_factory.mktemp("reference"))


@pytest.fixture
def folder() -> Iterator[Path]:
    """Of a short name: unix sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="kvstore-chaos-") as name:
        yield Path(name)


@pytest.mark.parametrize("roles", [["node"], ["node", "sidecar"]], ids=["node", "sidecar"])
def test_every_request_is_answered_rightly_and_in_time_whatever_fails(
    folder: Path, reference: vllm_chaos.Reference, roles: list[str]
) -> None:
    found = vllm_chaos.run(folder, roles, reference, REQUESTS, seed=20261)
    print(f"least gap {reference.gap:.4f} nats", found.table(), sep="\n")
    assert found.problems() == dict.fromkeys(vllm_chaos.PROBLEMS, 0)
    # The faults were felt, by lookups, loads and saves, and between them there was something to disturb.
    assert found.failures("lookup")
    assert sum(found.outcomes("loads").get(outcome, 0) for outcome in ("part", "failed"))
    assert sum(found.outcomes("saves").get(outcome, 0) for outcome in ("rejected", "failed"))
    assert found.outcomes("loads")["whole"] >= REQUESTS // 4
    assert len({(batch.place, batch.fault) for batch in found.batches}) == 1 + len(vllm_chaos.FAULTS) * len(roles)
