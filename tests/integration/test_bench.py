"""The benchmarks as commands: figures that add up, round trips that are checked, one-line errors. No speeds."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from node_process import KVSTORE, clean_environment

import kvstore_codec as codec
from kvstore.cli import bench_codec
from kvstore.cli.bench_codec import Bits, Contestant, Options
from kvstore.cli.outcome import CommandFailed, ExitCode

LAYERS, TOKENS, KV_HEADS, HEAD_DIM = 4, 80, 2, 64
REPOSITORY = Path(__file__).resolve().parents[2]
ELEMENTS = LAYERS * 2 * TOKENS * KV_HEADS * HEAD_DIM


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [KVSTORE, "bench", "codec", *arguments], capture_output=True, text=True, timeout=120, check=False,
        env=clean_environment(COLUMNS="200"),
    )  # fmt: skip


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("kvstore: ")
    return lines[0]


def kv_like_values() -> npt.NDArray[np.uint16]:
    """Channels of their own mean and scale, as keys and values have: coders find something to win."""
    rng = np.random.default_rng(5)
    channels = (LAYERS, 2, 1, KV_HEADS, HEAD_DIM)
    values = rng.standard_normal((LAYERS, 2, TOKENS, KV_HEADS, HEAD_DIM)) * rng.lognormal(0, 0.5, channels)
    values += rng.standard_normal(channels)
    bits: npt.NDArray[np.uint16] = values.astype(bench_codec.BF16).view(np.uint16)
    return bits


@pytest.fixture
def kv_file(tmp_path: Path) -> Path:
    path = tmp_path / "kv.npy"
    np.save(path, kv_like_values())
    return path


def test_json_has_every_contestant_and_adds_up(kv_file: Path) -> None:
    done = run("--kv", str(kv_file), "--chunk-tokens", "32", "--rounds", "3", "--threads", "2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["kv"] == str(kv_file)
    assert report["shape"] == [LAYERS, 2, TOKENS, KV_HEADS, HEAD_DIM]
    assert (report["elements"], report["raw_bytes"]) == (ELEMENTS, 2 * ELEMENTS)
    assert report["options"]["chunk_tokens"] == 32
    assert report["options"]["threads"] == 2
    results: dict[str, Any] = {result["name"]: result for result in report["results"]}
    assert {"memcpy", "zstd-1", *bench_codec.QUALITIES} <= results.keys() <= {
        "memcpy", "zstd-1", "lz4", *bench_codec.QUALITIES,
    }  # fmt: skip
    for result in results.values():
        assert result["bits_per_element"] == pytest.approx(8 * result["encoded_bytes"] / ELEMENTS)
        assert result["ratio"] == pytest.approx(16 / result["bits_per_element"])
        for direction in (result["encode"], result["decode"]):
            assert len(direction["seconds"]) == 3
            median = sorted(direction["seconds"])[1]
            assert direction["elements_per_second"] == pytest.approx(ELEMENTS / median)
            assert direction["bytes_per_second"] == pytest.approx(2 * ELEMENTS / median)
            assert direction["to_memcpy"] > 0
            assert direction["to_zstd"] > 0
    for direction in ("encode", "decode"):
        assert results["memcpy"][direction]["to_memcpy"] == 1
        assert results["zstd-1"][direction]["to_zstd"] == 1
    assert all(results[name]["error"] == 0 for name in ("memcpy", "zstd-1", "raw", "lossless"))
    assert 0 < results["high"]["error"] < results["medium"]["error"] < results["low"]["error"]
    bits = [results[name]["bits_per_element"] for name in ("raw", "lossless", "high", "medium", "low")]
    assert bits == sorted(bits, reverse=True)


def test_sizes_are_those_of_the_public_call(kv_file: Path) -> None:
    """The last chunk is a partial one, and every chunk is coded at its own position."""
    done = run("--kv", str(kv_file), "--chunk-tokens", "32", "--rounds", "1", "--quality", "medium", "--json")
    result = next(one for one in json.loads(done.stdout)["results"] if one["name"] == "medium")
    layout = codec.KVLayout.uniform(
        model="other", revision="1", num_layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="bfloat16",
        chunk_tokens=32, rope=codec.RoPE(theta=100_000.0),
    )  # fmt: skip
    kv = kv_like_values().view(bench_codec.BF16)
    blobs = [
        codec.encode(kv[:, :, start : start + 32], layout, quality="medium", first_position=start)
        for start in (0, 32, 64)
    ]
    assert result["encoded_bytes"] == sum(map(len, blobs))


def test_tables_show_the_asked_qualities(kv_file: Path) -> None:
    done = run("--kv", str(kv_file), "--rounds", "1", "--quality", "low", "--quality", "LOSSLESS", "--quality", "low")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split("│")[1].strip() for line in done.stdout.splitlines() if line.startswith("│")]
    encode, decode = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert encode == decode
    assert [name for name in encode if name != "lz4"] == ["memcpy", "zstd-1", "low", "lossless"]
    assert f"{TOKENS} tokens, {LAYERS} layers" in done.stdout


def test_no_file_names_the_command_that_makes_one() -> None:
    done = run()
    assert done.returncode == ExitCode.USAGE
    assert "python -m bench.kv" in error_line(done)


@pytest.mark.parametrize("content", ["missing", "empty", "text", "pickle", "cut", "float32", "4 axes", "3 planes", "0"])
def test_a_wrong_file_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "wrong.npy"
    arrays: dict[str, npt.NDArray[Any]] = {
        "float32": np.zeros((2, 2, 16, 1, 16), np.float32), "4 axes": np.zeros((2, 2, 16, 16), np.uint16),
        "3 planes": np.zeros((2, 3, 16, 1, 16), np.uint16), "0": np.zeros((2, 2, 0, 1, 16), np.uint16),
    }  # fmt: skip
    if content in arrays:
        np.save(path, arrays[content])
    elif content == "pickle":
        np.save(path, np.array([{}]), allow_pickle=True)
    elif content == "cut":
        np.save(path, kv_like_values())
        path.write_bytes(path.read_bytes()[:-2])
    elif content != "missing":
        path.write_text("" if content == "empty" else "not an array\n")
    done = run("--kv", str(path))
    assert done.returncode == ExitCode.USAGE
    assert str(path) in error_line(done)


def test_values_that_cannot_be_lossy_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "nan.npy"
    bits = kv_like_values()
    bits[1, 0, 40, 0, 3] = 0x7FC0
    np.save(path, bits)
    done = run("--kv", str(path), "--rounds", "1")
    assert done.returncode == ExitCode.USAGE
    assert "NaN" in error_line(done)
    assert run("--kv", str(path), "--rounds", "1", "--quality", "lossless").returncode == 0


@pytest.mark.parametrize(
    ("option", "value", "names"),
    [("--quality", "best", "'best'"), ("--chunk-tokens", "8", "--chunk-tokens"), ("--rounds", "0", "--rounds")],
)
def test_wrong_options_are_one_line(kv_file: Path, option: str, value: str, names: str) -> None:
    done = run("--kv", str(kv_file), option, value)
    assert done.returncode == ExitCode.USAGE
    assert names in error_line(done)


def test_a_codec_that_gives_back_other_values_fails() -> None:
    """One bit wrong in one decode, once the warm-up was right."""
    chunks = [np.ascontiguousarray(kv_like_values()[:, :, :16])]
    options = Options(rounds=2)
    honest = [*bench_codec.yardsticks(chunks), *bench_codec.qualities(chunks, [0], Options(16, rounds=2))]
    assert {result.name for result in bench_codec.run(chunks, honest, options).results} >= {"memcpy", "lossless"}
    rivals = [_flips_a_bit_in_decode(one, number=2) if one.name == "lossless" else one for one in honest]
    with pytest.raises(CommandFailed, match="lossless: chunk 0 decodes to other values") as failed:
        bench_codec.run(chunks, rivals, options)
    assert failed.value.exit_code == ExitCode.PROBLEM


def test_a_lossy_decode_that_does_nothing_fails() -> None:
    chunks = [np.ascontiguousarray(kv_like_values()[:, :, :16])]
    honest = bench_codec.yardsticks(chunks)
    idle = Contestant("low", False, lambda index: b"x", lambda encoded, index: np.zeros_like(chunks[index]))
    with pytest.raises(CommandFailed, match=r"low: decoded values are off by 1\.00") as failed:
        bench_codec.run(chunks, [*honest, idle], Options(rounds=1))
    assert failed.value.exit_code == ExitCode.PROBLEM


@pytest.mark.slow
def test_the_transfer_benchmark_moves_the_same_bytes_by_every_route(tmp_path: Path) -> None:
    kv_path, figures = tmp_path / "kv.npy", tmp_path / "figures.json"
    rng = np.random.default_rng(6)
    np.save(kv_path, rng.integers(0, 1 << 16, (30, 2, 2048, 3, 64), np.uint16))  # "raw" takes any bits
    subprocess.run(
        [sys.executable, "-m", "bench.transfer", "--quick", "--kv", kv_path, "--json", figures],
        cwd=REPOSITORY, capture_output=True, timeout=120, check=True, env=clean_environment(),
    )  # fmt: skip
    reports = json.loads(figures.read_text())["reports"]
    for mib, report in zip((1, 4, 16), reports, strict=True):
        assert 0.98 * (mib << 20) < report["object_bytes"] <= mib << 20
        assert report["total_bytes"] == report["objects"] * report["object_bytes"]
        names = [result["route"] for result in report["results"]]
        assert names == ["memcpy", "bare stream", "node, RAM", "node, disk", "SDK, RAM"]
        for result in report["results"]:
            for way in (result["put"], result["fetch"]):
                assert len(way["seconds"]) == report["rounds"] == 2
                assert way["bytes_per_second"] == pytest.approx(report["total_bytes"] / (sum(way["seconds"]) / 2))


def test_a_route_that_gives_back_other_bytes_fails() -> None:
    from bench import transfer  # here, as bench/ is no part of a wheel
    from bench.routes import Objects, memcpy_route

    layout = codec.KVLayout.uniform(
        model="m", revision="1", num_layers=1, kv_heads=1, head_dim=16, dtype="uint8", chunk_tokens=16, rope=None
    )
    refs = codec.chunk_refs(layout, range(16))
    objects = Objects(layout, np.arange(16), codec.empty(layout, 16), tuple(refs), (b"what was put",))
    honest = memcpy_route(objects)
    transfer.turn(honest)
    with pytest.raises(SystemExit, match="memcpy: what was fetched is not what was put"):
        transfer.turn(dataclasses.replace(honest, fetch=lambda: [b"what was pux"]))


def _flips_a_bit_in_decode(honest: Contestant, *, number: int) -> Contestant:
    calls = 0

    def decode(encoded: Any, index: int) -> Bits:
        nonlocal calls
        calls += 1
        decoded = honest.decode(encoded, index)
        if calls == number:
            decoded[-1, -1, -1, -1, -1] ^= 1
        return decoded

    return dataclasses.replace(honest, decode=decode)
