"""What the node counts. One registry, handed in; every swallowed error has a counter here and one log line."""

from __future__ import annotations

import logging
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge

from kvstore.tiers.base import Tier

log = logging.getLogger(__name__)


class NodeMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"kvstore_{name}", text, labels, registry=registry)

        self.lookup_chunks = counter("lookup_chunks", "Chunks asked for in lookups, by result.", "result")
        self.reads = counter("reads", "Objects read, by the tier that answered; tier none is a miss.", "tier")
        self.read_bytes = counter("read_bytes", "Bytes of objects read, by tier.", "tier")
        self.puts = counter("puts", "Objects offered, by outcome.", "outcome")
        self.put_bytes = counter("stored_bytes", "Bytes of objects stored.")
        self.evictions = counter("evictions", "Objects evicted, by tier and reason.", "tier", "reason")
        self.integrity_failures = counter(
            "integrity_failures", "Objects whose bytes were not what they should be, by where and what.", "tier", "code"
        )
        self.tier_failures = counter("tier_failures", "Operations a tier's medium refused.", "tier", "operation")
        self._logged: set[str] = set()

    def watch(self, registry: CollectorRegistry, tiers: list[Tier], staged_bytes: Callable[[], int]) -> None:
        """Gauges that read the node itself whenever they are scraped."""

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"kvstore_{name}", text, labels, registry=registry)

        used = gauge("tier_used_bytes", "Bytes taken in a tier, its overhead included.", "tier")
        capacity = gauge("tier_capacity_bytes", "Bytes that a tier may take.", "tier")
        objects = gauge("tier_objects", "Objects in a tier.", "tier")
        for tier in tiers:
            used.labels(tier.name).set_function(lambda tier=tier: tier.used_bytes)  # type: ignore[misc]
            capacity.labels(tier.name).set(tier.capacity_bytes)
            objects.labels(tier.name).set_function(lambda tier=tier: tier.objects)  # type: ignore[misc]
        gauge("staged_bytes", "Bytes reserved by puts in flight.").set_function(staged_bytes)

    def warn_once(self, kind: str, message: str, *arguments: object) -> None:
        """One log line a kind; what happens again is in the counters."""
        if kind not in self._logged:
            self._logged.add(kind)
            log.warning(message + " (logged once; counted from now on)", *arguments)

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
