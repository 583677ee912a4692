"""What a model says on top of a restored cache, against what it says on top of the exact one.

KL(exact ‖ restored) of next-token distributions is the measure that small samples can carry: perplexity differences
under 0.3 % are noise at eight documents.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvstore.evaluate.documents import Document
from kvstore.evaluate.engine import Engine

GREEDY_TOKENS = 64
_ROWS = 64  # of log-probabilities compared at a time: memory, at vocabularies of 256k


@dataclass(frozen=True)
class Reference:
    """One document under its exact cache.

    `kv`: `[layers, 2, prefix tokens, kv_heads, head_dim]` as cached. Its last `tail` tokens were computed on top of
    the rounded cache of the others, as a reader computes them who recomputes the tail. `log_probs`: float32
    `[SCORED_TOKENS, vocabulary]`. `greedy`: the following text's first token and what the model says after it.
    """

    document: Document
    kv: torch.Tensor
    tail: int
    log_probs: torch.Tensor
    greedy: tuple[int, ...]

    @property
    def nll(self) -> float:
        """Nats a token of the text that truly follows."""
        return _nll(self.log_probs, self.document)


@dataclass(frozen=True)
class Fidelity:
    """Of one document. `greedy_match`: leading tokens (of GREEDY_TOKENS) of the exact cache's greedy answer that the
    restored cache would say too, each judged after the same tokens."""

    kl: float
    nll_delta: float
    top1: float
    greedy_match: int


@dataclass(frozen=True)
class Summary:
    """Means over documents with standard errors; `documents` in their order."""

    kl: float
    kl_se: float | None
    kl_worst: float
    kl_worst_document: str
    ppl_delta_percent: float
    ppl_delta_percent_se: float | None
    top1: float
    greedy_match: float
    documents: tuple[Fidelity, ...]


def reference(engine: Engine, document: Document, tail: int) -> Reference:
    """Prefills `document` once; a few seconds for a small model on one core."""
    kv = exact_cache(engine, document.prefix, tail)
    cache = engine.cache(kv)
    log_probs = torch.log_softmax(engine.on_top(cache, document.following[:-1]), -1)
    said = [document.following[0]]
    for _ in range(GREEDY_TOKENS):
        said.append(int(engine.logits(cache, said[-1:], last=1).argmax()))
    return Reference(document, kv, tail, log_probs, tuple(said))


def exact_cache(engine: Engine, prefix: Sequence[int], tail: int) -> torch.Tensor:
    """The KV of `prefix`, its last `tail` tokens computed on top of the rounded others."""
    head = engine.extend(None, prefix[: len(prefix) - tail])
    return engine.extend(head, prefix[len(prefix) - tail :]) if tail else head


def with_tail_recomputed(engine: Engine, prefix: Sequence[int], tail: int, restored: torch.Tensor) -> torch.Tensor:
    """`restored` up to the tail, and the tail as the model computes it on top of that."""
    head = len(prefix) - tail
    return engine.extend(restored[:, :, :head], prefix[head:]) if tail else restored


def fidelity(engine: Engine, reference: Reference, restored: torch.Tensor) -> Fidelity:
    """`restored`: shaped and typed as `reference.kv`."""
    document = reference.document
    cache = engine.cache(restored)
    log_probs = torch.log_softmax(engine.on_top(cache, document.following[:-1]), -1)
    kl = agreed = 0.0
    for first in range(0, len(log_probs), _ROWS):
        exact, test = reference.log_probs[first : first + _ROWS], log_probs[first : first + _ROWS]
        kl += float((exact.exp() * (exact - test)).sum(dtype=torch.float64))
        agreed += float((exact.argmax(-1) == test.argmax(-1)).sum())
    said = engine.on_top(cache, reference.greedy[:-1]).argmax(-1).tolist()
    match = next((i for i, pair in enumerate(zip(said, reference.greedy[1:], strict=True)) if pair[0] != pair[1]), None)
    return Fidelity(
        kl / len(log_probs), _nll(log_probs, document) - reference.nll, agreed / len(log_probs),
        GREEDY_TOKENS if match is None else match,
    )  # fmt: skip


def summary(results: Sequence[Fidelity], names: Sequence[str]) -> Summary:
    worst = max(range(len(results)), key=lambda index: results[index].kl)
    nll_delta = [one.nll_delta for one in results]
    return Summary(
        kl=statistics.fmean(one.kl for one in results), kl_se=standard_error([one.kl for one in results]),
        kl_worst=results[worst].kl, kl_worst_document=names[worst],
        ppl_delta_percent=100 * math.expm1(statistics.fmean(nll_delta)),
        ppl_delta_percent_se=standard_error([100 * delta for delta in nll_delta]),
        top1=statistics.fmean(one.top1 for one in results),
        greedy_match=statistics.fmean(one.greedy_match for one in results), documents=tuple(results),
    )  # fmt: skip


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _nll(log_probs: torch.Tensor, document: Document) -> float:
    targets = torch.tensor(document.following[1:])
    return -float(log_probs.gather(1, targets[:, None]).mean(dtype=torch.float64))
