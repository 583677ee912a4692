"""`kvstore bench trace`: hit rates of eviction policies on a trace of requests, beside the optimum."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvstore.cli import render
from kvstore.cli.outcome import CommandFailed, ExitCode
from kvstore.cli.sizes import byte_size
from kvstore.policies.choice import POLICIES
from kvstore.policies.replay import Outcome, replay

if TYPE_CHECKING:
    from kvstore.policies.trace import Trace

CAPACITIES = ("1%", "3%", "10%", "30%")
OPTIMUM = "belady"
WIDTH = 120
NEEDS = ("zstandard", "matplotlib")
INSTALL = "pip install 'llm-kvstore[bench]'"
#: Tenths of a bit an element, as measured without a profile (docs/codec-evaluation.md): high, medium, low.
QUALITY_SIZES = (59, 43, 27)
QUALITIES = ("high", "medium", "low")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True)
class Options:
    """`capacities`: of the trace's unique blocks ("1%"), or sizes ("10GiB"), which need `block_bytes`.

    `degrade`: also replay tiers whose cold objects lose quality layers before anything goes.
    """

    capacities: Sequence[str] = CAPACITIES
    policies: Sequence[str] = tuple(POLICIES)
    block_bytes: str = ""
    degrade: bool = False
    plot: Path | None = None


@dataclass(frozen=True)
class Capacity:
    name: str
    blocks: int


@dataclass(frozen=True)
class Replayed:
    """`floor`: the coarsest quality that an object may be left at; `high` is none lost."""

    policy: str
    capacity: Capacity
    floor: str
    outcome: Outcome


def bench_trace(path: Path, options: Options, json: bool) -> None:
    """Raises CommandFailed, in one line, where the file or an option cannot be used."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandFailed(f"bench trace needs {', '.join(missing)}: {INSTALL}", ExitCode.USAGE)
    unknown = [name for name in options.policies if name not in POLICIES]
    if unknown:
        raise CommandFailed(f"--policy {unknown[0]}: there are {', '.join(POLICIES)}", ExitCode.USAGE)
    from kvstore.cli import trace_plot
    from kvstore.policies import trace as traces

    if options.plot is not None:
        trace_plot.check(options.plot)
    try:
        trace = traces.load(path)
    except traces.TraceUnusable as error:
        raise CommandFailed(str(error), ExitCode.USAGE) from None
    capacities = [_capacity(text, trace.unique_blocks, options.block_bytes) for text in options.capacities]
    results = _replay_all(trace, capacities, options)
    if options.plot is not None:
        trace_plot.plot(trace.name, results, _infinite(trace), options.plot)
    if json:
        render.print_json(_report_json(trace, results))
        return
    # In a file, or behind a pipe, no width is given and nothing may be cut off.
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for table in _tables(trace, results):
        console.print(table)


def _replay_all(trace: Trace, capacities: Sequence[Capacity], options: Options) -> list[Replayed]:
    from kvstore.policies.belady import optimum

    floors = QUALITIES if options.degrade else QUALITIES[:1]
    rounds = [
        (policy, capacity, floor) for floor in floors for policy in dict.fromkeys(options.policies)
        for capacity in capacities
    ]  # fmt: skip
    results = [Replayed(OPTIMUM, capacity, QUALITIES[0], optimum(trace, capacity.blocks)) for capacity in capacities]
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(rounds) * len(trace.requests))
        for policy, capacity, floor in rounds:
            bar.update(task, description=f"{policy}, {capacity.name}" + (f", to {floor}" if options.degrade else ""))
            sizes = QUALITY_SIZES[: QUALITIES.index(floor) + 1]
            outcome = replay(
                trace, POLICIES[policy](), capacity.blocks * sizes[0], sizes, lambda done: bar.advance(task, done)
            )
            results.append(Replayed(policy, capacity, floor, outcome))
    return results


def _capacity(text: str, unique_blocks: int, block_bytes: str) -> Capacity:
    percent = _PERCENT.fullmatch(text.strip())
    if percent is not None:
        blocks = int(unique_blocks * float(percent[1]) / 100)
    elif not block_bytes:
        raise CommandFailed(
            f'--capacity {text}: say how large a block is with --block-bytes, or give a share such as "10%"',
            ExitCode.USAGE,
        )
    else:
        blocks = byte_size("--capacity", text) // max(byte_size("--block-bytes", block_bytes), 1)
    if blocks < 1:
        raise CommandFailed(f"--capacity {text}: holds no block; the trace has {unique_blocks}", ExitCode.USAGE)
    return Capacity(text, blocks)


