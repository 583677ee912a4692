"""`kvstore admin top`: asks a node again and again, and shows what it did in between.

A node that goes away is one line, and `top` goes on asking: it is what one watches a restart with.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from kvstore.cli import render
from kvstore.cli.outcome import CommandFailed, ExitCode
from kvstore.cli.rates import Rates, Sample, rates_json
from kvstore.cli.remote import Remote, Target, connect
from kvstore.cli.scrape import scrape
from kvstore.cli.top_view import view
from kvstore_proto.v1 import store_pb2 as pb


@dataclass(frozen=True)
class Options:
    """`interval_s` between two looks at the node. `metrics`: URL of its Prometheus endpoint."""

    interval_s: float
    once: bool
    metrics: str | None
    json: bool
    deadline_s: float


@dataclass(frozen=True)
class Outage:
    """Why there is no sample."""

    problem: str


def top(target: Target, options: Options) -> None:
    """Until ctrl-C, which is its usual end. Raises CommandFailed; with `once` also where the node cannot be reached."""
    if options.once:
        _once(target, options)
        return
    with contextlib.suppress(KeyboardInterrupt):
        if options.json:
            _print_lines(target, options)
        else:
            _show(target, options)


def _once(target: Target, options: Options) -> None:
    with connect(target, options.deadline_s) as remote:
        before = _sample(remote, options)
        _wait(options.interval_s)
        rates = Rates(before, _sample(remote, options))
    if options.json:
        render.print_json(rates_json(rates, target.address))
    else:
        Console().print(view(rates, target.address))


def _print_lines(target: Target, options: Options) -> None:
    """One JSON object a line, for scripts; outages on stderr."""
    for look in _changes(target, options):
        if isinstance(look, Outage):
            print(f"kvstore: trying again: {look.problem}", file=sys.stderr)
        else:
            print(json.dumps(rates_json(look, target.address)), flush=True)


def _show(target: Target, options: Options) -> None:
    console = Console()
    shown: RenderableType = Text(f"asking {target} …")
    with Live(shown, console=console, screen=console.is_terminal, auto_refresh=False) as live:
        for look in _changes(target, options):
            if isinstance(look, Outage):
                problem = Text(f"trying again: {look.problem}", style="bold red", no_wrap=True, overflow="ellipsis")
                live.update(Group(problem, shown), refresh=True)
            else:
                shown = view(look, target.address)
                live.update(shown, refresh=True)


def _changes(target: Target, options: Options) -> Iterator[Rates | Outage]:
    """What happened between looks that succeeded; an outage once, whatever it lasts."""
    before: Sample | None = None
    away = False
    for look in _looks(target, options):
        if isinstance(look, Outage):
            if not away:
                yield look
            away = True
            continue
        if before is not None:
            yield Rates(before, look)
        before, away = look, False


def _looks(target: Target, options: Options) -> Iterator[Sample | Outage]:
    while True:
        try:
            with connect(target, options.deadline_s) as remote:
                while True:
                    yield _sample(remote, options)
                    _wait(options.interval_s)
        except CommandFailed as error:
            if error.exit_code is not ExitCode.UNREACHABLE:
                raise
            yield Outage(str(error))
            _wait(options.interval_s)


def _sample(remote: Remote, options: Options) -> Sample:
    began_s = time.perf_counter()
    stat = remote.store.Stat(pb.StatRequest(), timeout=options.deadline_s)
    answer_s = time.perf_counter() - began_s
    return Sample(answer_s, stat, None if options.metrics is None else scrape(options.metrics, options.deadline_s))


def _wait(seconds: float) -> None:
    threading.Event().wait(seconds)
