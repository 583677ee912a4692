"""`quality="high"` in a real engine: how far its greedy tokens are those of exact KV.

Where the two likeliest tokens are nearly as likely as each other, any rounding may turn them round, and what follows is
another text: so a prompt is compared up to the first near-tie. Each prompt is continued twice by one engine: from its
own prefix cache, which is exact, and from what it has stored at `high`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from node_process import NodeProcess
from smollm2 import CACHE, TEXT
from transformers import AutoTokenizer
from vllm_engine import BLOCK_TOKENS, EngineProcess, kv_transfer

from kvstore.demo import model

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1500)]

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 24, 4 * BLOCK_TOKENS + 30, 32
#: `high` moves a logprob by 0.014 nats in the mean (KL 1e-4); in bfloat16 the likeliest logits, between 16 and 32, have
#: steps of 0.125.
NEAR_TIE_NATS = {"float32": 0.05, "bfloat16": 0.13}
AGREEING_MIN = 0.98


@dataclass(frozen=True)
class Compared:
    """`tokens` were compared, before the first near-tie; `agreeing` of them came before the first other token, which
    was at `other_at` with that `gap`, near-tie or not."""

    tokens: int
    agreeing: int
    other_at: int | None
    gap: float | None

    @classmethod
    def of(cls, exact: list[int], lossy: list[int], gaps: list[float], near_tie: float) -> Compared:
        until = next((at for at, gap in enumerate(gaps) if gap < near_tie), len(exact))
        other = next((at for at, pair in enumerate(zip(exact, lossy, strict=True)) if pair[0] != pair[1]), None)
        agreeing = until if other is None else min(until, other)
        return cls(until, agreeing, other, None if other is None else gaps[other])


def test_a_comparison_ends_at_the_first_near_tie_and_not_before() -> None:
    exact, gaps = [1, 2, 3, 4], [1.0, 0.5, 0.01, 2.0]
    assert Compared.of(exact, [1, 2, 3, 4], gaps, 0.05) == Compared(2, 2, None, None)
    assert Compared.of(exact, [1, 2, 9, 4], gaps, 0.05) == Compared(2, 2, 2, 0.01)
    assert Compared.of(exact, [1, 9, 3, 4], gaps, 0.05) == Compared(2, 1, 1, 0.5)


@pytest.mark.parametrize("dtype", NEAR_TIE_NATS)
def test_high_agrees_up_to_the_first_near_tie(tmp_path: Path, dtype: str) -> None:
    tokens = AutoTokenizer.from_pretrained(model.model_folder(CACHE))(TEXT * 6).input_ids
    prompts = [tokens[37 * number : 37 * number + PROMPT_TOKENS] for number in range(PROMPTS)]
    node = NodeProcess(tmp_path, "--host-capacity", "1GiB")
    engine: EngineProcess | None = None
    try:
        engine = EngineProcess(
            tmp_path / "engine.log",
            kv_transfer(node.address, quality="high", lookup_s=10.0, planner=False),
            dtype=dtype,
        )
        # What was computed with all prompts at once rounds otherwise than one by one: both sides come in one batch.
        engine.generate(prompts, 1)
        engine.wait_saved(4 * BLOCK_TOKENS * PROMPTS)
        exact = engine.generate(prompts, NEW_TOKENS, gaps=True)
        engine.reset()
        lossy = engine.generate(prompts, NEW_TOKENS)
        assert exact["cached"] == lossy["cached"] == [4 * BLOCK_TOKENS] * PROMPTS
        assert engine.counters()["kvstore_vllm_loads_total{whole}"] == PROMPTS
        assert engine.stop() == 0
    finally:
        if engine is not None:
            engine.kill()
        node.kill()
    compared = [
        Compared.of(*each, NEAR_TIE_NATS[dtype])
        for each in zip(exact["tokens"], lossy["tokens"], exact["gaps"], strict=True)
    ]  # fmt: skip
    agreeing, counted = sum(each.agreeing for each in compared), sum(each.tokens for each in compared)
    print(f"{dtype}: {agreeing} of {counted} tokens agree up to the first gap under {NEAR_TIE_NATS[dtype]} nats")
    print(f"{sum(each.other_at is None for each in compared)} of {PROMPTS} answers of {NEW_TOKENS} tokens are the same")
    for each in compared:
        if each.other_at is not None:
            print(f"other token at {each.other_at}, gap {each.gap:.4f}, first near-tie at {each.tokens}")
    assert counted >= 5 * PROMPTS, "near-ties leave too little to compare"
    assert agreeing >= AGREEING_MIN * counted