def _infinite(trace: Trace) -> float:
    """Hit rate of a cache that holds everything."""
    return 1 - trace.unique_blocks / trace.blocks


def _report_json(trace: Trace, results: Sequence[Replayed]) -> dict[str, Any]:
    return {
        "trace": trace.name,
        "requests": len(trace.requests),
        "blocks": trace.blocks,
        "unique_blocks": trace.unique_blocks,
        "ids_are_prefix_hashes": not trace.renamed,
        "infinite_hit_rate": _infinite(trace),
        "results": [
            {
                "policy": result.policy,
                "capacity": result.capacity.name,
                "capacity_blocks": result.capacity.blocks,
                "floor": result.floor,
                "hit_rate": result.outcome.hit_rate,
                "token_hit_rate": _token_hit_rate(trace, result.outcome),
                **asdict(result.outcome),
                "hits_by_quality": dict(zip(QUALITIES, result.outcome.hits_by_quality, strict=False)),
            }
            for result in results
        ],
    }


def _token_hit_rate(trace: Trace, outcome: Outcome) -> float | None:
    return None if outcome.hit_tokens is None else outcome.hit_tokens / max(sum(trace.tokens), 1)


def _tables(trace: Trace, results: Sequence[Replayed]) -> list[Table]:
    title = (
        f"{trace.name}: {len(trace.requests)} requests, {trace.blocks} blocks, {trace.unique_blocks} unique; "
        f"an infinite cache hits {100 * _infinite(trace):.1f} %"
    )
    note = "% of blocks that hit, in the contiguous stored prefix" + (
        "; in brackets % of prompt tokens" if trace.tokens else ""
    )
    if trace.renamed:
        note += ". Ids follow different ids in this trace, so blocks are told apart by their whole prefix."
    capacities = list(dict.fromkeys(result.capacity for result in results))
    table = Table("policy", title=title, caption=note, title_justify="left", caption_justify="left")
    for capacity in capacities:
        table.add_column(f"{capacity.name}\n{capacity.blocks} blocks", justify="right")
    whole = [result for result in results if result.floor == QUALITIES[0]]
    for policy in dict.fromkeys(result.policy for result in whole):
        cells = [_cell(trace, result.outcome) for result in whole if result.policy == policy]
        table.add_row(f"{policy} (optimum)" if policy == OPTIMUM else policy, *cells, end_section=policy == OPTIMUM)
    return [table, *([_degraded_table(results, capacities)] if len(whole) < len(results) else [])]


def _cell(trace: Trace, outcome: Outcome) -> str:
    tokens = _token_hit_rate(trace, outcome)
    return f"{100 * outcome.hit_rate:.2f}" + ("" if tokens is None else f" ({100 * tokens:.2f})")


def _degraded_table(results: Sequence[Replayed], capacities: Sequence[Capacity]) -> Table:
    table = Table(
        "policy", "floor", title="Cold objects lose quality layers first, at equal bytes", title_justify="left",
        caption=f"% of blocks that hit, and at which quality ({' + '.join(QUALITIES)})", caption_justify="left",
    )  # fmt: skip
    for capacity in capacities:
        table.add_column(capacity.name, justify="right")
    rows: dict[tuple[str, str], list[str]] = {}
    for result in results:
        if result.policy != OPTIMUM:
            outcome = result.outcome
            shares = " + ".join(f"{100 * hits / outcome.blocks:.1f}" for hits in outcome.hits_by_quality)
            cell = f"{100 * outcome.hit_rate:.2f}" + (f" = {shares}" if result.floor != QUALITIES[0] else "")
            rows.setdefault((result.policy, result.floor), []).append(cell)
    for (policy, floor), cells in sorted(rows.items(), key=lambda row: (row[0][0], QUALITIES.index(row[0][1]))):
        table.add_row(policy, floor, *cells, end_section=floor == QUALITIES[-1])
    return table
