"""The formulas of calibration, each against what it must mean."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny

from kvstore.calibrate import texts, transform, weights
from kvstore.calibrate.capture import WindowKV, cache_of, captured
from kvstore.calibrate.model import LoadedModel
from kvstore.calibrate.options import LOSS_TOKENS, TAIL_TOKENS, WINDOW_TOKENS, CalibrationFailed
from kvstore.calibrate.work import WorkFolder, work_folder
from kvstore_client.integrations.transformers import layout_for
from kvstore_codec import KVLayout, LayerSpec, Profile, ProfileKind, RoPE
from kvstore_codec.container import KV
from kvstore_codec.profile import scale_ids_of
from kvstore_codec.reference.numerics import rotate
from kvstore_codec.rope import rotation_for
from kvstore_codec.segments import SegmentGroup

pytestmark = pytest.mark.slow  # torch and a model, though a tiny one
BOTH = KV.K | KV.V


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    model = tiny("llama", initializer_range=0.2)
    return LoadedModel(model, None, layout_for(model))


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(3, 32, WINDOW_TOKENS + LOSS_TOKENS)]


@pytest.fixture(scope="module")
def window(loaded: LoadedModel, tokens: list[int], tmp_path_factory: pytest.TempPathFactory) -> WindowKV:
    return captured(loaded, WorkFolder(tmp_path_factory.mktemp("work")), 0, tokens)


def test_the_captured_cache_goes_on_as_the_models_own(loaded: LoadedModel, window: WindowKV, tokens: list[int]) -> None:
    following = tokens[WINDOW_TOKENS:]
    with torch.no_grad():
        restored = loaded.log_probabilities(cache_of(window.float_pairs()), following)
        whole = loaded.model(torch.tensor([tokens])).logits[0, WINDOW_TOKENS:].log_softmax(-1)
    assert weights.mean_kl(whole, restored) < 1e-9


def test_gradients_are_turned_back_as_keys_are(window: WindowKV) -> None:
    """⟨gradient, rotated change⟩ = ⟨unrotated gradient, change⟩ for any change of the un-rotated keys."""
    rng = np.random.default_rng(1)
    gradient, change = rng.standard_normal((2, *window.planes[2].shape)).astype(np.float32)
    rotated = rotate(change, rotation_for(window.layout.layers[1], 0, WINDOW_TOKENS), inverse=False)
    unrotated = window.unrotated(2, gradient)
    np.testing.assert_allclose(
        (gradient * rotated).sum(), (unrotated * change.reshape(unrotated.shape)).sum(), rtol=1e-4
    )


def test_gradients_and_noise_measure_the_same_weights(loaded: LoadedModel, window: WindowKV, tokens: list[int]) -> None:
    """One differentiates the loss of drawn labels, the other compares distributions: nothing but the loss is shared."""
    gradients = weights.by_gradients(loaded, window, tokens, seed=1)
    noise = weights.by_noise(loaded, window, tokens, seed=1)
    for name in ("every", "steady"):
        planes = gradients[name].reshape(4, -1).mean(axis=1)
        by_noise = noise[name].reshape(4, -1)
        assert (by_noise == by_noise[:, :1]).all()
        ratio = planes / by_noise[:, 0]
        assert (ratio > 0.4).all(), ratio
        assert (ratio < 2.5).all(), ratio


def test_steady_tokens(window: WindowKV) -> None:
    planes = [plane.copy() for plane in window.planes]
    planes[3].view(np.float32)[500] *= 0.01  # a drain token of layer 1, by its V
    changed = WindowKV(window.layout, planes)
    expected = window.steady_tokens(1)
    assert expected[500]
    expected[500] = False
    np.testing.assert_array_equal(changed.steady_tokens(1), expected)
    np.testing.assert_array_equal(changed.steady_tokens(0), window.steady_tokens(0))
    assert not expected[:4].any()
    assert not expected[-TAIL_TOKENS:].any()


def test_channel_scales() -> None:
    layout = KVLayout("m", "r", "float32", 16, (LayerSpec(1, 2, 1), LayerSpec(1, 2, 1)))
    first = {"every": np.array([1.0, 3, 5, 0, 0, 2]), "steady": np.array([4.0, 4, 5, 0, 0, 2])}
    second = {"every": np.array([3.0, 5, 5, 0, 0, 2]), "steady": np.array([4.0, 0, 5, 0, 0, 2])}
    k0, v0, k1, v1 = weights.channel_scales([first, second], layout)
    w = np.sqrt([2 * 4, 4 * 2])
    np.testing.assert_allclose(k0, np.sqrt(w + 0.02 * w.mean()))
    np.testing.assert_allclose(v0, [np.sqrt(5 * 1.02) / 0.8])
    np.testing.assert_allclose(v1, [np.sqrt(2 * 1.02) / 0.8])
    assert (k1 > 0).all()  # no gradient is no licence to drop a plane
    assert (k1 < 1e-3 * k0.min()).all()


def scales(window: WindowKV) -> list[Any]:
    rng = np.random.default_rng(2)
    return [rng.uniform(0.5, 2, plane.shape[1] * plane.shape[2]) for plane in window.planes]


def test_a_transform_decorrelates_the_weighted_channels(window: WindowKV) -> None:
    group, a = SegmentGroup(BOTH, 0, 2), scales(window)
    found = transform.measure_group(group, [window, window], a, with_basis=True)
    y = (window.channels(group) - found["mean"]) * np.concatenate(a) @ found["basis"].astype(np.float64).T
    np.testing.assert_allclose(y.mean(axis=0), 0, atol=1e-3)
    variance = found["variance"]
    assert (np.diff(variance) <= 0).all()
    np.testing.assert_allclose(y.T @ y / len(y), np.diag(variance), atol=5e-3 * variance[0])
    basis = found["basis"]
    assert (basis.max(axis=1) == np.abs(basis).max(axis=1)).all()  # equal ones of both signs may share the maximum

    plain = transform.measure_group(group, [window, window], a, with_basis=False)
    assert "basis" not in plain
    weighted = window.channels(group) * np.concatenate(a)
    np.testing.assert_allclose(plain["variance"], weighted.var(axis=0), rtol=1e-4)
    np.testing.assert_allclose(plain["mean"], found["mean"], rtol=1e-6)


def folded(window: WindowKV, step: float, kind: ProfileKind = ProfileKind.TRANSFORM) -> tuple[Any, Profile]:
    groups = [
        (group, transform.measure_group(group, [window], scales(window), with_basis=kind is ProfileKind.TRANSFORM))
        for group in transform.layer_groups(window.layout, 1, split_kv=True)
    ]
    return groups, transform.fold(window.layout, kind, groups, step)


def test_folding_makes_the_base_step_one(window: WindowKV) -> None:
    measured, profile = folded(window, 0.25)
    for (_, of), group in zip(measured, profile.groups, strict=True):
        assert group.basis is not None
        np.testing.assert_allclose(group.weight, of["scale"] / 0.25, rtol=1e-6)
        y = (window.channels(group.planes) - group.mean) * group.weight @ group.basis.astype(np.float32).T
        ids = scale_ids_of(y.astype(np.float64).var(axis=0))
        assert np.abs(ids.astype(int) - group.scale_ids).max() <= 1
    assert profile.fits(window.layout)


def test_a_coarser_step_drops_components_that_no_quality_codes(window: WindowKV) -> None:
    (_, fine), (_, coarse) = folded(window, 0.25), folded(window, 64.0)
    for before, after in zip(fine.groups, coarse.groups, strict=True):
        expected = before.scale_ids.astype(int) - 32  # 8 octaves
        np.testing.assert_array_equal(after.scale_ids, expected[expected > 0])
        assert after.components < before.components
    diagonal = folded(window, 64.0, ProfileKind.DIAGONAL)[1]
    assert all(group.components == group.channels for group in diagonal.groups)


def test_layer_groups() -> None:
    layout = KVLayout.uniform(model="m", revision="r", num_layers=7, kv_heads=1, head_dim=4, rope=RoPE(1e4))
    assert transform.layer_groups(layout, 3, split_kv=False) == [
        SegmentGroup(BOTH, 0, 3), SegmentGroup(BOTH, 3, 3), SegmentGroup(BOTH, 6, 1)
    ]  # fmt: skip
    assert transform.layer_groups(layout, 99, split_kv=True) == [SegmentGroup(KV.K, 0, 7), SegmentGroup(KV.V, 0, 7)]


@pytest.mark.parametrize("kl", [1e-6, 1e-3])
def test_the_predicted_step_is_that_of_high_resolution_theory(kl: float) -> None:
    group = SegmentGroup(BOTH, 0, 1)
    loud = {"variance": np.full(50, 1e6)}
    quiet = {"variance": np.zeros(30)}
    step = transform.predicted_step([(group, loud), (group, quiet)], kl)
    assert step == pytest.approx(np.sqrt(12 * 2 * kl / (50 * (WINDOW_TOKENS - TAIL_TOKENS))), rel=1e-3)


def letters(text: str, **_: Any) -> SimpleNamespace:
    """A tokenizer of one token a letter that begins with <bos> 999, as Llama's does."""
    special = [999] if _.get("add_special_tokens", True) else []
    return SimpleNamespace(input_ids=[*special, *map(ord, text)])


