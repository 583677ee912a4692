"""The whole evaluation: references once, then every row over every document, then what hangs on the rows."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import kvstore_codec as codec
from kvstore.evaluate import nesting, tasks
from kvstore.evaluate.documents import Document, documents
from kvstore.evaluate.engine import Engine, load
from kvstore.evaluate.errors import CannotEvaluate
from kvstore.evaluate.fidelity import (
    Fidelity,
    Reference,
    Summary,
    exact_cache,
    fidelity,
    reference,
    summary,
    with_tail_recomputed,
)  # fmt: skip
from kvstore.evaluate.rows import CodecRow, ProfileChoice, Restored, Row, RowName, baseline_rows, codec_rows
from kvstore.evaluate.settings import Settings

#: Documents that carry retrieval questions: eight each, so that a row answers 32 of them.
TASK_DOCUMENTS = 4


@dataclass(frozen=True)
class RowResult:
    """`kvstore`: real objects of this codec, not a baseline's formula. `loaded`: the tail recomputed by the model on
    top of the restored prefix; `whole`: the tail restored too."""

    name: RowName
    kvstore: bool
    bits_per_element: float
    ratio: float
    bits_by_document: tuple[float, ...]
    loaded: Summary
    whole: Summary
    tasks: list[tasks.TaskScore] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """`bits_raw`: of an element as it is cached. `perplexity`: of the text that follows, under the exact caches."""

    model: str
    revision: str
    cached_dtype: str
    bits_raw: int
    documents: tuple[str, ...]
    perplexity: float
    settings: Settings
    rows: list[RowResult]
    prefix_reading: list[nesting.PrefixReading]
    generation: list[nesting.Generation]
    page_sizes: list[nesting.PageSize]


#: Called with what is done now, and how many steps there are once that is known.
Progress = Callable[[str, int], None]


def evaluate(settings: Settings, progress: Progress) -> Report:
    """Raises CannotEvaluate. Uses `settings.threads` threads of torch and of the codec."""
    torch.set_num_threads(settings.threads)
    progress(f"loading {settings.model.name}", 0)
    with torch.inference_mode():
        engine = load(settings.model, settings.dtype, settings.model_id, settings.revision)
        return _Evaluation(settings, engine, progress).report()


class _Evaluation:
    def __init__(self, settings: Settings, engine: Engine, progress: Progress) -> None:
        _check(settings)
        self._settings = settings
        self._engine = engine
        self._codec_rows = codec_rows(
            engine.layout, qualities=settings.qualities, chunk_tokens=settings.chunk_tokens,
            profiles=[ProfileChoice(), *(_profile(path, engine) for path in settings.profiles)], steps=settings.steps,
            threads=settings.threads,
        )  # fmt: skip
        self._rows: list[Row] = [*self._codec_rows, *(baseline_rows(settings.documents) if settings.baselines else ())]
        self._documents = documents(
            engine, settings.texts, count=settings.documents, prefix_tokens=settings.prefix_tokens
        )
        self._progress = progress
        lossy = [row for row in self._codec_rows if not row.quality.exact and row.step == 1]
        largest = max(row.layout.chunk_tokens for row in self._codec_rows)
        self._structure = [row for row in lossy if row.layout.chunk_tokens == largest]

    def report(self) -> Report:
        haystacks = self._haystacks()
        profiles = list({row.choice.name: row for row in self._structure}.values())
        turns = self._structure if self._settings.turns else []
        steps = len(self._documents) + len(haystacks) + len(self._rows) + len(profiles) + len(turns)
        references = []
        for document in self._documents:
            self._progress(f"exact cache of {document.name}", steps)
            references.append(reference(self._engine, document, self._settings.tail))
        exact_tasks = []
        for one in haystacks:
            self._progress(f"questions about {one.document.name}", steps)
            exact_tasks.append(self._asked(one))
        rows = []
        for row in self._rows:
            self._progress(str(row.name), steps)
            rows.append(self._row(row, references, exact_tasks))
        by_name = {result.name: result for result in rows}
        reading = []
        for row in profiles:
            self._progress(f"{row.name.profile or 'no profile'}: read by prefix", steps)
            known = {
                result.name.codec: [one.kl for one in result.loaded.documents]
                for result in rows
                if dataclasses.replace(result.name, codec=row.name.codec) == row.name
            }
            reading.append(nesting.prefix_reading(self._engine, references, row, known))
        generation = []
        for row in turns:
            self._progress(f"{row.name} in {self._settings.turns} turns", steps)
            once_kl = by_name[row.name].loaded.kl
            generation.append(nesting.generation(self._engine, references, row, self._settings.turns, once_kl))
        points = [(one.name, one.bits_per_element, one.loaded.kl) for one in rows if one.kvstore]
        layout = self._engine.layout
        return Report(
            model=layout.model, revision=layout.revision, cached_dtype=layout.dtype, bits_raw=8 * layout.itemsize,
            documents=tuple(document.name for document in self._documents), perplexity=_perplexity(references),
            settings=self._settings, rows=rows, prefix_reading=[one for some in reading for one in some],
            generation=generation, page_sizes=nesting.page_sizes(points),
        )  # fmt: skip

    def _haystacks(self) -> list[tasks.Haystack]:
        rng = random.Random(self._settings.seed)
        chosen: Sequence[Document] = self._documents[:TASK_DOCUMENTS] if self._settings.tasks else ()
        return [tasks.haystack(self._engine, document, rng) for document in chosen]

    def _asked(self, haystack: tasks.Haystack) -> _Asked:
        kv = exact_cache(self._engine, haystack.document.prefix, self._settings.tail)
        return _Asked(haystack, kv, tasks.answers(self._engine, haystack.questions, kv))

    def _row(self, row: Row, references: Sequence[Reference], asked: Sequence[_Asked]) -> RowResult:
        bits: list[float] = []
        whole: list[Fidelity] = []
        loaded: list[Fidelity] = []
        for one, restored in zip(references, self._restored(row, [one.kv for one in references]), strict=True):
            bits.append(restored.bits_per_element)
            whole.append(fidelity(self._engine, one, restored.kv))
            recomputed = self._recomputed(one.document, restored)
            loaded.append(fidelity(self._engine, one, recomputed) if one.tail else whole[-1])
        answers: list[tasks.Answer] = []
        for task, restored in zip(asked, self._restored(row, [task.kv for task in asked]), strict=True):
            recomputed = self._recomputed(task.haystack.document, restored)
            answers += tasks.answers(self._engine, task.haystack.questions, recomputed)
        names = [document.name for document in self._documents]
        mean = sum(bits) / len(bits)
        ratio = 8 * self._engine.layout.itemsize / mean
        return RowResult(
            row.name, isinstance(row, CodecRow), mean, ratio, tuple(bits), summary(loaded, names),
            summary(whole, names), tasks.scores(answers, [answer for task in asked for answer in task.answers]),
        )  # fmt: skip

    def _restored(self, row: Row, exact: Sequence[torch.Tensor]) -> Iterator[Restored]:
        return (row.restore(exact, index) for index in range(len(exact)))

    def _recomputed(self, document: Document, restored: Restored) -> torch.Tensor:
        return with_tail_recomputed(self._engine, document.prefix, self._settings.tail, restored.kv)


@dataclass(frozen=True)
class _Asked:
    """`kv`, `answers`: the exact cache and what the model says on top of it."""

    haystack: tasks.Haystack
    kv: torch.Tensor
    answers: list[tasks.Answer]


def _check(settings: Settings) -> None:
    for size in settings.chunk_tokens:
        if size < 1 or settings.prefix_tokens % size:
            raise CannotEvaluate(
                f"--prefix-tokens {settings.prefix_tokens} is no multiple of --chunk-tokens {size}: only whole chunks "
                "are stored"
            )
    if not settings.tail < settings.prefix_tokens:
        raise CannotEvaluate(f"--tail {settings.tail} leaves nothing of {settings.prefix_tokens} prefix tokens to load")
    if not all(step > 0 for step in settings.steps):
        raise CannotEvaluate("--step must be positive")


def _profile(path: Path, engine: Engine) -> ProfileChoice:
    try:
        profile = codec.Profile.load(path)
        profile.require_fit(engine.layout)
    except OSError as error:
        raise CannotEvaluate(f"{path}: {error.strerror}") from None
    except codec.CodecError as error:
        raise CannotEvaluate(f"{path}: {error}") from None
    return ProfileChoice(path.stem, profile)


def _perplexity(references: Sequence[Reference]) -> float:
    return float(torch.tensor([one.nll for one in references], dtype=torch.float64).mean().exp())
