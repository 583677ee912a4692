"""Loss against size: KL and perplexity over bits per element, one line a codec."""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from kvstore.evaluate.errors import CannotEvaluate
from kvstore.evaluate.run import Report, RowResult

#: "KIVI-4" and "KIVI-2", "CacheGen paper 1" and "CacheGen paper 0.5" are one line each.
NUMBERED = re.compile(r"[- ][\d.]+$")
#: Of eight documents; see docs/codec-evaluation.md.
PPL_NOISE_PERCENT = 0.3


def check(path: Path) -> None:
    """Raises CannotEvaluate for a suffix that names no format matplotlib can write."""
    formats = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in formats:
        raise CannotEvaluate(f"{path}: name the plot .png, .svg or .pdf, or one of {', '.join(formats)}")


def plot(report: Report, path: Path) -> None:
    """Writes `path` in the format that its suffix names. Raises OSError."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    kl, ppl = figure.subplots(1, 2)
    families: dict[str, list[RowResult]] = {}
    for row in report.rows:
        if row.loaded.kl > 0:  # an exact codec is at minus infinity
            families.setdefault(_family(row), []).append(row)
    for family, rows in families.items():
        _line(kl, family, [(row.bits_per_element, row.loaded.kl) for row in rows])
        _line(ppl, family, [(row.bits_per_element, row.loaded.ppl_delta_percent) for row in rows])
    kl.set(yscale="log", ylabel="mean KL(exact ‖ restored), nats", title=f"{report.model}: next-token distributions")
    ppl.set_yscale("symlog", linthresh=PPL_NOISE_PERCENT)
    ppl.axhspan(-PPL_NOISE_PERCENT, PPL_NOISE_PERCENT, color="grey", alpha=0.15, linewidth=0)
    ppl.set(ylabel="change of perplexity, %", title=f"perplexity (grey: noise; linear below {PPL_NOISE_PERCENT} %)")
    for axes in (kl, ppl):
        axes.set(xscale="log", xlabel="bits per element, all of them counted")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6, 8)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(which="major", alpha=0.25)
    kl.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _family(row: RowResult) -> str:
    name = row.name
    if row.kvstore:
        return f"kvstore, {name.chunk_tokens} tokens{f', {name.profile}' if name.profile else ''}"
    return NUMBERED.sub("", name.codec)


def _line(axes: Axes, label: str, points: list[tuple[float, float]]) -> None:
    axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, linewidth=1, label=label)
