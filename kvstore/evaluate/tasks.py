"""Retrieval from a stored prefix, in the manner of RULER (Hsieh et al., arXiv:2404.06654) and SCBench (Li et al.,
arXiv:2412.10319), sized for small models.

One document holds a single needle, several needles of one kind (only the key tells them apart) and a chain of
variables, all between tokens of real text. It is cached and coded once; every question is a turn on top of it. Small
models answer few of these even from the exact cache, so the log-likelihood of the right answer is compared as well:
what a codec costs shows there first.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvstore.evaluate.documents import Document
from kvstore.evaluate.engine import Engine
from kvstore.evaluate.errors import CannotEvaluate

SINGLE, MULTI, VARIABLES = "single needle", "multi-key needles", "variable tracking"
KINDS = (SINGLE, MULTI, VARIABLES)
MULTI_KEYS = 4
CHAIN_LENGTH = 3
#: Needles lie between these parts of the prefix, so that none is in the tail that a reader recomputes.
DEPTHS = (0.04, 0.9)
_PLACES = ("harbour", "orchard", "library", "foundry", "chapel", "quarry", "bakery", "mill", "tannery", "ferry")
_ROOMS = ("archive", "cellar", "vault", "attic", "workshop")
_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"


@dataclass(frozen=True)
class Question:
    """`ask`: ids of the turn up to the answer; `answer`: the right ids after it."""

    kind: str
    ask: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Haystack:
    document: Document
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Answer:
    """`exact_match`: every token of the answer would be said; `probability`: mean over its tokens."""

    kind: str
    log_likelihood: float
    probability: float
    exact_match: bool


@dataclass(frozen=True)
class TaskScore:
    """Means over documents and questions, under the row's cache and under the exact one. `log_likelihood_delta`: nats
    an answer that the row's cache loses (negative) or gains."""

    kind: str
    questions: int
    exact_match: float
    exact_match_reference: float
    probability: float
    probability_reference: float
    log_likelihood_delta: float


def haystack(engine: Engine, filler: Document, rng: random.Random) -> Haystack:
    """`filler`'s prefix with needles in it, of the same length. Raises CannotEvaluate where there is no room."""
    room = rng.choice(_ROOMS)
    code = _number(rng)
    needles = [f" The code that opens the {room} is {code}."]
    asked = [(SINGLE, f"What is the code that opens the {room}? The code that opens the {room} is", code)]
    for place in rng.sample(_PLACES, MULTI_KEYS):
        number = _number(rng)
        needles.append(f" The special magic number for {place} is {number}.")
        sentence = f"The special magic number for {place} mentioned in the text is"
        asked.append((MULTI, f"What is the special magic number for {place} mentioned in the text? {sentence}", number))
    value = _number(rng)
    names = ["".join(rng.sample(_LETTERS, 3)) for _ in range(CHAIN_LENGTH)]
    needles.append(f" VAR {names[0]} = {value}.")
    needles += [f" VAR {new} = VAR {old}." for old, new in itertools.pairwise(names)]
    asked += [(VARIABLES, f"Which number is VAR {name} equal to? VAR {name} =", value) for name in names]
    # A chain is written in its own order; the other needles are anywhere.
    order = list(range(1 + MULTI_KEYS))
    rng.shuffle(order)
    chain = sorted(rng.sample(range(len(needles)), CHAIN_LENGTH))
    rest = iter(order)
    placed = [
        needles[1 + MULTI_KEYS + chain.index(i)] if i in chain else needles[next(rest)] for i in range(len(needles))
    ]
    return Haystack(
        Document(filler.name, _spliced(engine, filler.prefix, placed), filler.following),
        tuple(_question(engine, *one) for one in asked),
    )


def answers(engine: Engine, questions: Sequence[Question], kv: torch.Tensor) -> list[Answer]:
    """Every question on top of `kv`, `[layers, 2, tokens, kv_heads, head_dim]` as cached."""
    cache = engine.cache(kv)
    found = []
    for question in questions:
        count = len(question.answer)
        log_probs = torch.log_softmax(engine.on_top(cache, question.ask + question.answer[:-1], last=count), -1)
        right = torch.tensor(question.answer)
        said = log_probs.gather(1, right[:, None])
        exact = bool((log_probs.argmax(-1) == right).all())
        found.append(Answer(question.kind, float(said.sum()), float(said.exp().mean()), exact))
    return found


def scores(found: Sequence[Answer], reference: Sequence[Answer]) -> list[TaskScore]:
    """`found` and `reference` answer the same questions in the same order."""
    pairs = list(zip(found, reference, strict=True))
    return [
        TaskScore(
            kind, len(of_kind), statistics.fmean(one.exact_match for one, _ in of_kind),
            statistics.fmean(exact.exact_match for _, exact in of_kind),
            statistics.fmean(one.probability for one, _ in of_kind),
            statistics.fmean(exact.probability for _, exact in of_kind),
            statistics.fmean(one.log_likelihood - exact.log_likelihood for one, exact in of_kind),
        )
        for kind in KINDS
        if (of_kind := [pair for pair in pairs if pair[0].kind == kind])
    ]  # fmt: skip


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10_000, 100_000))


def _spliced(engine: Engine, filler: Sequence[int], needles: Sequence[str]) -> tuple[int, ...]:
    """`needles` at even distances between DEPTHS, and as much of `filler` around them as keeps its length."""
    coded = [engine.tokens(needle) for needle in needles]
    kept = len(filler) - sum(map(len, coded))
    if kept < len(filler) // 2:
        raise CannotEvaluate("the retrieval tasks do not fit into the prefix: a larger --prefix-tokens, or --no-tasks")
    first, last = (round(depth * kept) for depth in DEPTHS)
    ids: list[int] = []
    at = 0
    for index, needle in enumerate(coded):
        until = first + (last - first) * index // max(1, len(coded) - 1)
        ids += [*filler[at:until], *needle]
        at = until
    return (*ids, *filler[at:kept])


def _question(engine: Engine, kind: str, text: str, answer: str) -> Question:
    """The answer is the rest of the tokens once those that it shares with the question are gone."""
    ask = engine.tokens(f"\n\n{text}")
    whole = engine.tokens(f"\n\n{text} {answer}")
    shared = next((i for i, (one, other) in enumerate(zip(ask, whole, strict=False)) if one != other), len(ask))
    return Question(kind, tuple(whole[:shared]), tuple(whole[shared:]))
