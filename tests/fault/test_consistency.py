"""Fifteen seconds each of the consistency test; `python -m consistency --seconds 600` (tests/support) runs longer."""

from __future__ import annotations

from pathlib import Path

import consistency
import pytest

SECONDS = 15
OF_THE_NODE = (
    "node.evictions.host.capacity", "node.evictions.disk.capacity", "node.reads.host", "node.reads.disk",
    "node.reads.redis", "node.lease_events.renewed",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [("--degrade-floor", "low"), ("--disk-write", "demote", "--eviction-policy", "lru")],
    ids=["behind, down to low", "demote"],
)
def test_a_node_that_is_always_full_gives_what_was_put_and_keeps_its_promises(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    counts = consistency.run(tmp_path, SECONDS, 20260, *flags, until=OF_THE_NODE)
    print(dict(counts))
    assert {name: counts[name] for name in consistency.FAULTS} == dict.fromkeys(consistency.FAULTS, 0)
    assert not [name for name in counts if name.startswith("node.integrity_failures")]
    for name in (
        "fetched", "decoded", "leases", "leased reads", "pinned reads", "put stored", "evicted", "deleted", "pinned",
        "verified", *OF_THE_NODE,
    ):  # fmt: skip
        assert counts[name] > 5, f"too few {name} to mean anything"
    shrunk = [count for name, count in counts.items() if name.startswith("node.degradations.")]
    assert sum(shrunk) > 10, "too little was degraded to mean anything"
