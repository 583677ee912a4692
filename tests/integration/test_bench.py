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
from small_profiles import transform_profile

import kvstore_codec as codec
from kvstore.cli import bench_codec, bench_rivals, bench_rounds, bench_transform
from kvstore.cli.bench_codec import Options
from kvstore.cli.bench_rivals import Material
from kvstore.cli.bench_rounds import BF16, Contestant
from kvstore.cli.bench_symbols import DIGIT_MODELS, symbols_by_quality
from kvstore.cli.outcome import CommandFailed, ExitCode
from kvstore_codec import Quality, tables
from kvstore_codec.native import NativeCoder

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
    bits: npt.NDArray[np.uint16] = values.astype(BF16).view(np.uint16)
    return bits


@pytest.fixture
def kv_file(tmp_path: Path) -> Path:
    path = tmp_path / "kv.npy"
    np.save(path, kv_like_values())
    return path


def test_json_has_every_contestant_and_adds_up(kv_file: Path) -> None:
    done = run("--kv", str(kv_file), "--chunk-tokens", "32", "--rounds", "3", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["kv"] == str(kv_file)
    assert report["shape"] == [LAYERS, 2, TOKENS, KV_HEADS, HEAD_DIM]
    assert (report["elements"], report["raw_bytes"]) == (ELEMENTS, 2 * ELEMENTS)
    assert report["options"]["chunk_tokens"] == 32
    assert report["options"]["threads"] == [1, 2]
    assert (report["isa"], report["transform"]) == (NativeCoder().isa, None)
    results: dict[str, Any] = {result["name"]: result for result in report["results"]}
    coded = [quality for quality in bench_codec.QUALITIES if quality != "raw"]
    assert results.keys() == {
        "memcpy", "raw", *coded, *(f"{quality}, 2 threads" for quality in coded),
        *(f"{coder} of {quality}" for coder in ("zstd-1", "lz4", "constriction") for quality in coded),
    }  # fmt: skip
    for name, result in results.items():
        assert result["elements"] == ELEMENTS
        assert result["bits_per_element"] == pytest.approx(8 * result["encoded_bytes"] / ELEMENTS)
        assert result["ratio"] == pytest.approx(16 / result["bits_per_element"])
        for direction in ("encode", "decode"):
            timing, memcpy = result[direction], results["memcpy"][direction]
            assert len(timing["seconds"]) == 3
            assert timing["elements_per_second"] == pytest.approx(ELEMENTS / median(timing["seconds"]))
            assert timing["bytes_per_second"] == pytest.approx(2 * ELEMENTS / median(timing["seconds"]))
            assert timing["to_memcpy"] == pytest.approx(median_ratio(memcpy["seconds"], timing["seconds"]))
            zstd = results.get(f"zstd-1 of {result['of']}")
            if zstd is None:
                assert name in ("memcpy", "raw")
                assert timing["to_zstd"] is None
            else:
                expected = median_ratio(zstd[direction]["seconds"], timing["seconds"])
                assert timing["to_zstd"] == pytest.approx(expected)
            if result["threads"] == 2:
                expected = median_ratio(results[result["of"]][direction]["seconds"], timing["seconds"])
                assert timing["to_one_thread"] == pytest.approx(expected)
                assert (timing["cpu_seconds"], timing["to_zstd_by_cpu"]) == (None, None)
            elif zstd is not None:
                expected = median_ratio(zstd[direction]["cpu_seconds"], timing["cpu_seconds"])
                assert timing["to_zstd_by_cpu"] == pytest.approx(expected)
    lossy = {"high", "medium", "low"}
    assert all(result["error"] == 0 for result in results.values() if result["coder"] != "kvstore")
    assert all(results[name]["error"] == 0 for name in ("raw", "lossless"))
    assert 0 < results["high"]["error"] < results["medium"]["error"] < results["low"]["error"]
    bits = [results[name]["bits_per_element"] for name in ("raw", "lossless", "high", "medium", "low")]
    assert bits == sorted(bits, reverse=True)
    for quality in lossy:  # the same symbols by the same tables; the codec adds means, scales and states
        assert results[f"constriction of {quality}"]["encoded_bytes"] < results[quality]["encoded_bytes"]


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    return median([a / b for a, b in zip(theirs, ours, strict=True)])


@pytest.mark.parametrize("profiled", [False, True])
def test_the_symbols_are_those_that_the_codec_codes(profiled: bool) -> None:
    """An ideal coder with the codec's tables needs nearly what the codec's streams take."""
    material = Material.cut(kv_like_values(), TOKENS, 100_000.0)
    profile = transform_profile(material.layout) if profiled else None
    chunk = material.chunks[0].view(BF16)
    first = 2048  # without sinks
    lossy = [Quality.HIGH, Quality.MEDIUM, Quality.LOW]
    found = symbols_by_quality(chunk, material.layout, [*lossy, Quality.LOSSLESS], first, profile)
    assert len(found[Quality.LOSSLESS].data) == ELEMENTS
    frequencies = np.zeros((DIGIT_MODELS + len(tables.DIGITS.freq), tables.SYMBOLS))
    frequencies[:DIGIT_MODELS] = tables.VALUES.freq
    frequencies[DIGIT_MODELS:, :3] = tables.DIGITS.freq
    for quality in lossy:
        symbols = found[quality]
        alone = symbols_by_quality(chunk, material.layout, [quality], first, profile)[quality]
        assert symbols.data.shape == alone.data.shape
        assert (symbols.data != alone.data).mean() < 1e-3  # the coarser grid, by rounding once or twice
        freq = np.maximum(frequencies[symbols.models, symbols.data], tables.SLOTS / 2**20)  # an escape and its word
        ideal_bytes = np.log2(tables.SLOTS / freq).sum() / 8
        blob = codec.encode(chunk, material.layout, quality=quality, first_position=first, profile=profile)
        assert 0.9 * len(blob) < ideal_bytes < len(blob)  # beside the streams: means, scales, states


def test_a_profile_adds_its_qualities_and_its_transform(kv_file: Path, tmp_path: Path) -> None:
    layout = Material.cut(kv_like_values(), 32, 100_000.0).layout
    path = tmp_path / "some.kvp"
    dataclasses.replace(transform_profile(layout), model_id=bytes(32)).save(path)
    done = run(
        "--kv", str(kv_file), "--chunk-tokens", "32", "--rounds", "2", "--threads", "1", "--quality", "low",
        "--quality", "lossless", "--profile", str(path), "--isa", "scalar", "--json",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["isa"], report["options"]["profile"]) == ("scalar", str(path))
    names = [result["name"] for result in report["results"] if result["coder"] == "kvstore"]
    assert names == ["low", "lossless", "low, profile"]
    assert {f"{coder} of low, profile" for coder in ("zstd-1", "lz4", "constriction")} <= {
        result["name"] for result in report["results"]
    }
    transform = report["transform"]
    channels = 2 * LAYERS * KV_HEADS * HEAD_DIM
    assert (transform["tokens"], transform["shapes"]) == (TOKENS, [[channels, channels]])
    assert transform["bytes_with"] == pytest.approx(transform["bytes_without"], rel=0.01)
    for direction in ("encode", "decode"):
        assert transform[direction]["flops_per_second"] > 0
        assert transform[direction]["to_sgemm"] > 0
    shown = run("--kv", str(kv_file), "--rounds", "1", "--quality", "low", "--profile", str(path))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "transform" in shown.stdout


def test_a_profile_of_another_shape_is_one_line(kv_file: Path, tmp_path: Path) -> None:
    layout = Material.cut(kv_like_values()[1:], 32, None).layout
    path = tmp_path / "other.kvp"
    transform_profile(layout).save(path)
    done = run("--kv", str(kv_file), "--profile", str(path))
    assert done.returncode == ExitCode.USAGE
    assert f"{path}: the profile has another number of layers" in error_line(done)
    missing = run("--kv", str(kv_file), "--profile", str(tmp_path / "missing.kvp"))
    assert "missing.kvp: No such file" in error_line(missing)


def test_sizes_are_those_of_the_public_call(kv_file: Path) -> None:
    """The last chunk is a partial one, and every chunk is coded at its own position."""
    done = run("--kv", str(kv_file), "--chunk-tokens", "32", "--rounds", "1", "--quality", "medium", "--json")
    result = next(one for one in json.loads(done.stdout)["results"] if one["name"] == "medium")
    layout = codec.KVLayout.uniform(
        model="other", revision="1", num_layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="bfloat16",
        chunk_tokens=32, rope=codec.RoPE(theta=100_000.0),
    )  # fmt: skip
    kv = kv_like_values().view(BF16)
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
    others = ["· zstd-1", "· lz4", "· constriction"]
    low, lossless = (f"{name}, 2 threads" for name in ("low", "lossless"))
    assert encode == ["memcpy", "low", low, *others, "lossless", lossless, *others]
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
    [
        ("--quality", "best", "'best'"),
        ("--chunk-tokens", "8", "--chunk-tokens"),
        ("--rounds", "0", "--rounds"),
        ("--isa", "sse", "no sse here"),
        ("--threads", "0", "--threads"),
    ],
)
def test_wrong_options_are_one_line(kv_file: Path, option: str, value: str, names: str) -> None:
    done = run("--kv", str(kv_file), option, value)
    assert done.returncode == ExitCode.USAGE
    assert names in error_line(done)


