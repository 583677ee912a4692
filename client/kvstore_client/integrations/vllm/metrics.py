"""What the connector counts: in the Prometheus registry of the process that its side runs in (`kvstore_vllm_*`), and as
what has been added since it was last taken, which vLLM carries to its own endpoint (`vllm:kvstore_*`)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypedDict

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

from kvstore_client.metrics import OncePerReason

_making = threading.Lock()


class Added(TypedDict):
    """`counters`: name → value of its label ("": it has none) → what was added. `seconds`: name → each duration."""

    counters: dict[str, dict[str, float]]
    seconds: dict[str, list[float]]


@dataclass(frozen=True)
class CounterSpec:
    documentation: str
    label: str | None = None

    @property
    def labels(self) -> list[str]:
        return [] if self.label is None else [self.label]


#: docs/vllm.md says of each what it means and when to look.
COUNTERS = {
    "lookups": CounterSpec("Requests looked up: hit, miss, failed, skipped (the node has been failing).", "outcome"),
    "circuit_changes": CounterSpec("The node no longer asked (open) or asked again (closed).", "state"),
    "plans": CounterSpec(
        "What to do with a prefix found: load, part, probe (nothing measured yet), compute.", "choice"
    ),
    "computes": CounterSpec(
        "Prefixes found and not loaded: slow (as measured), doubted (a load was just given up), unmeasured.", "reason"
    ),
    "loads": CounterSpec("Loads: whole, part (the rest is recomputed), failed.", "outcome"),
    "short_loads": CounterSpec(
        "Loads that did not bring all: late, silent, slow, doubted, unmeasured: the planner; absent, quality, errors.",
        "reason",
    ),
    "saves": CounterSpec("Saves: stored, rejected, failed, full (no room on the way).", "outcome"),
    "tokens": CounterSpec("Tokens loaded into blocks (load) and saved from them (save).", "direction"),
    "unknown_requests": CounterSpec("Requests that tokens do not identify: neither loaded nor saved."),
}
SECONDS = {
    "lookup_seconds": "Duration of lookups.",
    "load_seconds": "Duration of loads, decoding included.",
    "save_seconds": "Duration of saves, from the copy to the node's answer, encoding and waiting included.",
}
BUCKETS: Sequence[float] = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip


class ConnectorMetrics:
    """Get it from `connector_metrics`. `log`: one line for the first trouble of each kind. Its calls may be made from
    any thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.log = OncePerReason()
        self._lock = threading.Lock()
        self._added: Added | None = None
        self._counters = {
            name: Counter(f"kvstore_vllm_{name}", spec.documentation, spec.labels, registry=registry)
            for name, spec in COUNTERS.items()
        }
        self._seconds = {
            name: Histogram(f"kvstore_vllm_{name}", documentation, buckets=BUCKETS, registry=registry)
            for name, documentation in SECONDS.items()
        }

    def count(self, name: str, label: str = "", amount: float = 1) -> None:
        """`name`: one of COUNTERS; `label`: the value of its label, if it has one."""
        counter = self._counters[name]
        (counter.labels(label) if label else counter).inc(amount)
        if amount:
            with self._lock:
                by_label = self._pending()["counters"].setdefault(name, {})
                by_label[label] = by_label.get(label, 0) + amount

    def observe(self, name: str, seconds: float) -> None:
        """`name`: one of SECONDS."""
        self._seconds[name].observe(seconds)
        with self._lock:
            self._pending()["seconds"].setdefault(name, []).append(seconds)

    def take(self) -> Added | None:
        """What was added since the last call; None: nothing. Asked for in every step of the engine."""
        if self._added is None:  # without the lock: what is missed now is there in the next step
            return None
        with self._lock:
            added, self._added = self._added, None
        return added

    def _pending(self) -> Added:
        if self._added is None:
            self._added = Added(counters={}, seconds={})
        return self._added


def merged(first: Added, second: Added) -> Added:
    """What both have added."""
    counters = {name: dict(by_label) for name, by_label in first["counters"].items()}
    for name, by_label in second["counters"].items():
        into = counters.setdefault(name, {})
        for label, amount in by_label.items():
            into[label] = into.get(label, 0) + amount
    seconds = {name: list(each) for name, each in first["seconds"].items()}
    for name, each in second["seconds"].items():
        seconds.setdefault(name, []).extend(each)
    return Added(counters=counters, seconds=seconds)


def connector_metrics(registry: CollectorRegistry = REGISTRY) -> ConnectorMetrics:
    """Both sides may live in one process: they share them."""
    with _making:
        return _connector_metrics(registry)


@cache
def _connector_metrics(registry: CollectorRegistry) -> ConnectorMetrics:
    return ConnectorMetrics(registry)
