"""What it costs to recompute: seconds of prefill by position.

A token at position p costs a transformer about 2·P FLOPs in its matrices (P parameters; Kaplan et al. 2020, §2.1) and
4·L·H·d·p in attention (L layers, H query heads of d: 2·d for each score and 2·d for each weighted sum; the forward
third of PaLM's 12·L·H·Q·T, Chowdhery et al. 2022, appendix B). So its price is a line in p: later chunks are dearer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from kvstore_client.errors import InvalidArgument

#: Seconds of prefill of the tokens [first, last), given all before them.
PrefillSeconds = Callable[[int, int], float]


@dataclass(frozen=True)
class PrefillCost:
    """An engine's prefill: `tokens_per_s` as measured over a whole prompt of `measured_tokens`. `growth`: a token's
    attention to one earlier token, as a share of its other work (0: the speed is the same everywhere)."""

    tokens_per_s: float
    growth: float = 0.0
    measured_tokens: int = 2048

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tokens_per_s) and self.tokens_per_s > 0):
            raise InvalidArgument("prefill_tokens_per_s must be positive", tokens_per_s=self.tokens_per_s)
        if not (math.isfinite(self.growth) and self.growth >= 0 and self.measured_tokens > 0):
            raise InvalidArgument(
                "growth must be at least 0, measured_tokens positive", growth=self.growth, tokens=self.measured_tokens
            )  # fmt: skip

    @classmethod
    def of_model(
        cls, tokens_per_s: float, *, parameters: float, layers: int, heads: int, head_dim: int,
        measured_tokens: int = 2048,
    ) -> PrefillCost:  # fmt: skip
        """Of a dense transformer. `heads`: query heads."""
        return cls(tokens_per_s, 4 * layers * heads * head_dim / (2 * parameters), measured_tokens)

    def __call__(self, first: int, last: int) -> float:
        return (self._work(last) - self._work(first)) / self._work(self.measured_tokens) * (
            self.measured_tokens / self.tokens_per_s
        )  # fmt: skip

    def _work(self, tokens: int) -> float:
        """Of the first `tokens` tokens, in units of one token without attention."""
        return tokens + self.growth * tokens * tokens / 2


def prefill_seconds(prefill: float | PrefillSeconds) -> PrefillSeconds:
    """What a caller gave as `prefill_tokens_per_s`: one rate for every position, a PrefillCost, or a function."""
    return prefill if callable(prefill) else PrefillCost(prefill)
