"""Interpolation between qualities, and needles that lie where the questions say."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.evaluate import nesting, tasks
from kvstore.evaluate.documents import Document
from kvstore.evaluate.errors import CannotEvaluate
from kvstore.evaluate.fidelity import Fidelity, standard_error, summary
from kvstore.evaluate.rows import RowName
from kvstore.evaluate.tasks import Answer


def test_small_pages_are_compared_at_equal_kl() -> None:
    """The small pages' curve is 0.5 bits above the large ones' and covers two of their three points."""
    points = [(RowName(f"q{i}", 256), 4.0 - i, 10.0 ** (i - 3)) for i in range(3)]
    points += [(RowName(f"q{i}", 16), 4.5 - i + 0.25, 10.0 ** (i - 3) * 10**0.25) for i in range(-1, 2)]
    found = nesting.page_sizes(points)
    assert [round(math.log10(page.kl)) for page in found] == [-3, -2]
    for page in found:
        assert (page.large_tokens, page.small_tokens) == (256, 16)
        assert page.small_bits_per_element - page.large_bits_per_element == pytest.approx(1.0)


def test_profiles_are_compared_with_themselves_only() -> None:
    points = [(RowName("a", 256, "p"), 2.0, 1e-3), (RowName("a", 16), 3.0, 1e-3), (RowName("b", 16), 2.0, 1e-2)]
    assert nesting.page_sizes(points) == []


def test_summaries() -> None:
    one, two = Fidelity(0.1, 0.0, 1.0, 64), Fidelity(0.3, math.log(1.21), 0.5, 0)
    found = summary([one, two], ["one", "two"])
    assert [found.kl, found.kl_se] == pytest.approx([0.2, 0.1])
    assert (found.kl_worst, found.kl_worst_document) == (0.3, "two")
    assert found.ppl_delta_percent == pytest.approx(10)
    assert (found.top1, found.greedy_match) == (0.75, 32)
    assert standard_error([5.0]) is None


def letters() -> Any:
    """An engine whose tokens are characters."""
    return SimpleNamespace(tokens=lambda text: [ord(letter) for letter in text])


def test_needles_are_in_the_prefix_and_answer_the_questions() -> None:
    filler = Document("filler", tuple([ord("~")] * 2000), (ord("~"),) * 256)
    found = tasks.haystack(letters(), filler, random.Random(1))
    text = "".join(map(chr, found.document.prefix))
    assert len(text) == 2000
    assert "~" not in text.replace("~", " ", 1)[:1]
    assert text[-150:] == "~" * 150  # the tail that a reader recomputes has none
    kinds = [question.kind for question in found.questions]
    assert kinds == [tasks.SINGLE] + [tasks.MULTI] * tasks.MULTI_KEYS + [tasks.VARIABLES] * tasks.CHAIN_LENGTH
    for question in found.questions[: 1 + tasks.MULTI_KEYS]:
        ask, answer = "".join(map(chr, question.ask)), "".join(map(chr, question.answer))
        key = ask.split("? ")[1].split(" mentioned")[0].removesuffix(" is")
        assert f"{key} is{answer}." in text
    chain = [question for question in found.questions if question.kind == tasks.VARIABLES]
    names = ["".join(map(chr, question.ask)).split(" VAR ")[1].split(" ")[0] for question in chain]
    assert f"VAR {names[0]} ={''.join(map(chr, chain[0].answer))}." in text
    at = [text.index(f" VAR {name} = ") for name in names]
    assert at == sorted(at)
    assert f"VAR {names[2]} = VAR {names[1]}." in text


def test_needles_that_do_not_fit() -> None:
    filler = Document("filler", tuple([ord("~")] * 500), ())
    with pytest.raises(CannotEvaluate, match="--no-tasks"):
        tasks.haystack(letters(), filler, random.Random(1))


def test_task_scores_compare_with_the_exact_cache() -> None:
    exact = [Answer(tasks.SINGLE, -1.0, 0.5, True), Answer(tasks.MULTI, -2.0, 0.25, True)]
    found = [Answer(tasks.SINGLE, -1.5, 0.4, True), Answer(tasks.MULTI, -4.0, 0.1, False)]
    single, multi = tasks.scores(found, exact)
    assert (single.kind, single.exact_match, single.log_likelihood_delta) == (tasks.SINGLE, 1, -0.5)
    assert (multi.exact_match, multi.exact_match_reference, multi.probability_reference) == (0, 1, 0.25)
    assert multi.log_likelihood_delta == -2
