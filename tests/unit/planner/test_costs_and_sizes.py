"""What recomputing costs by position, and what an object takes by quality."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvstore_codec as codec
from kvstore_client import InvalidArgument
from kvstore_client.planner.costs import PrefillCost, prefill_seconds
from kvstore_client.planner.sizes import LayerSizes
from kvstore_codec import Quality

LLAMA_8B = {"parameters": 8.03e9, "layers": 32, "heads": 32, "head_dim": 128}


def test_the_rate_holds_for_the_prompt_that_it_was_measured_on() -> None:
    cost = PrefillCost.of_model(8000, **LLAMA_8B, measured_tokens=4096)  # type: ignore[arg-type]
    assert cost(0, 4096) == pytest.approx(4096 / 8000)
    assert cost(0, 1024) < 1024 / 8000
    assert cost(0, 32768) > 32768 / 8000


def test_attention_doubles_the_work_where_the_formulas_say() -> None:
    """4·L·H·d·p = 2·P at p = 8.03e9 / (2·32·32·128) ≈ 30,632 for Llama-3.1-8B."""
    cost = PrefillCost.of_model(8000, **LLAMA_8B, measured_tokens=1)  # type: ignore[arg-type]
    assert cost(30_632, 30_633) == pytest.approx(2 * cost(0, 1), rel=1e-3)


@given(st.floats(1, 1e6), st.floats(0, 1e-2), st.integers(1, 10_000), st.integers(1, 10_000), st.integers(1, 10_000))
def test_costs_add_up_and_grow_with_the_position(rate: float, growth: float, a: int, b: int, c: int) -> None:
    cost = PrefillCost(rate, growth)
    assert cost(0, a) + cost(a, a + b) == pytest.approx(cost(0, a + b))
    assert cost(c, c + a) >= cost(0, a) * (1 - 1e-9)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(InvalidArgument):
        prefill_seconds(rate)


def test_sizes_are_learnt_from_a_header() -> None:
    layout = codec.KVLayout.uniform(
        model="m", revision="r", num_layers=2, kv_heads=2, head_dim=32, dtype="float16", chunk_tokens=64
    )
    kv = np.random.default_rng(0).standard_normal((2, 2, 64, 2, 32)).astype(np.float16)
    header = codec.parse_header(codec.encode(kv, layout, quality="high", first_position=0))
    sizes = LayerSizes()
    sizes.learn(header)
    for quality, size in sizes.choices(Quality.HIGH, header.object_bytes, Quality.RAW, Quality.LOW).items():
        assert size == header.length_for(quality)
    assert list(sizes.choices(Quality.HIGH, 1000, Quality.RAW, Quality.LOW)) == [
        Quality.LOW,
        Quality.MEDIUM,
        Quality.HIGH,
    ]
    assert list(sizes.choices(Quality.HIGH, 1000, Quality.RAW, Quality.MEDIUM)) == [Quality.MEDIUM, Quality.HIGH]
    assert sizes.choices(Quality.LOSSLESS, 1000, Quality.RAW, Quality.LOW) == {Quality.LOSSLESS: 1000}
