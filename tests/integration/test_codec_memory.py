"""Decoding takes little memory beside its input and output: at most 1 MiB a thread, whatever the chunk."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import decode_memory
import pytest
from decode_memory import FIRST_POSITION, KNOWN_BYTES, PEAK_RESET, WARM_UP_TOKENS, Case
from node_process import clean_environment

import kvstore_codec as codec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PEAK_RESET.exists(), reason="needs Linux's /proc/self/clear_refs"),
]

MIB = 1 << 20
#: The kernel counts pages in batches a CPU: of an allocation of known size the gauge shows up to 96 KiB less, of
#: nothing 4 KiB. Python objects of the call are in the figures as well.
SLACK = 128 << 10
SMOLLM2, SMOLLM2_LONG, LLAMA_8B = (30, 256, 3, 64), (30, 2048, 3, 64), (32, 256, 8, 128)
SMOLLM2_SHORT = (30, 16, 3, 64)

Figures = dict[str, int]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Figures]:
    """Figures of a shape, quality, number of threads and layers a profile's group, each from a process of its own."""
    folders: dict[tuple[object, ...], Path] = {}
    known: dict[tuple[object, ...], Figures] = {}

    def folder(case: Case, quality: str) -> Path:
        key = (replace(case, threads=1), quality)
        if key not in folders:
            made = folders[key] = tmp_path_factory.mktemp("objects")
            values, layout, profile = case.values(), case.layout, case.profile
            for name, tokens in (("chunk", case.tokens), ("warm-up", WARM_UP_TOKENS)):
                blob = codec.encode(
                    values[:, :, :tokens], layout, quality=quality, first_position=FIRST_POSITION, profile=profile
                )
                (made / name).write_bytes(blob)
        return folders[key]

    def measure(shape: tuple[int, int, int, int], quality: str, threads: int, profile_layers: int = 0) -> Figures:
        key = (shape, quality, threads, profile_layers)
        if key not in known:
            case = Case(*shape, threads, profile_layers, "")
            case = replace(case, folder=str(folder(case, quality)))
            done = subprocess.run(
                [sys.executable, decode_memory.__file__, json.dumps(asdict(case))],
                capture_output=True, text=True, timeout=120, check=False, env=clean_environment(),
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            known[key] = json.loads(done.stdout)
        return known[key]

    return measure


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("quality", ["raw", "lossless", "high", "low"])
@pytest.mark.parametrize("shape", [SMOLLM2, SMOLLM2_LONG, LLAMA_8B], ids=str)
def test_a_decode_takes_a_mebibyte_a_thread(
    measured: Callable[..., Figures], shape: tuple[int, int, int, int], quality: str, threads: int
) -> None:
    figures = measured(shape, quality, threads)
    assert abs(figures["known"] - KNOWN_BYTES) <= SLACK, "the gauge is wrong"
    assert figures["again"] <= threads * MIB + SLACK


def test_so_does_a_decode_of_a_short_chunk(measured: Callable[..., Figures]) -> None:
    assert measured(SMOLLM2_SHORT, "high", 1)["again"] <= MIB + SLACK


@pytest.mark.parametrize(
    ("shape", "layers"),
    [
        (SMOLLM2, 1),
        (SMOLLM2, 5),
        (LLAMA_8B, 1),
    ],
    ids=str,
)
def test_so_does_a_decode_with_a_profile(
    measured: Callable[..., Figures], shape: tuple[int, int, int, int], layers: int
) -> None:
    assert measured(shape, "high", 1, layers)["again"] <= MIB + SLACK


@pytest.mark.parametrize(
    "shape",
    [SMOLLM2, SMOLLM2_LONG, LLAMA_8B],
    ids=str,
)
def test_so_does_the_first_decode_at_a_position(
    measured: Callable[..., Figures], shape: tuple[int, int, int, int]
) -> None:
    assert measured(shape, "high", 1)["first"] <= MIB + SLACK
