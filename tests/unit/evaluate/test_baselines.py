"""Baselines against their formulas: known answers on small arrays, bits that are all counted, bounded errors."""

from __future__ import annotations

import math

import pytest
import torch

from kvstore.evaluate import cachegen
from kvstore.evaluate.baselines import Baseline, Coded, Fp8, Int4Channel, Int8TokenHead, Kivi

LAYERS, TOKENS, HEADS, DIM = 3, 512, 2, 32
CHANNELS = HEADS * DIM


@pytest.fixture
def kv() -> torch.Tensor:
    """Channels of their own mean and scale, float32 values that bfloat16 holds."""
    random = torch.Generator().manual_seed(3)
    shape = (LAYERS, 2, 1, HEADS, DIM)
    scale, mean = torch.rand(shape, generator=random) + 0.2, torch.randn(shape, generator=random)
    values = torch.randn((LAYERS, 2, TOKENS, HEADS, DIM), generator=random) * scale + mean
    return values.bfloat16().float()


def relative_error(coded: Coded, kv: torch.Tensor) -> float:
    return float((coded.kv - kv).square().mean().sqrt() / kv.square().mean().sqrt())


def test_fp8_rounds_to_three_bits_of_mantissa_and_saturates() -> None:
    kv = torch.tensor([1.0, 1.0625, 1.07, 448.0, 1e6, -1e6, 2.0**-9]).reshape(1, 1, -1, 1, 1).expand(1, 2, -1, 1, 1)
    coded = Fp8().code(kv)
    assert coded.kv[0, 0].flatten().tolist() == [1.0, 1.0, 1.125, 448.0, 448.0, -448.0, 2.0**-9]
    assert coded.bits_per_element == 8


def test_int8_scales_every_token_and_head_by_its_largest() -> None:
    kv = torch.zeros(1, 2, 2, 1, 4)
    kv[0, 0, 0, 0] = torch.tensor([127.0, -64.0, 0.4, 0.6])
    kv[0, 0, 1, 0] = torch.tensor([1.0, -1.0, 0.5, 0.0])
    coded = Int8TokenHead().code(kv)
    assert coded.kv[0, 0, 0, 0].tolist() == [127.0, -64.0, 0.0, 1.0]
    assert coded.kv[0, 0, 1, 0].tolist() == pytest.approx([1.0, -1.0, 64 / 127, 0.0], abs=1e-3)
    assert not coded.kv[0, 1].any()
    assert dict(coded.bits) == {"codes": 8, "scales": 16 / 4}


def test_kivi_groups_keys_along_tokens_and_values_along_channels() -> None:
    """Each group is its own ramp of 2^bits levels, which the quantiser then holds exactly."""
    kv = torch.zeros(1, 2, 32, 1, 32)
    ramp = torch.arange(32) % 4
    kv[0, 0, :, 0] = ramp[:, None] * torch.arange(1, 33) + 5.0  # along tokens, a channel its own step
    kv[0, 1, :, 0] = ramp[None, :] * torch.arange(1, 33)[:, None] - 3.0
    exact = Kivi(2).code(kv)
    assert torch.equal(exact.kv, kv)
    assert dict(exact.bits) == {"codes": 2, "scales": 2 * 16 / 32}
    swapped = kv.flip(1)  # grouped the wrong way, both would lose
    assert relative_error(Kivi(2).code(swapped), swapped) > 0.05


def test_int4_has_sixteen_levels_a_channel_and_chunk(kv: torch.Tensor) -> None:
    coded = Int4Channel().code(kv)
    for chunk in (coded.kv[:, :, :256], coded.kv[:, :, 256:]):
        assert all(len(chunk[0, 0, :, 0, dim].unique()) <= 16 for dim in range(DIM))
    assert coded.bits_per_element == 4 + 32 / 256


