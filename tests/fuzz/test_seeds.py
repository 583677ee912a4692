"""Every input that fuzzing starts from, and every one that once was a finding, through its target: no clang needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz import native_cases, python_targets

HERE = Path(__file__).parent
TARGETS = native_cases.TARGETS | python_targets.TARGETS
SEED_BYTES_MAX = 200 << 10


def inputs() -> Iterator[Any]:
    for folder in ("seeds", "crashes"):
        for path in sorted((HERE / folder).glob("*/*")):
            yield pytest.param(path.parent.name, path, id=f"{path.parent.name}-{path.name}")


@pytest.mark.parametrize(("target", "path"), list(inputs()))
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of NumPy, on values at a float's limits
def test_replay(target: str, path: Path) -> None:
    taken = TARGETS[target](path.read_bytes())
    assert taken or not path.name.startswith("valid"), "a seed is of an older format: run `make fuzz-seeds`"


def test_every_target_has_seeds_and_they_are_small() -> None:
    seeds = [path for path in (HERE / "seeds").glob("*/*") if path.is_file()]
    assert {path.parent.name for path in seeds} == set(TARGETS)
    assert sum(path.stat().st_size for path in seeds) <= SEED_BYTES_MAX


def test_every_native_target_can_be_replayed_here() -> None:
    programs = {path.stem for path in (HERE / "native").glob("*.cpp") if "LLVMFuzzerTestOneInput" in path.read_text()}
    assert programs == set(native_cases.TARGETS)
