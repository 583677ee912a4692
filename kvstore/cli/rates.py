"""What a node does per second: from two answers to Stat, some time apart."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from kvstore.cli import render
from kvstore.cli.scrape import Latency, Scrape, latencies
from kvstore_proto.v1 import store_pb2 as pb


@dataclass(frozen=True)
class Sample:
    """`answer_s`: how long Stat took, seen from here. `scraped`: the node's metrics, where their URL is known."""

    answer_s: float
    stat: pb.StatResponse
    scraped: Scrape | None = None


class Rates:
    """What happened between two samples of a node, `seconds` of its own time apart. A node that was restarted in
    between has done what it has done since."""

    def __init__(self, before: Sample, after: Sample) -> None:
        restarted = after.stat.uptime_seconds < before.stat.uptime_seconds
        earlier = {} if restarted else dict(before.stat.counters)
        self.seconds = after.stat.uptime_seconds - (0.0 if restarted else before.stat.uptime_seconds)
        self.now = after
        self._counts = {name: count - earlier.get(name, 0) for name, count in after.stat.counters.items()}
        self.latencies: dict[str, Latency] = {}
        if after.scraped is not None:
            self.latencies = latencies(None if restarted else before.scraped, after.scraped)

    def rate(self, *labels: str) -> float:
        """Events per second of a counter, summed over the labels that are left out."""
        return self._count(*labels) / self.seconds if self.seconds > 0 else 0.0

    def by_last_label(self, name: str) -> dict[str, float]:
        """Events per second of a counter by its last label, those of its other labels together."""
        found: defaultdict[str, float] = defaultdict(float)
        for each in sorted(self._counts):
            if each.startswith(f"{name}."):
                found[each.rpartition(".")[2]] += self.rate(*each.split("."))
        return dict(found)

    @property
    def hit_ratio(self) -> float | None:
        """Of the chunks asked for, those found here, in the shared tier or upstream; None where none was asked for."""
        asked = self._count("lookup_chunks", "hit") + self._count("lookup_chunks", "miss")
        found = sum(self._count("lookup_chunks", result) for result in ("hit", "shared", "upstream"))
        return found / asked if asked else None

    @property
    def asked(self) -> float:
        """Chunks looked up per second."""
        return self.rate("lookup_chunks", "hit") + self.rate("lookup_chunks", "miss")

    def _count(self, *labels: str) -> int:
        prefix = ".".join(labels)
        return sum(n for name, n in self._counts.items() if name == prefix or name.startswith(f"{prefix}."))


def rates_json(rates: Rates, target: str) -> dict[str, Any]:
    stat = render.stat_json(rates.now.stat)
    del stat["counters"]
    scraped = rates.now.scraped
    for tier in stat["tiers"]:
        name = tier["tier"]
        tier["reads_per_s"] = rates.rate("reads", name)
        tier["read_bytes_per_s"] = rates.rate("read_bytes", name)
        tier["evictions_per_s"] = rates.rate("evictions", name)
        tier["degradations_per_s"] = rates.rate("degradations", name)
        tier["failures_per_s"] = rates.rate("tier_failures", name)
    return {
        "target": target,
        "interval_seconds": rates.seconds,
        "answer_ms": rates.now.answer_s * 1000,
        **stat,
        "lookup_chunks_per_s": rates.asked,
        "hit_ratio": rates.hit_ratio,
        "misses_of_reads_per_s": rates.rate("reads", "none"),
        "reads_by_quality_per_s": rates.by_last_label("reads_by_quality"),
        "puts_per_s": rates.by_last_label("puts"),
        "stored_bytes_per_s": rates.rate("stored_bytes"),
        "integrity_failures_per_s": rates.rate("integrity_failures"),
        "latencies": None
        if scraped is None
        else {
            name: {
                "per_s": latency.count / rates.seconds,
                "p50_ms": latency.p50_s * 1000,
                "p99_ms": latency.p99_s * 1000,
            }
            for name, latency in rates.latencies.items()
        },
        "queue_bytes": None if scraped is None else scraped.queue_bytes,
        "tier_states": None if scraped is None else scraped.states,
    }
