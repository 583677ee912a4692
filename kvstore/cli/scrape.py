"""What only a node's Prometheus endpoint tells: latencies, queues, the states of its tiers."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections import defaultdict
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from kvstore.cli.outcome import CommandFailed, ExitCode

_SECONDS = "kvstore_operation_seconds"
_QUEUES = {tier: f"kvstore_{tier}_queue_bytes" for tier in ("disk", "redis", "upstream")}


@dataclass(frozen=True)
class Scrape:
    """`buckets`: operation → upper bound, seconds → how many took at most that long since the node's start."""

    buckets: dict[str, dict[float, float]]
    queue_bytes: dict[str, float]
    states: dict[str, str]


@dataclass(frozen=True)
class Latency:
    """Quantiles are those of `histogram_quantile` in Prometheus: linear inside a bucket."""

    count: float
    p50_s: float
    p99_s: float


def scrape(url: str, timeout_s: float) -> Scrape:
    """Raises CommandFailed."""
    if not url.startswith(("http://", "https://")):
        raise CommandFailed(f"{url}: metrics are at http://host:port/metrics", ExitCode.USAGE)
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:  # noqa: S310 - the scheme was checked
            text = response.read().decode()
        families = list(text_string_to_metric_families(text))
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise CommandFailed(
            f"{url} cannot be read: {reason}: is metrics_listen set?", ExitCode.UNREACHABLE
        ) from None  # fmt: skip
    buckets: defaultdict[str, dict[float, float]] = defaultdict(dict)
    gauges: dict[str, float] = {}
    states: dict[str, str] = {}
    for sample in (sample for family in families for sample in family.samples):
        if sample.name == f"{_SECONDS}_bucket":
            buckets[sample.labels["operation"]][float(sample.labels["le"])] = sample.value
        elif sample.name == "kvstore_tier_state" and sample.value:
            states[sample.labels["tier"]] = sample.labels["state"]
        elif not sample.labels:
            gauges[sample.name] = sample.value
    queues = {tier: gauges[name] for tier, name in _QUEUES.items() if name in gauges}
    return Scrape(dict(buckets), queues, states)


def latencies(before: Scrape | None, after: Scrape) -> dict[str, Latency]:
    """By operation, of what ended between two scrapes (None: since the node's start)."""
    found = {}
    for operation, buckets in sorted(after.buckets.items()):
        earlier = {} if before is None else before.buckets.get(operation, {})
        counts = {bound: count - earlier.get(bound, 0.0) for bound, count in sorted(buckets.items())}
        count = max(counts.values(), default=0.0)
        if count > 0:
            found[operation] = Latency(count, _quantile(counts, 0.5), _quantile(counts, 0.99))
    return found


def _quantile(counts: dict[float, float], q: float) -> float:
    """`counts` are cumulative, by rising bound. Beyond the last finite bound nothing is known: that bound."""
    rank = q * max(counts.values())
    low_s = below = 0.0
    for bound_s, count in counts.items():
        if bound_s == float("inf"):
            break
        if count >= rank:
            return low_s + (bound_s - low_s) * ((rank - below) / (count - below) if count > below else 1.0)
        low_s, below = bound_s, count
    return low_s
