"""`kvstore calibrate`: a profile out of a model and text, the same after kill -9, and one line where it cannot be."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoint
import torch
from node_process import KVSTORE, clean_environment
from polling import wait_until
from smollm2 import TEXT

import kvstore_codec as codec
from kvstore.calibrate import run as run_module
from kvstore.calibrate.model import LoadedModel, load
from kvstore.calibrate.options import WINDOW_TOKENS, CalibrationFailed, Options
from kvstore.calibrate.run import Calibrated, run
from kvstore.demo.model import NAME, wheel_gguf
from kvstore_client.integrations.transformers import kv_from_cache, layout_for
from kvstore_codec import ProfileKind
from kvstore_codec.container import KV

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
TARGET_KL = 1e-3
TOKENS, PASSES = 2 * WINDOW_TOKENS, 3
LAYERS, CHANNELS = 2, 32  # of the tiny model; channels of one plane


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A calibration sets torch's threads for its process; other tests have their own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `tiny`, texts in `texts`."""
    made = tmp_path_factory.mktemp("calibrate")
    tiny_checkpoint.save(made / "tiny")
    (made / "texts").mkdir()
    for name in ("one", "two"):
        (made / "texts" / f"{name}.txt").write_text(tiny_checkpoint.prose(12_000, len(name)))
    return made


@pytest.fixture
def options(folder: Path, tmp_path: Path) -> Callable[..., Options]:
    def with_changes(**changes: Any) -> Options:
        values: dict[str, Any] = {
            "model": folder / "tiny", "texts": (folder / "texts",), "out": tmp_path / "tiny.kvp",
            "target_kl": TARGET_KL, "tokens": TOKENS, "passes": PASSES,
        }  # fmt: skip
        return Options(**(values | changes))

    return with_changes


def calibrated(options: Options) -> Calibrated:
    return run(options, lambda stage, done, steps: None)


def command(folder: Path, out: Path, *flags: str) -> list[str]:
    return [
        str(KVSTORE), "calibrate", "--model", str(folder / "tiny"), "--text", str(folder / "texts"), "--out", str(out),
        "--target-kl", str(TARGET_KL), "--tokens", str(TOKENS), "--passes", str(PASSES), *flags,
    ]  # fmt: skip


def finished(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=240, check=False, env=clean_environment(COLUMNS="200")
    )


def held_out_kv(options: Options, text: str) -> tuple[codec.KVLayout, Any]:
    """A layout and 256 tokens of KV at positions from 0 on, of `text`."""
    loaded = load(options)
    tokens = loaded.tokenizer(text).input_ids[:256]
    return loaded.layout, kv_from_cache(loaded.prefill(tokens), loaded.layout)


def test_a_profile_from_the_command_line(folder: Path, tmp_path: Path, options: Callable[..., Options]) -> None:
    out = tmp_path / "tiny.kvp"
    done = finished(command(folder, out, "--layers-per-group", "2", "--json"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    profile = codec.Profile.load(out)
    assert report["profile_id"] == profile.profile_id.hex()
    assert report["bytes"] == out.stat().st_size
    assert report["metadata"] == profile.metadata
    assert list(tmp_path.iterdir()) == [out]  # the work folder is gone

    (group,) = profile.groups
    assert (group.kv, group.layer_first, group.layer_count) == (KV.K | KV.V, 0, LAYERS)
    assert group.channels == 2 * LAYERS * CHANNELS
    assert group.basis is not None
    basis = group.basis.astype(np.float64)
    np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=2e-3)
    assert (np.diff(group.scale_ids.astype(int)) <= 0).all()

    kl, bits = profile.metadata["kl"], profile.metadata["bits_per_element"]
    assert abs(kl["medium"] / TARGET_KL - 1) < 0.25
    assert kl["low"] > 4 * kl["medium"] > 16 * kl["high"]  # KL grows as step², steps are 9 : 3 : 1
    assert bits["low"] < bits["medium"] < bits["high"]
    assert (profile.metadata["model"], profile.metadata["tokens"]) == ("tiny", TOKENS)

    layout, kv = held_out_kv(options(), tiny_checkpoint.prose(300, 99))
    assert profile.fits(layout)
    blob = codec.encode(kv, layout, quality="high", profile=profile)
    for quality, measured in codec.inspect(blob).bits_per_element.items():
        assert abs(measured - bits[quality]) < 0.25 * bits[quality] + 0.1
    plain = codec.inspect(codec.encode(kv, layout, quality="medium")).bits_per_element["medium"]
    assert bits["medium"] < plain


def test_killed_runs_that_go_on_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.kvp", tmp_path / "killed.kvp"
    work = tmp_path / "killed.kvp.work"
    assert finished(command(folder, whole)).returncode == 0
    kept: dict[Path, int] = {}
    for stage in ("window-0003", "gradients-0001", "probe-*"):
        process = subprocess.Popen(
            command(folder, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=clean_environment()
        )
        wait_until(lambda stage=stage: any(work.glob(stage)), stage, deadline_s=120)  # type: ignore[misc]
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not killed.exists()
        there = {path: path.stat().st_mtime_ns for path in work.glob("[a-z]*/*.npy")}
        assert kept.items() < there.items()  # nothing was computed twice
        kept = there
    done = finished(command(folder, killed, "--json"))
    assert done.returncode == 0, done.stderr
    assert killed.read_bytes() == whole.read_bytes()
    assert not work.exists()


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({}, [(KV.K | KV.V, 0), (KV.K | KV.V, 1)]),
        ({"split_kv": True}, [(KV.K, 0), (KV.V, 0), (KV.K, 1), (KV.V, 1)]),
        ({"gradients": False}, [(KV.K | KV.V, 0), (KV.K | KV.V, 1)]),
        ({"kind": ProfileKind.DIAGONAL, "layers_per_group": 9}, [(KV.K | KV.V, 0)]),
        ({"kind": ProfileKind.STATISTICS}, [(KV.K | KV.V, 0)]),
    ],
    ids=["layer", "split", "noise", "diagonal", "statistics"],
)
def test_scopes_and_kinds(options: Callable[..., Options], changes: dict[str, Any], groups: list[Any]) -> None:
    asked = options(**changes)
    found = calibrated(asked)
    saved = codec.Profile.load(asked.out)
    assert saved.profile_id == found.profile.profile_id
    assert saved.kind is asked.kind
    assert [(group.kv, group.layer_first) for group in saved.groups] == groups
    assert abs(found.kl["medium"] / TARGET_KL - 1) < 0.25
    if asked.weights == "noise":  # one weight a plane
        for group in saved.groups:
            assert len(set(group.weight[:CHANNELS])) == len(set(group.weight[CHANNELS:])) == 1


