"""`kvstore eval`: progress while it runs, tables at the end, the same figures as JSON and as a plot."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvstore.cli.outcome import CommandFailed, ExitCode
from kvstore.cli.render import print_json
from kvstore.evaluate.errors import CannotEvaluate
from kvstore.evaluate.settings import Settings

if TYPE_CHECKING:  # they need torch, which may be missing
    from kvstore.evaluate.fidelity import Summary
    from kvstore.evaluate.run import Report, RowResult

NEEDS = ("torch", "transformers")
FOR_GGUF = ("gguf", "accelerate")
INSTALL = "pip install 'llm-kvstore[eval]'"
WIDTH = 150


def evaluate(settings: Settings, plot_path: Path | None, json_path: Path | None, as_json: bool) -> None:
    """Raises CommandFailed where the evaluation cannot run."""
    needs = [*NEEDS, *(FOR_GGUF if settings.model.suffix == ".gguf" else ()), *(["matplotlib"] if plot_path else ())]
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandFailed(f"the evaluation needs {', '.join(missing)}: {INSTALL}", ExitCode.USAGE)
    for path in (plot_path, json_path):
        if path is not None and not path.parent.is_dir():
            raise CommandFailed(f"{path}: the folder does not exist: create it or pass another", ExitCode.USAGE)
        if path is not None and path.is_dir():
            raise CommandFailed(f"{path} is a folder: name a file in it", ExitCode.USAGE)
    began = time.monotonic()
    report = _run(settings, plot_path)
    figures = report_json(report) | {"seconds": time.monotonic() - began}
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=2) + "\n")
    if as_json:
        print_json(figures)
        return
    # In a file, or behind a pipe, no width is given and nothing may be cut off.
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for table in report_tables(report):
        console.print(table)


def _run(settings: Settings, plot_path: Path | None) -> Report:
    if plot_path is not None:
        from kvstore.evaluate.plot import check, plot
    from kvstore.evaluate.run import evaluate as run

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        if plot_path is not None:
            check(plot_path)
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
            bar = shown.add_task("starting", total=None)

            def progress(doing: str, steps: int) -> None:
                done = 0 if shown.tasks[bar].total is None else 1
                shown.update(bar, description=doing, total=steps or None, advance=done)

            report = run(settings, progress)
    except CannotEvaluate as error:
        raise CommandFailed(str(error), ExitCode.USAGE) from None
    if plot_path is not None:
        plot(report, plot_path)
    return report


def report_json(report: Report) -> dict[str, Any]:
    """Every figure there is, documents one by one included."""
    figures: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(report), default=str))
    return figures


def report_tables(report: Report) -> Iterable[Table]:
    settings = report.settings
    title = (
        f"{report.model}: {len(report.documents)} documents, {settings.prefix_tokens} tokens stored, last "
        f"{settings.tail} recomputed; perplexity {report.perplexity:.2f}\n± standard error over documents; "
        f"ratio to {report.cached_dtype}"
    )
    table = _table(
        title,
        "codec",
        "chunk",
        "profile",
        "bits/elt",
        "ratio",
        "KL",
        "worst",
        "KL no tail",
        "Δppl %",
        "top-1",
        "greedy",
    )
    for row in report.rows:
        table.add_row(*_name(row), *_figures(row))
    yield table
    if report.rows and report.rows[0].tasks:
        yield _tasks_table(report.rows)
    if report.prefix_reading:
        table = _table(
            "stored at high and read at a quality, beside a single layer of that step",
            "quality",
            "profile",
            "bits/elt",
            "single",
            "KL",
            "single",
        )
        for read in report.prefix_reading:
            table.add_row(
                read.quality, read.profile or "–", f"{read.read_bits_per_element:.3f}",
                f"{read.alone_bits_per_element:.3f}", _kl(read.read_kl), _kl(read.alone_kl),
            )  # fmt: skip
        yield table
    if report.generation:
        table = _table(
            f"prefix built in {settings.turns} turns, each on decoded chunks",
            "codec",
            "profile",
            "KL",
            "at once",
            "more",
        )
        for one in report.generation:
            more = f"{100 * (one.turns_kl / one.once_kl - 1):+.0f} %" if one.once_kl > 0 else "–"
            table.add_row(one.row.codec, one.row.profile or "–", _kl(one.turns_kl), _kl(one.once_kl), more)
        yield table
    if report.page_sizes:
        table = _table(
            "small chunks at the KL of large ones", "profile", "KL", "chunk", "bits/elt", "chunk", "bits/elt", "more"
        )
        for page in report.page_sizes:
            table.add_row(
                page.profile or "–", _kl(page.kl), str(page.large_tokens), f"{page.large_bits_per_element:.3f}",
                str(page.small_tokens), f"{page.small_bits_per_element:.3f}",
                f"{page.small_bits_per_element - page.large_bits_per_element:+.3f}",
            )  # fmt: skip
        yield table


def _name(row: RowResult) -> tuple[str, str, str]:
    step = f" ×{row.name.step:g}" if row.name.step != 1 else ""
    return row.name.codec + step, str(row.name.chunk_tokens or "–"), row.name.profile or "–"


def _figures(row: RowResult) -> tuple[str, ...]:
    loaded: Summary = row.loaded
    kl_se = "" if loaded.kl_se is None else f" ±{_kl(loaded.kl_se)}"
    ppl_se = "" if loaded.ppl_delta_percent_se is None else f" ±{loaded.ppl_delta_percent_se:.2f}"
    return (
        f"{row.bits_per_element:.3f}", f"{row.ratio:.2f}x", _kl(loaded.kl) + kl_se,
        _kl(loaded.kl_worst), _kl(row.whole.kl), f"{loaded.ppl_delta_percent:+.2f}{ppl_se}",
        f"{loaded.top1:.3f}", f"{loaded.greedy_match:.0f}",
    )  # fmt: skip


def _tasks_table(rows: Sequence[RowResult]) -> Table:
    kinds = [score.kind for score in rows[0].tasks]
    asked = ", ".join(f"{score.questions} {score.kind}" for score in rows[0].tasks)
    table = _table(
        f"retrieval ({asked}): answers right, mean probability of the answer's tokens, nats an answer against exact",
        "codec", "chunk", "profile", *(heading for kind in kinds for heading in (kind, "p", "Δ nats")),
    )  # fmt: skip
    exact = [(f"{s.exact_match_reference:.0%}", f"{s.probability_reference:.3f}", "–") for s in rows[0].tasks]
    table.add_row("exact cache", "–", "–", *(cell for cells in exact for cell in cells))
    for row in rows:
        cells = [(f"{s.exact_match:.0%}", f"{s.probability:.3f}", f"{s.log_likelihood_delta:+.3f}") for s in row.tasks]
        table.add_row(*_name(row), *(cell for three in cells for cell in three))
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings:
        left = heading in ("codec", "profile", "quality")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    return table


def _kl(value: float) -> str:
    """Two significant digits; "0" is exactly 0."""
    return "0" if value == 0 else f"{value:.1e}" if abs(value) < 1e-4 else f"{value:.5f}"
