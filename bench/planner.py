"""The fetch-or-recompute planner against fixed choices, CacheGen's rule and an oracle, on emulated links.

    python -m bench.planner --seed 7 [--walks 8] [--pictures docs/pictures] [--json PATH]

Virtual time: the client's own controller, over links of 50 Mbit/s to 40 Gbit/s (fixed, stepped, random walks), for four
models, three contexts, four deadlines and two latencies. `bench.planner_real` is the same over real sockets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.planner_bound import SLOWER_MAX, Bound, bound
from bench.planner_cases import Case, cases
from bench.planner_contestants import CONTESTANTS, FIXED, Outcome


@dataclass(frozen=True)
class Played:
    case: Case
    outcomes: dict[str, Outcome]
    bound: Bound

    @property
    def possible(self) -> bool:
        """Whether some fixed choice keeps the deadline."""
        return any(self.in_time(name) for name in FIXED)

    def in_time(self, name: str) -> bool:
        return self.outcomes[name].ttft_s <= self.case.deadline_s

    def slowdown(self, name: str) -> float:
        """Against recomputing everything: 1 is as fast."""
        return self.outcomes[name].ttft_s / self.case.recompute_s


def play(seed: int, walks: int) -> Iterator[Played]:
    for case in cases(seed, walks):
        yield Played(case, {name: contestant(case) for name, contestant in CONTESTANTS.items()}, bound(case))


def summary(games: list[Played], name: str) -> dict[str, float]:
    """The bars, for one contestant. `quality`: mean utility of what it fetches against the oracle's, where both fetch
    and are in time; `fetched`: tokens fetched against the oracle's."""
    possible = [game for game in games if game.possible]
    both = [game for game in games if game.in_time(name) and game.in_time("oracle")
            and game.outcomes[name].fetched and game.outcomes["oracle"].fetched]  # fmt: skip
    slow = [game.slowdown(name) for game in games]
    fetched = sum(len(game.outcomes[name].fetched) for game in games)
    return {
        "in_time": _share(game.in_time(name) for game in possible),
        "quality": sum(game.outcomes[name].utility for game in both) / max(1e-9, sum(
            game.outcomes["oracle"].utility for game in both)),
        "compared": len(both) / len(games),
        "fetched": fetched / max(1, sum(len(game.outcomes["oracle"].fetched) for game in games)),
        "slower": _share(value > SLOWER_MAX for value in slow),
        "worst": max(slow),
        "mean_ttft": sum(slow) / len(slow),
    }  # fmt: skip


def _share(values: Iterator[bool]) -> float:
    known = list(values)
    return sum(known) / max(1, len(known))


def table(games: list[Played]) -> str:
    lines = [
        f"{len(games)} cases; {sum(game.possible for game in games)} in which a fixed choice keeps the deadline",
        "",
        "| | in time where a fixed choice is, % | quality ÷ oracle | tokens fetched ÷ oracle "
        "| slower than recompute by > 5 %, % | worst ÷ recompute | mean ÷ recompute |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in CONTESTANTS:
        row = summary(games, name)
        quality = f"{row['quality']:.3f}" if row["compared"] else "–"
        lines.append(
            f"| {name} | {100 * row['in_time']:.2f} | {quality} | {row['fetched']:.3f} | {100 * row['slower']:.2f} "
            f"| {row['worst']:.3g} | {row['mean_ttft']:.3g} |"
        )
    return "\n".join([*lines, "", without_foreknowledge(games)])


def without_foreknowledge(games: list[Played]) -> str:
    """What is left to a rule that sees the link only as far as it has come (`planner_bound`)."""
    possible = [game for game in games if game.possible]
    slow = [game.bound.slowdown for game in games]
    in_time = _share(game.bound.in_time for game in possible)
    return (
        f"without foreknowledge at best: in time {100 * in_time:.2f} %, slower than recompute by > 5 % "
        f"{100 * _share(value > SLOWER_MAX for value in slow):.2f} %, worst {max(slow):.3g}"
    )


def by_link(games: list[Played], name: str) -> str:
    """The same for each kind of link."""
    lines = []
    for kind in dict.fromkeys((game.case.link.name.split()[0], game.case.link.latency_s) for game in games):
        row = summary(
            [game for game in games if (game.case.link.name.split()[0], game.case.link.latency_s) == kind], name
        )
        lines.append(
            f"  {kind} in time {100 * row['in_time']:.2f} quality {row['quality']:.3f} fetched {row['fetched']:.3f} "
            f"slower {100 * row['slower']:.2f} worst {row['worst']:.3f}"
        )
    return "\n".join(lines)


def misses(games: list[Played], name: str, count: int) -> str:
    """Cases in which a fixed choice keeps the deadline and this one does not."""
    lines = []
    for game in [game for game in games if game.possible and not game.in_time(name)][:count]:
        case = game.case
        keeps = ", ".join(fixed for fixed in FIXED if game.in_time(fixed))
        lines.append(
            f"  {case.model.name} {case.context} tokens, {case.link.name}, {1e3 * case.link.latency_s:g} ms: "
            f"{game.outcomes[name].ttft_s:.3f} s of {case.deadline_s:.3f} s, recompute {case.recompute_s:.3f} s; "
            f"kept by {keeps}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--walks", type=int, default=8, help="random links of each kind")
    parser.add_argument("--misses", type=int, default=0, help="how many missed deadlines of the planner to show")
    parser.add_argument("--pictures", type=Path, help="folder for planner-*.png")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    games = list(play(options.seed, options.walks))
    print(table(games))
    for name in ("planner", "planner, warm"):
        print(name)
        print(by_link(games, name))
    if options.misses:
        print(misses(games, "planner", options.misses))
    if options.json is not None:
        options.json.write_text(json.dumps({name: summary(games, name) for name in CONTESTANTS}, indent=1))
    if options.pictures is not None:
        from bench.planner_plot import pictures

        pictures(games, options.pictures)


if __name__ == "__main__":
    main()