def test_a_coder_that_gives_back_other_values_fails() -> None:
    """One bit wrong in one decode, once the warm-up was right."""
    material = Material.cut(kv_like_values()[:, :, :16], 16, None)
    honest = bench_codec.contestants(material, Options(chunk_tokens=16, threads=(1,)), NativeCoder(), None)
    assert {result.name for result in bench_rounds.run(honest, 2)} >= {"memcpy", "lossless", "zstd-1 of low"}
    for name in ("lossless", "zstd-1 of low"):
        rivals = [_flips_a_bit_in_decode(one, number=2) if one.name == name else one for one in honest]
        with pytest.raises(CommandFailed, match=f"{name}: chunk 0 decodes to other values") as failed:
            bench_rounds.run(rivals, 2)
        assert failed.value.exit_code == ExitCode.PROBLEM


def test_a_lossy_decode_that_does_nothing_fails() -> None:
    material = Material.cut(kv_like_values()[:, :, :16], 16, None)
    (honest,) = bench_rivals.codecs(material, [Quality.LOW], [1], NativeCoder())
    idle = dataclasses.replace(honest, decode=lambda encoded, index: np.zeros_like(material.chunks[index]))
    with pytest.raises(CommandFailed, match=r"low: decoded values are off by 1\.00") as failed:
        bench_rounds.run([bench_rivals.memcpy(material), idle], 1)
    assert failed.value.exit_code == ExitCode.PROBLEM


