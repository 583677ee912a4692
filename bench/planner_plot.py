"""The pictures of docs/planner.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from bench.planner import Played

SHOWN = ("recompute", "high", "low", "CacheGen's rule", "oracle", "planner", "planner, warm")
_STYLE = {"oracle": ":", "planner": "-", "planner, warm": "-"}


def pictures(games: Sequence[Played], folder: Path) -> None:
    """planner-slowdown.png and planner-rates.png in `folder`."""
    _slowdown(games, folder / "planner-slowdown.png")
    _rates(games, folder / "planner-rates.png")


def _slowdown(games: Sequence[Played], path: Path) -> None:
    """How many cases are at most so much slower than recomputing."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in SHOWN:
        values = sorted(game.slowdown(name) for game in games)
        shares = [100 * (rank + 1) / len(values) for rank in range(len(values))]
        axes.plot(values, shares, _STYLE.get(name, "--"), linewidth=1.2, label=name)
    axes.axvline(1.05, color="grey", linewidth=1, linestyle=":")
    axes.set(xscale="log", xlim=(0.02, 20), xlabel="time to the whole prompt's KV ÷ recomputing it", ylim=(0, 101),
             ylabel="cases at most so slow, %", title=f"{len(games)} emulated cases")  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)


def _rates(games: Sequence[Played], path: Path) -> None:
    """Time over the rate of fixed links, one panel a model, 8,192 tokens, deadline half the recomputation."""
    chosen = [game for game in games if game.case.link.name.startswith("fixed") and game.case.context == 8192
              and game.case.share == 0.5 and game.case.link.latency_s < 0.001]  # fmt: skip
    models = list(dict.fromkeys(game.case.model.name for game in chosen))
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    for axes, model in zip(figure.subplots(2, 2).flat, models, strict=True):
        mine = [game for game in chosen if game.case.model.name == model]
        rates = [8 * game.case.link.rates[0] for game in mine]
        for name in SHOWN[:-1]:
            axes.plot(rates, [game.outcomes[name].ttft_s for game in mine], _STYLE.get(name, "--"), linewidth=1.2,
                      marker="o", markersize=3, label=name)  # fmt: skip
        axes.axhline(mine[0].case.deadline_s, color="grey", linewidth=1, linestyle=":", label="deadline")
        axes.set(xscale="log", yscale="log", title=f"{model}, {mine[0].case.model.engine}", xlabel="bit/s",
                 ylabel="seconds")  # fmt: skip
        axes.grid(alpha=0.25)
    figure.axes[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=130)
