"""How fast the engine computes prompts, measured where its scheduler passes by: tokens of a step by the step's time."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from kvstore_client.planner.costs import PrefillCost

#: A step of fewer prompt tokens costs mostly what every step costs.
PROMPT_TOKENS_MIN = 128
#: Steps of which the median counts: one that compiled something, or that a stall held up, moves nothing.
STEPS = 9


class PrefillSpeed:
    """`growth`: as PrefillCost has it. Steps end in the order in which they were scheduled; a scheduler may be ahead of
    its workers, so a step's time begins no sooner than the end of the one before."""

    def __init__(self, growth: float, clock: Callable[[], float]) -> None:
        self._growth, self._clock = growth, clock
        self._under_way: deque[tuple[float, float]] = (
            deque()
        )  # (scheduled at, its work; 0 for a step that says nothing)
        self._ended_s = 0.0
        self._rates: deque[float] = deque(maxlen=STEPS)

    def scheduled(self, prompts: Sequence[tuple[int, int]], tokens: int) -> None:
        """A step of `tokens` tokens is about to be computed. `prompts`: (first, count) of those of prompts."""
        of_prompts = sum(count for _, count in prompts)
        tells = of_prompts >= PROMPT_TOKENS_MIN and 2 * of_prompts >= tokens
        work = sum(self._work(first, count) for first, count in prompts) + tokens - of_prompts if tells else 0.0
        self._under_way.append((self._clock(), work))

    def ended(self) -> None:
        """The oldest step under way has been computed."""
        now_s = self._clock()
        if self._under_way:
            scheduled_s, work = self._under_way.popleft()
            seconds = now_s - max(scheduled_s, self._ended_s)
            if work and seconds > 0:
                self._rates.append(work / seconds)
        self._ended_s = now_s

    @property
    def cost(self) -> PrefillCost | None:
        """None: no prompt was computed yet."""
        return PrefillCost(statistics.median(self._rates), self._growth, measured_tokens=1) if self._rates else None

    def _work(self, first: int, count: int) -> float:
        """In units of one token without attention."""
        return count * (1 + self._growth * (first + count / 2))


def attention_growth(config: Any, head_dim: int) -> float:
    """A token's attention to one earlier token, as a share of its other work, by a model's configuration (Hugging
    Face's); 0 where that does not tell: mixtures of experts, names that are not known here."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    hidden, wide, heads, kv_heads = (getattr(config, name, None) for name in names)
    sizes = (hidden, wide, heads, kv_heads)
    if getattr(config, "num_experts_per_tok", None) or not all(isinstance(size, int) and size > 0 for size in sizes):
        return 0.0
    assert hidden is not None and wide is not None and heads is not None and kv_heads is not None  # noqa: PT018
    parameters = 2 * hidden * head_dim * (heads + kv_heads) + 3 * hidden * wide  # of a layer whose MLP is gated
    return PrefillCost.of_model(1.0, parameters=parameters, layers=1, heads=heads, head_dim=head_dim).growth
