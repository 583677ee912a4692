"""`kvstore demo` as a whole, and that each of its promises can be seen to be broken."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import smollm2
from node_process import KVSTORE, clean_environment

from kvstore.demo.run import problems

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(600)]
RESTORED = 1536  # six chunks of 256
QUALITIES = ("raw", "lossless", "high", "medium", "low")


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [KVSTORE, "demo", *arguments], capture_output=True, text=True, check=False, env=clean_environment(**variables)
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one run measured; the table went to stdout."""
    path = tmp_path_factory.mktemp("demo") / "figures.json"
    done = run("--cache", str(smollm2.CACHE), "--out", str(path))
    assert done.returncode == 0, done.stderr
    assert "1536" in done.stdout
    assert "lossless" in done.stdout
    return json.loads(path.read_text())


def test_every_quality_is_restored_and_paid_for_in_bits(report: Any) -> None:
    rows = report["rows"]
    assert all(rows[quality]["tokens"] == RESTORED for quality in QUALITIES)
    bits = [rows[quality]["bits_per_element"] for quality in QUALITIES]
    assert bits == sorted(bits, reverse=True)
    raw_bits = {"bfloat16": 16, "float32": 32}[report["dtype"]]
    assert raw_bits <= bits[0] < raw_bits + 0.1
    divergence = [rows[quality]["mean_kl"] for quality in QUALITIES]
    assert divergence[:2] == [0, 0]
    assert divergence[2:] == sorted(divergence[2:])
    assert 0 < divergence[2] < divergence[4] < 0.05
    assert report["problems"] == []


def test_a_layer_is_taken_in_while_the_prefill_computes(report: Any) -> None:
    live = report["live"]
    assert (live["prompt_tokens"], live["tokens"], live["same_logits"]) == (513, 512, True)
    written, taken = live["layers_written_seconds"], live["layers_taken_seconds"]
    assert len(written) == len(taken) == 30
    assert taken == sorted(taken)
    assert taken[0] < written[-1] <= live["prefill_seconds"]
    assert live["first_token_seconds"] >= taken[-1]


def breakages() -> dict[str, Callable[[Any], None]]:
    return {
        "lossless continues otherwise": lambda r: r["rows"]["lossless"].update(matching_tokens=63),
        "lossless differs in its logits": lambda r: r["rows"]["lossless"].update(mean_kl=1e-12),
        "lossless differs from raw": lambda r: r["rows"]["lossless"].update(kv_digest="0"),
        "a quality is missing a chunk": lambda r: r["rows"]["low"].update(tokens=RESTORED - 256),
        "a put was not durable": lambda r: r["puts"]["high"].update(durable=False),
        "a put stored less": lambda r: r["puts"]["raw"].update(tokens=256),
        "streaming left a chunk out": lambda r: r["live"].update(tokens=256),
        "streaming changed the logits": lambda r: r["live"].update(same_logits=False),
        "streaming began after the last layer": lambda r: r["live"].update(layers_taken_seconds=[1e9] * 30),
        "streaming lost a layer": lambda r: r["live"]["layers_taken_seconds"].pop(),
        "kill -9 lost an object": lambda r: r["after_restart"]["rows"]["high"].update(tokens=0),
        "kill -9 changed an object": lambda r: r["after_restart"]["rows"]["medium"].update(kv_digest="0"),
        "a dead node answered": lambda r: r["while_down"].update(tokens=1),
        "the sidecar forgot": lambda r: r["while_down"]["sidecar"].update(tokens=256),
        "a dead node held the caller up": lambda r: r["while_down"].update(seconds=60.0),
    }


@pytest.mark.parametrize("breakage", breakages())
def test_a_broken_promise_is_a_problem(report: Any, breakage: str) -> None:
    broken = copy.deepcopy(report)
    breakages()[breakage](broken)
    assert problems(broken)


def test_a_folder_that_is_not_there_is_one_line() -> None:
    done = run("--out", "/nonexistent/figures.json")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "/nonexistent" in done.stderr
