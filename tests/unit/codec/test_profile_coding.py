"""Coding with profiles: all implementations agree, every quality is a prefix, and only the right profile decodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from coders import EVERY
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_strategies import bits, random_kv

import kvstore_codec as codec
from kvstore_codec.container import KV, CodecId
from kvstore_codec.profile import scale_ids_of

LAYOUT = codec.KVLayout.uniform(
    model="m", revision="r", num_layers=3, kv_heads=2, head_dim=8, chunk_tokens=64, rope=codec.RoPE(10000.0)
)
GROUPS = {
    "joint": [(KV.K | KV.V, 0, 3)],
    "by layer": [(KV.K | KV.V, layer, 1) for layer in range(3)],
    "apart": [(KV.K, 0, 2), (KV.K, 2, 1), (KV.V, 0, 3)],
}


def profile(kind: codec.ProfileKind, groups: str, seed: int, kept: float = 1.0) -> codec.Profile:
    """Orthonormal bases of random turns, with the scales that `random_kv` has in them."""
    rng = np.random.default_rng(seed)
    made = []
    for kv, first, count in GROUPS[groups]:
        channels = count * 16 * (2 if kv == KV.K | KV.V else 1)
        basis = None
        if kind is codec.ProfileKind.TRANSFORM:
            rows = max(1, int(channels * kept))
            basis = np.linalg.qr(rng.standard_normal((channels, channels)))[0][:rows].astype(np.float16)
        components = channels if basis is None else len(basis)
        made.append(
            codec.ProfileGroup(
                kv, first, count, mean=rng.standard_normal(channels).astype(np.float32),
                weight=np.exp2(rng.uniform(-2, 2, channels)).astype(np.float32), basis=basis,
                scale_ids=scale_ids_of(np.exp2(np.sort(rng.uniform(-8, 12, components))[::-1])),
            )
        )  # fmt: skip
    return codec.Profile(kind, codec.model_id_of(LAYOUT), tuple(made), {})


@given(
    st.sampled_from(list(codec.ProfileKind)), st.sampled_from(list(GROUPS)), st.integers(1, 64), st.integers(0, 2**32),
    st.sampled_from([0, 2, 5000]), st.sampled_from([0.3, 1.0, 3.0]),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_all_coders_agree(
    kind: codec.ProfileKind, groups: str, tokens: int, seed: int, position: int, step: float
) -> None:
    kv, used = random_kv(LAYOUT, tokens, seed), profile(kind, groups, seed, kept=0.8)
    arguments: dict[str, Any] = {"quality": "high", "first_position": position, "profile": used, "step": step}
    blob = codec.encode(kv, LAYOUT, **arguments)
    assert codec.parse_header(blob).codec is CodecId.PROFILE
    assert all(codec.encode(kv, LAYOUT, coder=coder, **arguments) == blob for coder in EVERY.values())
    for quality in ("low", "medium", "high"):
        prefix = codec.truncate(blob, quality)
        restored = {bits(codec.decode(prefix, LAYOUT, profile=used, coder=coder)) for coder in EVERY.values()}
        assert len(restored) == 1
        coarse = codec.encode(kv, LAYOUT, **{**arguments, "quality": quality})
        assert len(coarse) <= len(prefix)  # a shorter table


@pytest.mark.parametrize("kind", list(codec.ProfileKind))
@pytest.mark.parametrize("groups", GROUPS)
def test_error_falls_threefold_with_each_quality(kind: codec.ProfileKind, groups: str) -> None:
    kv, used = random_kv(LAYOUT, 64, 8), profile(kind, groups, 8)
    kv[...] = np.random.default_rng(1).standard_normal(kv.shape).astype(kv.dtype) * 8
    used = codec.Profile(
        kind, used.model_id,
        tuple(
            codec.ProfileGroup(
                g.kv, g.layer_first, g.layer_count, g.mean, np.full_like(g.weight, 0.5), g.basis,
                np.full_like(g.scale_ids, 32),
            )
            for g in used.groups
        ), {},
    )  # fmt: skip
    blob = codec.encode(kv, LAYOUT, quality="high", first_position=10, profile=used)
    errors = []
    for quality in ("low", "medium", "high"):
        restored = codec.decode(blob, LAYOUT, quality=quality, profile=used)
        errors.append(float(np.sqrt(np.mean((restored.astype(np.float64) - kv.astype(np.float64)) ** 2))))
    # A uniform quantiser of step 1/weight, by weight 2: 2/√12; then a third; the last meets bfloat16's own rounding.
    assert errors[0] == pytest.approx(2 / 12**0.5, rel=0.1)
    assert errors[1] == pytest.approx(errors[0] / 3, rel=0.1)
    assert errors[2] < errors[1] / 2


def test_only_the_profile_that_it_names_decodes_an_object() -> None:
    kv, used = random_kv(LAYOUT, 64, 1), profile(codec.ProfileKind.DIAGONAL, "joint", 1)
    blob = codec.encode(kv, LAYOUT, quality="medium", profile=used)
    other = profile(codec.ProfileKind.DIAGONAL, "joint", 2)
    for wrong in (None, other):
        with pytest.raises(codec.ProfileMissing, match=used.profile_id.hex()):
            codec.decode(blob, LAYOUT, profile=wrong)
    plain = codec.encode(kv, LAYOUT, quality="medium")
    assert bits(codec.decode(plain, LAYOUT, profile=other)) == bits(codec.decode(plain, LAYOUT))


def test_a_profile_of_another_model_is_refused() -> None:
    other = codec.KVLayout.uniform(
        model="n", revision="r", num_layers=3, kv_heads=2, head_dim=8, chunk_tokens=64, rope=codec.RoPE(10000.0)
    )
    with pytest.raises(codec.ProfileError, match="another model"):
        codec.encode(random_kv(other, 16, 1), other, profile=profile(codec.ProfileKind.STATISTICS, "joint", 1))


def test_exact_qualities_do_not_need_it() -> None:
    kv, used = random_kv(LAYOUT, 64, 1), profile(codec.ProfileKind.TRANSFORM, "joint", 1)
    for quality in ("raw", "lossless"):
        blob = codec.encode(kv, LAYOUT, quality=quality, profile=used)
        assert blob == codec.encode(kv, LAYOUT, quality=quality)


@pytest.mark.parametrize("kind", list(codec.ProfileKind))
@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0**61])
def test_values_that_no_profile_takes_are_refused(kind: codec.ProfileKind, bad: float) -> None:
    kv = random_kv(LAYOUT, 64, 3)
    kv[2, 1, 30, 1, 5] = bad
    for coder in EVERY.values():
        with pytest.raises(codec.ValuesError, match="lossless"):
            codec.encode(kv, LAYOUT, profile=profile(kind, "joint", 1), coder=coder)


def test_learned_statistics_make_small_pages_smaller() -> None:
    rng = np.random.default_rng(5)
    scale, mean = np.exp2(rng.integers(-3, 4, (3, 2, 1, 2, 8))), 4 * rng.standard_normal((3, 2, 1, 2, 8))
    layout = codec.KVLayout.uniform(model="m", revision="r", num_layers=3, kv_heads=2, head_dim=8, chunk_tokens=16)
    pages = []
    for _ in range(6):
        page = codec.empty(layout, 16)
        page[...] = rng.standard_normal(page.shape) * scale + mean
        pages.append(page)
    used = codec.learn_statistics([(page, 100 * (i + 1)) for i, page in enumerate(pages[:4])], layout)
    for page in pages[4:]:
        alone = codec.encode(page, layout, quality="medium", first_position=1000)
        learned = codec.encode(page, layout, quality="medium", first_position=1000, profile=used)
        assert len(learned) < len(alone)