def test_windows_do_not_overlap_and_come_from_every_text_by_turns() -> None:
    documents = ["".join(chr(1000 * base + index) for index in range(100)) for base in (1, 2)]
    windows = texts.windows(letters, documents, count=18, length=11, seed=3)
    assert all(window[0] == 999 and len(window) == 11 for window in windows)
    assert [window[1] // 1000 for window in windows] == [1, 2] * 9
    bodies = [token for window in windows for token in window[1:]]
    assert len(set(bodies)) == len(bodies)
    assert windows == texts.windows(letters, documents, count=18, length=11, seed=3)
    assert windows != texts.windows(letters, documents, count=18, length=11, seed=4)
    with pytest.raises(CalibrationFailed, match="hold 20 windows of 11 tokens, 21 are needed"):
        texts.windows(letters, documents, count=21, length=11, seed=3)


def test_the_digest_of_texts_keeps_them_apart() -> None:
    assert len({texts.digest_of(found) for found in (["ab"], ["a", "b"], ["b", "a"], ["a", "", "b"])}) == 4


def test_a_result_is_computed_once_and_half_a_result_again(tmp_path: Path) -> None:
    calls = []

    def compute() -> dict[str, Any]:
        calls.append(1)
        return {"a": np.arange(3), "b": np.array(0.1)}

    path = tmp_path / "work"
    (path / ".one").mkdir(parents=True)
    (path / ".one" / "a.npy").write_bytes(b"half")  # what a kill leaves
    first = WorkFolder(path).arrays("one", compute)
    (path / "identity.json").write_text('{"seed": 1}')
    with work_folder(path, {"seed": 1}) as work:
        again = work.arrays("one", compute)
        for name in ("a", "b"):
            np.testing.assert_array_equal(first[name], again[name])
    assert len(calls) == 1
    assert not path.exists()


def test_a_work_folder_serves_one_run(tmp_path: Path) -> None:
    path = tmp_path / "work"
    with (
        work_folder(path, {"seed": 1}),
        pytest.raises(CalibrationFailed, match="another calibration is at work"),
        work_folder(path, {"seed": 1}),
    ):
        raise AssertionError("two at once")
    path.mkdir()
    (path / "identity.json").write_text("nonsense")
    with pytest.raises(CalibrationFailed, match="is damaged"), work_folder(path, {"seed": 1}):
        pass
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CalibrationFailed, match="cannot be used"), work_folder(blocked, {}):
        pass
