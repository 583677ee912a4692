"""`kvstore admin top` as a person sees it."""

from __future__ import annotations

import datetime

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kvstore.cli import render
from kvstore.cli.rates import Rates
from kvstore_proto.v1 import store_pb2 as pb

BAR_WIDTH = 12
HEALTHY = ("ok", "closed")  # states of the disk, and of the circuits to Redis and upstream


def view(rates: Rates, target: str) -> RenderableType:
    parts: list[RenderableType] = [_headline(rates, target), "", _tiers(rates), "", _traffic(rates)]
    if rates.latencies:
        parts += ["", _latencies(rates)]
    return Group(*parts)


def _headline(rates: Rates, target: str) -> Text:
    stat = rates.now.stat
    up = datetime.timedelta(seconds=int(stat.uptime_seconds))
    return Text(
        f"{stat.node_id} · kvstore {stat.version} · {target} · up {up} · answers in {rates.now.answer_s * 1000:.1f} ms",
        style="bold",
    )


def _tiers(rates: Rates) -> Table:
    table = Table(
        "tier", "", "full", "used", "capacity", "objects", "reads/s", "read/s", box=None, padding=(0, 2, 0, 0)
    )
    states = {} if rates.now.scraped is None else rates.now.scraped.states
    for tier in rates.now.stat.tiers:
        name = render.tier_name(tier.tier)
        state = states.get(name, HEALTHY[0])
        table.add_row(
            name if state in HEALTHY else Text(f"{name} {state}", style="bold red"),
            _bar(tier),
            f"{100 * tier.used_bytes / tier.capacity_bytes:.1f} %" if tier.capacity_bytes else "–",
            render.size(tier.used_bytes),
            render.size(tier.capacity_bytes) if tier.capacity_bytes else "–",
            str(tier.objects),
            _number(rates.rate("reads", name)),
            render.size(rates.rate("read_bytes", name)),
        )
    for column in table.columns[2:]:
        column.justify = "right"
        column.no_wrap = True
    return table


def _bar(tier: pb.TierStat) -> RenderableType:
    if not tier.capacity_bytes:
        return ""
    used = min(tier.used_bytes, tier.capacity_bytes)
    # `finished` is what the bar turns to when it is full, which is the usual state of a cache: no other colour.
    return ProgressBar(tier.capacity_bytes, used, width=BAR_WIDTH, finished_style="bar.complete")


def _traffic(rates: Rates) -> Table:
    stat = rates.now.stat
    grid = Table.grid(padding=(0, 2))
    hit = "–" if rates.hit_ratio is None else f"{100 * rates.hit_ratio:.1f} %"
    grid.add_row(
        "lookups",
        f"{_number(rates.asked)} chunks/s, {hit} hit, {_number(rates.rate('lookup_chunks', 'shared'))}/s shared, "
        f"{_number(rates.rate('lookup_chunks', 'upstream'))}/s upstream",
    )
    for upstream in stat.upstreams:
        style = "" if upstream.state in HEALTHY else "bold red"
        grid.add_row("upstream", Text(f"{upstream.address} {render.upstream_state(upstream.state)}", style=style))
    grid.add_row("reads", _by_label(rates, "reads_by_quality") + f", {_number(rates.rate('reads', 'none'))}/s missed")
    grid.add_row("puts", _by_label(rates, "puts") + f", {render.size(rates.rate('stored_bytes'))}/s")
    tiers = [render.tier_name(tier.tier) for tier in stat.tiers]
    grid.add_row("evicted", ", ".join(f"{_number(rates.rate('evictions', tier))}/s {tier}" for tier in tiers))
    grid.add_row("shrunk", ", ".join(f"{_number(rates.rate('degradations', tier))}/s {tier}" for tier in tiers))
    grid.add_row(
        "kept",
        f"{stat.objects} objects in {stat.namespaces} namespaces, {stat.leases} leases, "
        f"{render.size(stat.pinned_bytes)} pinned",
    )
    queues = {} if rates.now.scraped is None else rates.now.scraped.queue_bytes
    grid.add_row(
        "on the way",
        ", ".join(
            [f"{stat.staged_objects} objects, {render.size(stat.staged_bytes)} staged"]
            + [f"{render.size(size)} to {tier}" for tier, size in queues.items()]
        ),
    )
    trouble = rates.rate("integrity_failures") + rates.rate("tier_failures")
    grid.add_row(
        "trouble",
        Text(
            f"{_number(rates.rate('integrity_failures'))}/s damaged, {_number(rates.rate('tier_failures'))}/s failed",
            style="bold red" if trouble else "",
        ),
    )
    return grid


def _latencies(rates: Rates) -> Table:
    table = Table("operation", "calls/s", "p50", "p99", box=None, padding=(0, 2, 0, 0))
    for name, latency in rates.latencies.items():
        table.add_row(
            name,
            _number(latency.count / rates.seconds),
            f"{latency.p50_s * 1000:.2f} ms",
            f"{latency.p99_s * 1000:.2f} ms",
        )
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _by_label(rates: Rates, name: str) -> str:
    found = {label: rate for label, rate in rates.by_last_label(name).items() if rate}
    return ", ".join(f"{_number(rate)}/s {label}" for label, rate in found.items()) or "0/s"


def _number(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 or not per_second else f"{per_second:.3g}"
