"""Hit rate over capacity, one line a policy, with Belady's optimum and an infinite cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from kvstore.cli.outcome import CommandFailed, ExitCode

if TYPE_CHECKING:
    from kvstore.cli.bench_trace import Replayed


def check(path: Path) -> None:
    """Raises CommandFailed where no plot can be written there."""
    formats = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in formats:
        raise CommandFailed(f"{path}: name the plot .png, .svg or .pdf, or one of {', '.join(formats)}", ExitCode.USAGE)
    if not path.parent.is_dir():
        raise CommandFailed(f"{path}: the folder does not exist: create it or pass another", ExitCode.USAGE)


def plot(name: str, results: Sequence[Replayed], infinite: float, path: Path) -> None:
    """Writes `path` in the format that its suffix names. Raises CommandFailed where it cannot."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        label = result.policy if result.floor == "high" else f"{result.policy}, degrading to {result.floor}"
        lines.setdefault(label, []).append((result.capacity.blocks, 100 * result.outcome.hit_rate))
    for label, points in lines.items():
        style = "--" if "degrading" in label else "-"
        axes.plot(*zip(*sorted(points), strict=True), style, marker="o", markersize=4, linewidth=1, label=label)
    axes.axhline(100 * infinite, color="grey", linewidth=1, linestyle=":", label="infinite cache")
    axes.set(xscale="log", xlabel="capacity, blocks", ylabel="hit rate, % of blocks", title=name)
    ticks = sorted({result.capacity.blocks: result.capacity.name for result in results}.items())
    axes.set_xticks([blocks for blocks, _ in ticks], [f"{blocks}\n{text}" for blocks, text in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0)
    axes.grid(which="major", alpha=0.25)
    axes.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise CommandFailed(f"{path}: {error.strerror}", ExitCode.USAGE) from None
