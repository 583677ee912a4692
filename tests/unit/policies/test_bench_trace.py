"""`kvstore bench trace`, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvstore.cli.app import run
from kvstore.cli.outcome import ExitCode
from kvstore.policies.choice import POLICIES
from kvstore.policies.workloads import WORKLOADS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    trace = WORKLOADS[0].trace(seed=2, requests=150)
    written = [
        {"timestamp": 1000 * time_s, "hash_ids": blocks, "input_length": 512 * len(blocks)}
        for time_s, blocks in zip(trace.times_s, trace.requests, strict=True)
    ]
    made = tmp_path / "trace.jsonl"
    made.write_text("".join(json.dumps(request) + "\n" for request in written))
    return made


def test_it_reports_every_policy_beside_the_optimum(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--capacity", "5%", "--capacity", "64MiB", "--block-bytes", "1MiB"]
    assert run(["bench", "trace", str(path), *sizes, "--degrade", "--json"]) == ExitCode.OK
    report = json.loads(capsys.readouterr().out)
    results = report["results"]
    assert {result["policy"] for result in results} == {*POLICIES, "belady"}
    assert {result["capacity_blocks"] for result in results} == {report["unique_blocks"] * 5 // 100, 64}
    best = {result["capacity"]: result["hit_rate"] for result in results if result["policy"] == "belady"}
    for result in results:
        assert result["token_hit_rate"] == pytest.approx(result["hit_rate"])
        assert sum(result["hits_by_quality"].values()) == result["hits"]
        if result["floor"] == "high":
            assert result["hit_rate"] <= best[result["capacity"]] <= report["infinite_hit_rate"]
    of_lru = {
        result["floor"]: result["hits"]
        for result in results
        if result["policy"] == "lru" and result["capacity"] == "64MiB"
    }
    assert of_lru["high"] < of_lru["medium"] < of_lru["low"]


def test_it_prints_a_table_and_draws_a_plot(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.png"
    assert run(["bench", "trace", str(path), "--policy", "lru", "--plot", str(plot)]) == ExitCode.OK
    printed = capsys.readouterr().out
    assert "belady (optimum)" in printed
    assert "lru" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--policy", "mru"], "--policy mru: there are lru,"),
        (["--capacity", "1GiB"], "with --block-bytes"),
        (["--capacity", "many", "--block-bytes", "1MiB"], "--capacity 'many': must be bytes"),
        (["--capacity", "0%"], "holds no block"),
        (["--plot", "plot.doc"], "name the plot .png"),
        (["--plot", "/nowhere/plot.png"], "the folder does not exist"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    path: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "trace", str(path), *options]) == ExitCode.USAGE
    shown = capsys.readouterr().err.strip()
    assert says in shown
    assert "\n" not in shown


def test_a_file_that_is_no_trace_is_a_wrong_argument(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace.jsonl").write_text("hello\n")
    assert run(["bench", "trace", str(tmp_path / "trace.jsonl")]) == ExitCode.USAGE
    assert "line 1: not JSON" in capsys.readouterr().err
