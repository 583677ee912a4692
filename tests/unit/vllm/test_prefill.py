"""The engine's prefill speed, by a clock of our own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvstore_client.integrations.vllm.prefill import PROMPT_TOKENS_MIN, STEPS, PrefillSpeed, attention_growth

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


class Engine:
    def __init__(self, growth: float = 0.0) -> None:
        self.now_s = 100.0
        self.speed = PrefillSpeed(growth, lambda: self.now_s)

    def step(self, prompts: list[tuple[int, int]], tokens: int, seconds: float) -> None:
        self.speed.scheduled(prompts, tokens)
        self.now_s += seconds
        self.speed.ended()

    def seconds(self, first: int, last: int) -> float:
        assert self.speed.cost is not None
        return self.speed.cost(first, last)


def test_nothing_is_known_before_a_prompt_was_computed() -> None:
    engine = Engine()
    assert engine.speed.cost is None
    engine.step([], 64, 0.1)  # decodes
    engine.step([(0, PROMPT_TOKENS_MIN - 1)], PROMPT_TOKENS_MIN - 1, 0.1)
    engine.step([(0, 200)], 401, 0.1)  # mostly decodes
    engine.step([], 0, 0.1)
    assert engine.speed.cost is None
    engine.step([(0, 1000)], 1000, 0.5)
    assert engine.seconds(0, 4000) == pytest.approx(2.0)


def test_what_is_decoded_beside_a_prompt_is_work_too() -> None:
    engine = Engine()
    engine.step([(0, 900), (100, 60)], 1000, 0.5)
    assert engine.seconds(0, 1000) == pytest.approx(0.5)


def test_a_step_that_stalled_moves_nothing_and_old_steps_are_forgotten() -> None:
    engine = Engine()
    for seconds in (1.0, 1.0, 30.0):
        engine.step([(0, 1000)], 1000, seconds)
    assert engine.seconds(0, 1000) == pytest.approx(1.0)
    for _ in range(STEPS):
        engine.step([(0, 1000)], 1000, 4.0)
    assert engine.seconds(0, 1000) == pytest.approx(4.0)


def test_idle_time_and_the_step_before_are_no_part_of_a_step() -> None:
    engine = Engine()
    engine.now_s += 60.0
    engine.step([(0, 1000)], 1000, 0.5)
    # A scheduler that is ahead: both are scheduled before the first ends.
    engine.speed.scheduled([(0, 1000)], 1000)
    engine.speed.scheduled([(1000, 1000)], 1000)
    for _ in range(2):
        engine.now_s += 0.5
        engine.speed.ended()
    assert list(engine.speed._rates) == pytest.approx([2000.0] * 3)


def test_attention_makes_later_tokens_dearer() -> None:
    growth = 1e-3
    engine = Engine(growth)
    engine.step([(0, 1000)], 1000, 1.0)  # 1,000 tokens and half a million pairs: work of 1,500
    assert engine.seconds(0, 1000) == pytest.approx(1.0, rel=1e-3)
    assert engine.seconds(1000, 2000) == pytest.approx(2500 / 1500, rel=1e-3)
    engine.step([(1000, 1000)], 1000, 2500 / 1500)  # the same engine, as it shows itself further on
    assert list(engine.speed._rates) == pytest.approx([1500.0, 1500.0])


@pytest.mark.parametrize(
    ("config", "growth"),
    [
        # 4·H·d FLOPs a pair against 2·P: 16,384 / (2 · 218.1 M)
        (LLAMA_8B, 4 * 32 * 128 / (2 * 218_103_808)),
        ({**LLAMA_8B, "num_experts_per_tok": 2}, 0.0),
        ({**LLAMA_8B, "intermediate_size": None}, 0.0),
        ({}, 0.0),
    ],
)
def test_growth_by_configuration(config: dict[str, Any], growth: float) -> None:
    assert attention_growth(SimpleNamespace(**config), 128) == pytest.approx(growth)
