"""The picture of `bench.trace_get`: the stages of one get as bars over time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from bench.trace_get import Result

_COLOURS = {"hash, look up": "#9a9a9a", "receive": "#4477aa", "decode": "#cc6677"}


def picture(results: Sequence[Result], path: Path) -> None:
    figure = Figure(figsize=(9, 2.3 * len(results)), layout="constrained")
    for axes, result in zip(figure.subplots(len(results), 1, squeeze=False).flat, results, strict=True):
        _stages(axes, result)
    figure.axes[-1].set_xlabel("ms since the get was called")
    figure.savefig(path, dpi=110)


def _stages(axes: Axes, result: Result) -> None:
    trace = result.trace
    axes.barh(0, 1e3 * trace.found, color=_COLOURS["hash, look up"], label="hash, look up")
    for row, (begun, received) in enumerate(trace.receiving, 1):
        axes.barh(row, 1e3 * (received - begun), left=1e3 * begun, color=_COLOURS["receive"],
                  label="receive" if row == 1 else None)  # fmt: skip
    for row, (begun, done) in enumerate(sorted(trace.decoding), 1):
        axes.barh(row, 1e3 * (done - begun), left=1e3 * begun, color=_COLOURS["decode"],
                  label="check, decode in place" if row == 1 else None)  # fmt: skip
    axes.axvline(1e3 * trace.took, color="black", linewidth=1, label="handed over")
    share = statistics.median(result.shares)
    axes.set_title(f"{result.way.name}: {result.slowest} alone is {100 * share:.0f} % of the get", fontsize="small")
    axes.set_ylabel("object")
    axes.set_yticks(range(len(trace.receiving) + 1), ["", *map(str, range(1, len(trace.receiving) + 1))])
    axes.tick_params(labelsize="x-small")
    axes.invert_yaxis()
    axes.legend(fontsize="x-small", loc="upper right")