def test_values_of_which_no_symbol_is_coded_have_no_coders_of_symbols() -> None:
    material = Material.cut(np.full((1, 2, 16, 1, 16), 0x3F80, np.uint16), 16, None)
    assert bench_rivals.symbol_coders(material, [Quality.RAW, Quality.LOW]) == []


def test_the_transform_is_not_timed_where_there_is_none() -> None:
    material = Material.cut(kv_like_values(), 32, None)
    profile = transform_profile(material.layout)
    group = profile.groups[0]
    plain = dataclasses.replace(group, basis=None)
    diagonal = dataclasses.replace(profile, kind=codec.ProfileKind.DIAGONAL, groups=(plain,))
    assert bench_transform.measure(material, diagonal, NativeCoder(), 1) is None


@pytest.mark.slow
def test_the_transfer_benchmark_moves_the_same_bytes_by_every_route(tmp_path: Path) -> None:
    kv_path, figures = tmp_path / "kv.npy", tmp_path / "figures.json"
    values = np.random.default_rng(6).standard_normal((30, 2, 2048, 3, 64), np.float32)
    np.save(kv_path, values.astype(BF16).view(np.uint16))
    subprocess.run(
        [sys.executable, "-m", "bench.transfer", "--quick", "--kv", kv_path, "--json", figures],
        cwd=REPOSITORY, capture_output=True, timeout=120, check=True, env=clean_environment(),
    )  # fmt: skip
    reports = json.loads(figures.read_text())["reports"]
    for mib, report in zip((1, 4, 16), reports, strict=True):
        assert 0.98 * (mib << 20) < report["object_bytes"] <= mib << 20
        assert report["total_bytes"] == report["objects"] * report["object_bytes"]
        names = [result["route"] for result in report["results"]]
        ways = ["SDK, grpc", "SDK, tcp", "SDK, unix", "SDK, shm", "SDK, tcp, high"]
        over_tls = ["bare TLS socket", "SDK, tcp, TLS"]
        names = [name for name in names if name not in ("Redis", "Mooncake")]  # which not every machine has
        assert names == ["memcpy", "bare stream", "bare socket", "node, RAM", "node, disk", *ways, *over_tls]
        for result in report["results"]:
            for way in (result["put"], result["fetch"]):
                assert len(way["seconds"]) == report["rounds"] == 2
                assert way["bytes_per_second"] == pytest.approx(report["total_bytes"] / (sum(way["seconds"]) / 2))


