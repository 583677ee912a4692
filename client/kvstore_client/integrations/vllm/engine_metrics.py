"""The connector's metrics in vLLM's own hands: each step's additions, and what its endpoint and log make of them.

Both sides' additions reach the process that serves /metrics with the outputs of the engine's steps; what is added while
it stands still appears with its next step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvstore_client.integrations.vllm.metrics import BUCKETS, COUNTERS, SECONDS, Added, merged


def _nothing() -> Added:
    return Added(counters={}, seconds={})


@dataclass
class StepStats(KVConnectorStats):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """`data`: an `Added`, which is made of what vLLM's serialisation knows."""

    data: Added = field(default_factory=_nothing)

    def reset(self) -> None:
        self.data = _nothing()

    def aggregate(self, other: StepStats) -> StepStats:
        return StepStats(merged(self.data, other.data))

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log: sums of counters, number and mean of durations."""
        said: dict[str, int | float] = {
            f"kvstore {name} {label}".rstrip(): amount
            for name, by_label in self.data["counters"].items()
            for label, amount in by_label.items()
        }
        for name, seconds in self.data["seconds"].items():
            said[f"kvstore {name} mean"] = round(sum(seconds) / len(seconds), 4)
        return said

    def is_empty(self) -> bool:
        return not self.data["counters"] and not self.data["seconds"]


class EngineMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """`vllm:kvstore_*`, with vLLM's own labels before ours."""

    def __init__(
        self, vllm_config: Any, metric_types: dict[type[Any], type[Any]], labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:  # fmt: skip
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: metric_types[Counter](
                name=f"vllm:kvstore_{name}", documentation=spec.documentation, labelnames=[*labelnames, *spec.labels]
            )
            for name, spec in COUNTERS.items()
        }
        self._seconds = {
            name: metric_types[Histogram](
                name=f"vllm:kvstore_{name}", documentation=documentation, buckets=BUCKETS, labelnames=labelnames
            )
            for name, documentation in SECONDS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """`transfer_stats_data`: a StepStats' data."""
        ours = self.per_engine_labelvalues[engine_idx]
        for name, by_label in transfer_stats_data["counters"].items():
            for label, amount in by_label.items():
                self._counters[name].labels(*ours, *([label] if label else [])).inc(amount)
        for name, seconds in transfer_stats_data["seconds"].items():
            for each in seconds:
                self._seconds[name].labels(*ours).observe(each)
