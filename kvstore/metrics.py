"""What the node counts. One registry, handed in; every swallowed error has a counter here and one log line."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import get_args

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from kvstore import __version__
from kvstore.tiers import disk
from kvstore.tiers.base import Tier
from kvstore_client import circuit
from kvstore_codec import Quality

log = logging.getLogger(__name__)

_SECONDS = (1e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BYTES = tuple(float(1 << power) for power in range(12, 30, 2))
_REUSE_SECONDS = (0.1, 1.0, 10.0, 60.0, 300.0, 900.0, 3600.0, 4 * 3600.0, 24 * 3600.0, 7 * 24 * 3600.0)

#: What one tier alone can tell: metric → (text, tier, attribute).
_OF_ONE_TIER = {
    "host_memory_bytes": ("Memory committed for the host tier.", "host", "memory_bytes"),
    "host_fragmentation_ratio": (
        "Free memory that no object of a page or more can use, as a part of the capacity.",
        "host", "fragmentation_ratio",
    ),
    "host_waiting_bytes": ("Bytes of objects that are gone but still being read.", "host", "waiting_bytes"),
    "disk_stray_bytes": ("Bytes that the file system would not give back.", "disk", "stray_bytes"),
}  # fmt: skip
_STATES: Mapping[str, tuple[str, ...]] = {"disk": get_args(disk.State), "redis": get_args(circuit.State)}


class ReuseDistance(Collector):
    """Seconds between uses of a chunk, counted a whole prefix at a time: a lookup of thousands of chunks must not cost
    thousands of observations."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._counts = np.zeros(len(_REUSE_SECONDS) + 1, np.int64)
        self._sum_s = 0.0
        registry.register(self)

    def observe(self, idle_s: npt.NDArray[np.float64]) -> None:
        self._counts += np.bincount(np.searchsorted(_REUSE_SECONDS, idle_s), minlength=len(self._counts))
        self._sum_s += float(idle_s.sum())

    def collect(self) -> Iterator[HistogramMetricFamily]:
        bounds = [*(str(bound) for bound in _REUSE_SECONDS), "+Inf"]
        buckets = list(zip(bounds, np.cumsum(self._counts).tolist(), strict=True))
        yield HistogramMetricFamily(
            "kvstore_reuse_distance_seconds", "Time between uses of a stored chunk.", buckets, self._sum_s
        )


class NodeMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"kvstore_{name}", text, labels, registry=registry)

        self.lookup_chunks = counter("lookup_chunks", "Chunks asked for in lookups, by result.", "result")
        self.reads = counter("reads", "Objects read, by the tier that answered; tier none is a miss.", "tier")
        self.read_bytes = counter("read_bytes", "Bytes of objects read, by tier.", "tier")
        self.puts = counter("puts", "Objects offered, by outcome.", "outcome")
        self.put_bytes = counter("stored_bytes", "Bytes of objects stored.")
        self.reads_by_quality = counter(
            "reads_by_quality", "Objects read, by tier and by the quality they were read at.", "tier", "quality"
        )
        self.degradations = counter(
            "degradations", "Objects that lost their finest quality layer, by tier, quality left and reason.",
            "tier", "quality", "reason",
        )  # fmt: skip
        self.admissions = counter(
            "disk_admissions", "Objects that were to go to disk, by whether they did: written or held_back.", "result"
        )
        self.leases = counter("lease_events", "Leases taken, renewed, released, and renewed too late.", "event")
        self.live_writes = counter("live_writes", "Live writes that ended, by outcome.", "outcome")
        self.live_follows = counter("live_follows", "Readers who asked for a live write, by what they found.", "result")
        self.evictions = counter("evictions", "Objects evicted, by tier and reason.", "tier", "reason")
        self.integrity_failures = counter(
            "integrity_failures", "Objects whose bytes were not what they should be, by where and what.", "tier", "code"
        )
        self.tier_failures = counter("tier_failures", "Operations a tier's medium refused.", "tier", "operation")
        self.seconds = Histogram(
            "kvstore_operation_seconds", "Duration of the engine's operations.", ("operation",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.bytes = Histogram(
            "kvstore_operation_bytes", "Bytes of objects, by operation.", ("operation",), buckets=_BYTES,
            registry=registry,
        )  # fmt: skip
        self.reuse = ReuseDistance(registry)
        self.shared_failures = counter("redis_failures", "Answers that Redis did not give, by kind.", "kind")
        self.circuit_changes = counter(
            "redis_circuit_changes", "Redis servers no longer asked (open) or asked again (closed).", "server", "state"
        )
        self.upstream_failures = counter(
            "upstream_failures", "What an upstream node did not do, by node, call and reason.", "node", "call", "reason"
        )
        self.upstream_circuits = counter(
            "upstream_circuit_changes",
            "Upstream nodes no longer asked (open) or asked again (closed).",
            "node",
            "state",
        )
        self.upstream_coalesced = counter(
            "upstream_coalesced", "Questions that waited for the answer to the same one under way, by call.", "call"
        )
        self.upstream_writes = counter(
            "upstream_writes", "Objects that were to go upstream, by what became of them.", "outcome"
        )
        self.upstream_repairs = counter(
            "upstream_repairs", "Objects that were owed to an upstream node, by what became of them.", "outcome"
        )
        self.upstream_deletes = counter(
            "upstream_deletes", "Deletes that an upstream node missed, by what became of them.", "outcome"
        )
        self.upstream_seconds = Histogram(
            "kvstore_upstream_seconds", "Duration of calls upstream, whole streams included.", ("call",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.prefetched_chunks = counter(
            "prefetched_chunks", "Chunks that hints named and memory did not hold, by what became of them.", "result"
        )
        self._logged: set[str] = set()

    def count_read(self, tier: str, quality: Quality, length: int) -> None:
        self.reads.labels(tier).inc()
        self.reads_by_quality.labels(tier, quality.label).inc()
        self.read_bytes.labels(tier).inc(length)
        self.bytes.labels("read").observe(length)

    def count_reads(self, tier: str, qualities: Sequence[Quality], lengths: Sequence[int]) -> None:
        """`count_read` of many."""
        self.reads.labels(tier).inc(len(lengths))
        self.read_bytes.labels(tier).inc(sum(lengths))
        for quality in set(qualities):
            self.reads_by_quality.labels(tier, quality.label).inc(qualities.count(quality))
        observe = self.bytes.labels("read").observe
        for length in lengths:
            observe(length)

    def watch(
        self, registry: CollectorRegistry, tiers: list[Tier], gauges: Mapping[str, tuple[str, Callable[[], float]]]
    ) -> None:
        """Gauges that read the node whenever they are scraped: of each tier, and `gauges`, name → (text, value)."""

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"kvstore_{name}", text, labels, registry=registry)

        used = gauge("tier_used_bytes", "Bytes taken in a tier, its overhead included.", "tier")
        capacity = gauge("tier_capacity_bytes", "Bytes that a tier may take.", "tier")
        objects = gauge("tier_objects", "Objects in a tier.", "tier")
        for tier in tiers:
            used.labels(tier.name).set_function(lambda tier=tier: tier.used_bytes)  # type: ignore[misc]
            capacity.labels(tier.name).set_function(lambda tier=tier: tier.capacity_bytes)  # type: ignore[misc]
            objects.labels(tier.name).set_function(lambda tier=tier: tier.objects)  # type: ignore[misc]
        for name, (text, value) in gauges.items():
            gauge(name, text).set_function(value)
        by_name = {tier.name: tier for tier in tiers}
        for name, (text, owner, attribute) in _OF_ONE_TIER.items():
            if owner in by_name:
                gauge(name, text).set_function(functools.partial(getattr, by_name[owner], attribute))
        state = gauge("tier_state", "1 for the state that a tier is in, 0 for the others.", "tier", "state")
        for owner, states in _STATES.items():
            for each in states if owner in by_name else ():
                state.labels(owner, each).set_function(
                    lambda tier=by_name[owner], each=each: tier.state == each  # type: ignore[misc]
                )
        Info("kvstore_build", "The version that runs.", registry=registry).info({"version": __version__})
        ProcessCollector(registry=registry)

    def warn_once(self, kind: str, message: str, *arguments: object) -> None:
        """One log line a kind; what happens again is in the counters."""
        if kind not in self._logged:
            self._logged.add(kind)
            log.warning(message + " (logged once; counted from now on)", *arguments, extra={"kind": kind})

    def snapshot(self) -> dict[str, int]:
        """Every counter, as name or name.label.label."""
        found: dict[str, int] = {}
        for counter in vars(self).values():
            for family in counter.collect() if isinstance(counter, Counter) else ():
                for sample in family.samples:
                    if sample.name.endswith("_total"):
                        name = family.name.removeprefix("kvstore_")
                        found[".".join((name, *sample.labels.values()))] = int(sample.value)
        return found
