"""Draws what the soak measured: calls, hit rate, slowest call and memory over time, with the faults behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

BIN_S = 5.0
COLOURS = {"node killed": "tab:red", "redis killed": "tab:orange", "redis paused": "tab:purple"}


def draw(report: dict[str, Any], path: Path) -> None:
    """`report`: a soak.Report as a dict."""
    figure = Figure(figsize=(10, 9), layout="constrained")
    calls, hits, slowest, memory = figure.subplots(4, 1, sharex=True)
    seconds = report["seconds"]
    bins = np.arange(0, 60 * report["minutes"] + BIN_S, BIN_S)
    number = np.digitize([second["at_s"] for second in seconds], bins) - 1

    def sums(values: list[float]) -> Any:
        return np.bincount(number, values, minlength=len(bins))[: len(bins)]

    calls.plot(bins, sums([sum(second["calls"].values()) for second in seconds]) / BIN_S)
    calls.set_ylabel("calls/s")
    asked = sums([second["asked"] for second in seconds])
    hits.plot(bins, sums([second["hit"] for second in seconds]) / np.maximum(asked, 1))
    hits.set_ylabel("hit rate")
    hits.set_ylim(0, 1)
    slowest.plot([second["at_s"] for second in seconds], [second["slowest_s"] for second in seconds], ".", ms=3)
    slowest.axhline(report["deadline_s"], color="black", lw=0.8, ls="--", label="deadline")
    slowest.set_ylabel("slowest call, s")
    slowest.legend(loc="upper right")
    for name, samples in report["memory"].items():
        at_s, mib = zip(*samples, strict=True)
        is_node = name.startswith("node")
        memory.plot(at_s, mib, color="tab:blue" if is_node else "tab:green", lw=1.5 if is_node else 0.8)
    memory.plot([], [], color="tab:blue", label="node, each incarnation")
    memory.plot([], [], color="tab:green", label="clients")
    memory.set_ylabel("RSS, MiB")
    memory.set_ylim(0)
    memory.set_xlabel("seconds")
    memory.legend(loc="lower right")
    for axes in (calls, hits, slowest, memory):
        for what, began_s, ended_s in report["faults"]:
            axes.axvspan(began_s, max(ended_s, began_s + 0.5), color=COLOURS[what], alpha=0.25, lw=0)
    for what, colour in COLOURS.items():
        calls.axvspan(-2, -1, color=colour, alpha=0.25, label=what)
    calls.set_xlim(0, 60 * report["minutes"])
    calls.legend(loc="upper right", ncols=3)
    totals = report["totals"]
    figure.suptitle(
        f"{sum(totals['calls'].values()):,} calls of {report['clients']} clients: {totals['wrong']} wrong values, "
        f"{len(totals['hung'])} calls over their deadline by more than 50 ms"
    )
    figure.savefig(path, dpi=90)