@pytest.mark.slow
def test_the_trace_of_a_get_adds_up(tmp_path: Path) -> None:
    kv_path, figures, drawn = tmp_path / "kv.npy", tmp_path / "figures.json", tmp_path / "trace.png"
    np.save(kv_path, np.tile(kv_like_values(), (1, 1, 8, 1, 1)))  # 640 tokens: three chunks
    subprocess.run(
        [
            sys.executable, "-m", "bench.trace_get", "--loopback", "--rounds", "1", "--kv", kv_path, "--json", figures,
            "--plot", drawn,
        ],
        cwd=REPOSITORY, capture_output=True, timeout=300, check=True,
        env=clean_environment(PYTHONPATH=str(REPOSITORY / "tests/support")),
    )  # fmt: skip
    for result in json.loads(figures.read_text()):
        trace = result["trace"]
        assert [len(trace[name]) for name in ("receiving", "decoding")] == [3, 3]
        for (on_its_way, received), (begun, done) in zip(trace["receiving"], sorted(trace["decoding"]), strict=True):
            assert 0 < trace["found"] <= on_its_way + 1e-3
            assert on_its_way < received < begun < done < trace["took"] == result["get_s"]
        slowest_s = max(result["receive_s"], result["decode_s"])
        assert result["shares"] == [pytest.approx(slowest_s / result["get_s"])]
    assert drawn.read_bytes().startswith(b"\x89PNG")


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


def test_a_streamed_run_is_timed_from_its_prefill_and_compared() -> None:
    from bench.streaming import timed

    prefill = {"began": 10.0, "computed": 12.0, "stored": 12.5, "layers": [10.5, 11.5], "bytes": 7, "kept": 32}
    decode = {"first_at": 12.25, "restored": 31, "chosen": [1, 2], "layers": [10.75, 12.0]}
    run = timed((prefill, decode), "lossless", [1, 2])
    assert (run["prefill"], run["ttft"], run["after_prefill"]) == (2.0, 2.25, 0.25)
    assert (run["first_layer"], run["last_written"], run["fetch"]) == (0.75, 1.5, None)
    stored = {name: said for name, said in decode.items() if name != "layers"}
    assert timed((prefill, {**stored, "first_at": 12.625}), "lossless", [1, 2])["fetch"] == 0.125
    with pytest.raises(SystemExit, match="lossless: went on with"):
        timed((prefill, decode), "lossless", [1, 3])
    assert timed((prefill, decode), "low", [1, 3])["same_tokens"] is False
    with pytest.raises(SystemExit, match="15 tokens were restored of 32"):
        timed((prefill, {**decode, "restored": 15}), "low", [1, 2])


def _flips_a_bit_in_decode(honest: Contestant, *, number: int) -> Contestant:
    calls = 0

    def decode(encoded: Any, index: int) -> Any:
        nonlocal calls
        calls += 1
        decoded = honest.decode(encoded, index)
        if calls == number:
            decoded.ravel()[-1] ^= 1
        return decoded

    return dataclasses.replace(honest, decode=decode)