def test_another_seed_is_another_profile_and_the_same_seed_the_same(options: Callable[..., Options]) -> None:
    first, again, other = (calibrated(options(seed=seed)).profile for seed in (0, 0, 1))
    assert first.profile_id == again.profile_id != other.profile_id


def test_the_work_of_another_run_is_refused(options: Callable[..., Options], tmp_path: Path) -> None:
    stopped = options(work=tmp_path / "work")

    def stop(stage: str, done: int, steps: int) -> None:
        if stage == "weighing by gradients":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stopped, stop)
    assert any((tmp_path / "work").glob("window-*"))
    with pytest.raises(CalibrationFailed, match=r"another run \(other seed\)"):
        calibrated(options(work=tmp_path / "work", seed=1))
    assert codec.Profile.from_bytes(calibrated(stopped).profile.to_bytes()).fits(load(stopped).layout)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine.txt").write_text("keep")
    with pytest.raises(CalibrationFailed, match="not empty"):
        calibrated(options(work=tmp_path / "work"))
    assert (tmp_path / "work" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": Path("/nowhere")}, "/nowhere: no model is there"),
        ({"texts": (Path("/nowhere.txt"),)}, "/nowhere.txt: cannot be read: No such file"),
        ({"tokens": 10**6}, "give more text, or lower --tokens"),
        ({"tokens": WINDOW_TOKENS, "layers_per_group": 2, "model": "wide"}, "give --tokens"),
        ({"model": "gpt2"}, "no layout is known for model type gpt2"),
        ({"model": "empty"}, "transformers cannot load this model"),
        ({"texts": "no texts"}, "in this folder: pass one with texts"),
    ],
    ids=["no-model", "no-text", "short-text", "few-tokens", "no-layout", "no-weights", "empty-folder"],
)
def test_what_cannot_be_calibrated(
    options: Callable[..., Options], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if changes.get("model") == "wide":
        changes = changes | {"model": tiny_checkpoint.save(tmp_path / "wide", head_dim=256)}
    elif changes.get("model") == "gpt2":
        changes = changes | {"model": tiny_checkpoint.save(tmp_path / "gpt2", "gpt2", n_embd=64, n_layer=2, n_head=4)}
    elif changes.get("model") == "empty":
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "config.json").write_text("{}")
        changes = changes | {"model": tmp_path / "empty"}
    elif changes.get("texts") == "no texts":
        (tmp_path / "no texts").mkdir()
        changes = changes | {"texts": (tmp_path / "no texts",)}
    with pytest.raises(CalibrationFailed, match=message) as caught:
        calibrated(options(**changes))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "message", "code"),
    [
        (["--kind", "magic"], "--kind magic: use transform, diagonal, statistics", 2),
        (["--dtype", "int8"], "--dtype int8: use auto, bfloat16", 2),
        (["--target-kl", "0"], "--target-kl must be positive", 2),
        (["--target-kl", "inf"], "--target-kl must be positive", 2),
        (["--kind", "statistics", "--split-kv"], "--kind statistics takes no", 2),
        (["--layers-per-group", "0"], "--layers-per-group", 2),
        (["--out", "/nowhere/x.kvp"], "in a folder that exists", 2),
        (["--model", "/nowhere"], "/nowhere: no model is there", 1),
    ],
)
def test_wrong_flags_get_one_line(folder: Path, tmp_path: Path, flags: list[str], message: str, code: int) -> None:
    done = finished(command(folder, tmp_path / "x.kvp", *flags))
    errors = [line for line in done.stderr.splitlines() if line.startswith("kvstore: ")]
    assert done.returncode == code
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
@pytest.mark.timeout(900)
def test_a_real_model(smollm2: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its GGUF file, of few tokens: a rough profile, which must still beat coding without one by far."""
    monkeypatch.setattr(run_module, "PROBE_WINDOWS", 2)
    asked = Options(
        wheel_gguf(), (REPOSITORY / "docs",), tmp_path / "smollm2.kvp", tokens=WINDOW_TOKENS, passes=1, model_id=NAME,
    )  # fmt: skip
    found = calibrated(asked)
    model, tokenizer = smollm2
    layout = layout_for(model)
    assert found.profile.fits(layout)  # of the same weights, loaded from a folder
    cache = LoadedModel(model, tokenizer, layout).prefill(tokenizer(TEXT).input_ids[:256])
    kv = kv_from_cache(cache, layout)
    plain = codec.inspect(codec.encode(kv, layout, quality="medium")).bits_per_element["medium"]
    blob = codec.encode(kv, layout, quality="medium", profile=found.profile)
    assert codec.inspect(blob).bits_per_element["medium"] < 0.75 * plain
    assert abs(found.kl["medium"] / asked.target_kl - 1) < 0.25
