"""What the client counts (`kvstore_client_*`), and its one log line per cause of trouble.

`reason` is an ErrorCode's value, or one of the honest misses: "absent" (not stored), "quality" (stored, but worse than
asked for) and "slower" (stored, but the planner expects recomputing to be faster).
"""

from __future__ import annotations

import logging
import threading
from functools import cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

ABSENT = "absent"
QUALITY = "quality"
SLOWER = "slower"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

log = logging.getLogger("kvstore_client")
_making = threading.Lock()


class ClientMetrics:
    """Metrics of all clients that share a registry; get it from `client_metrics`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.misses = Counter(
            "kvstore_client_misses", "Lookups and gets that stopped short of the prompt's chunks, by reason.",
            ("reason",), registry=registry,
        )  # fmt: skip
        self.rejections = Counter(
            "kvstore_client_rejected_chunks", "Chunks that a put did not store, by reason.",
            ("reason",), registry=registry,
        )  # fmt: skip
        self.failures = Counter(
            "kvstore_client_failures", "Attempts of a call at one node that failed, by reason.",
            ("call", "reason"), registry=registry,
        )  # fmt: skip
        self.circuit_changes = Counter(
            "kvstore_client_circuit_changes", "Of several nodes: one asked behind the others (open) or not (closed).",
            ("node", "state"), registry=registry,
        )  # fmt: skip
        self.planner_stops = Counter(
            "kvstore_client_planner_stops", "Gets of which the planner left something to the engine, by reason.",
            ("reason",), registry=registry,
        )  # fmt: skip
        tokens = Counter(
            "kvstore_client_tokens", "Tokens of gets, restored (hit) or left to recompute (miss).",
            ("outcome",), registry=registry,
        )  # fmt: skip
        self.tokens_hit, self.tokens_missed = tokens.labels("hit"), tokens.labels("miss")
        moved = Counter(
            "kvstore_client_stream_bytes", "Bytes of objects received (in) and sent (out).",
            ("direction",), registry=registry,
        )  # fmt: skip
        self.profiles = Counter(
            "kvstore_client_profiles", "Profiles loaded from a node, stored on one, or learned.",
            ("event",), registry=registry,
        )  # fmt: skip
        self.background_puts = Gauge(
            "kvstore_client_background_puts", "Background puts that wait or run.", registry=registry
        )
        self.background_bytes = Gauge(
            "kvstore_client_background_bytes", "KV of background puts that wait or run.", registry=registry
        )
        self.background_dropped = Counter(
            "kvstore_client_background_dropped", "Background puts that were dropped, by reason.",
            ("reason",), registry=registry,
        )  # fmt: skip
        self.bytes_received, self.bytes_sent = moved.labels("in"), moved.labels("out")
        self.seconds = Histogram(
            "kvstore_client_call_seconds", "Duration of calls, coding included.", ("call",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip


def client_metrics(registry: CollectorRegistry = REGISTRY) -> ClientMetrics:
    """A registry takes each metric once, so clients that share a registry share the metrics."""
    with _making:  # a cache alone would let two threads make them
        return _client_metrics(registry)


class OncePerReason:
    """Logs the first event of each kind; the counters have the rest."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] = set()

    def warn(self, call: str, reason: str, details: str) -> None:
        if (call, reason) not in self._seen:
            self._seen.add((call, reason))
            log.warning("%s: %s: %s (logged once; see kvstore_client_* metrics)", call, reason, details)


@cache
def _client_metrics(registry: CollectorRegistry) -> ClientMetrics:
    return ClientMetrics(registry)