@pytest.mark.parametrize(
    ("baseline", "bits", "error"),
    [
        (Fp8(), (8, 8), 0.03), (Int8TokenHead(), (8.5, 8.5), 0.01), (Kivi(4), (5, 5), 0.08),
        (Kivi(2), (3, 3), 0.35), (cachegen.CacheGenShipped(), (4, 7), 0.15),
    ],
)  # fmt: skip
def test_errors_and_bits_are_in_their_range(
    kv: torch.Tensor, baseline: Baseline, bits: tuple[float, float], error: float
) -> None:
    coded = baseline.code(kv)
    assert coded.kv.shape == kv.shape
    assert bits[0] <= coded.bits_per_element <= bits[1]
    assert error / 10 < relative_error(coded, kv) < error


def test_entropy_of_known_distributions() -> None:
    assert cachegen.entropy_bits(torch.zeros(2, 8, dtype=torch.long), 3) == 0
    assert cachegen.entropy_bits(torch.tensor([[0, 1, 2, 3], [0, 0, 1, 1]]), 4) == pytest.approx(4 * 2 + 4 * 1)


def test_cachegen_as_shipped_counts_what_lmcache_stores() -> None:
    """Layer 0's keys in 32 bins, layer 11's in 16: round(x · M / max) with M = 15 and 7."""
    kv = torch.zeros(12, 2, 256, 1, 4)
    kv[..., :] = torch.tensor([1.0, 0.5, -0.26, -1.0])
    coded = cachegen.CacheGenShipped().code(kv)
    assert coded.kv[0, 0, 0, 0].tolist() == pytest.approx([1, 7 / 15, -4 / 15, -1])  # 7.5 + M = 22.5, to the even 22
    assert coded.kv[11, 0, 0, 0].tolist() == pytest.approx([1, 3 / 7, -2 / 7, -1])
    assert dict(coded.bits) == {
        "payload": 0, "tables": 33 * 16 / 256, "lengths": (32 + 8) / 256, "maxima": 16 / 4,
    }  # fmt: skip


def test_cachegen_of_the_paper_codes_differences_from_the_anchor(kv: torch.Tensor) -> None:
    fine, coarse = (cachegen.CacheGenPaper(cachegen.learn([kv], factor), factor).code(kv) for factor in (0.25, 1.0))
    assert fine.bits_per_element - coarse.bits_per_element == pytest.approx(1.8, abs=0.3)  # nine tenths of 2 bits
    assert relative_error(fine, kv) < relative_error(coarse, kv) / 3
    statistics = cachegen.learn([kv], 1.0)
    anchors = coarse.kv[:, :, ::10]
    step = (statistics.anchor_max / 127).reshape(LAYERS, 2, 1, HEADS, DIM)
    assert bool(((anchors - kv[:, :, ::10]).abs() <= step / 2 + 1e-6).all())
    delta = (coarse.kv[:, :, 1] - coarse.kv[:, :, 0]) / statistics.delta_rms[:, :, None, None]
    thirds = torch.tensor([0.5, 1.0, 1.5])[:, None, None, None]
    assert torch.allclose(delta / thirds, (delta / thirds).round(), atol=1e-3)


def test_cachegen_of_the_paper_pays_for_foreign_tables(kv: torch.Tensor) -> None:
    other = kv.flip(4) * 2
    own, foreign = (cachegen.CacheGenPaper(cachegen.learn([one], 0.5), 0.5).code(kv) for one in (kv, other))
    assert math.isfinite(foreign.bits_per_element)
    assert foreign.bits_per_element != own.bits_per_element


def test_a_length_that_is_no_multiple_of_anything(kv: torch.Tensor) -> None:
    odd = kv[:, :, :263]
    for baseline in (
        Kivi(4),
        Int4Channel(),
        cachegen.CacheGenShipped(),
        cachegen.CacheGenPaper(cachegen.learn([odd], 0.5), 0.5),
    ):
        coded = baseline.code(odd)
        assert coded.kv.shape == odd.shape
        assert relative_error(coded, odd) < 0.2
