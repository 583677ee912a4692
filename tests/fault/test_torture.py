"""Twenty kills of the torture test; `make torture LOOPS=100` runs more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torture

LOOPS = 20


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_at_any_instant_corrupts_nothing_loses_nothing_durable_and_leaves_nothing_over(tmp_path: Path) -> None:
    counts = torture.run(tmp_path, LOOPS, seed=20260)
    print(dict(counts))
    assert {name: counts[name] for name in torture.FAULTS} == dict.fromkeys(torture.FAULTS, 0)
    assert counts["kills"] == LOOPS
    assert counts["cut_off"] == LOOPS * torture.WRITERS, "every kill cut a writer off"
    for name in ("durable", "deletes", "reads", "reads after kills"):
        assert counts[name] > LOOPS, f"too few {name} to mean anything"
