"""What the connector counts (`kvstore_vllm_*`), in the registry of the process that its side runs in."""

from __future__ import annotations

import threading
from functools import cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter

from kvstore_client.metrics import OncePerReason

_making = threading.Lock()


class ConnectorMetrics:
    """Get it from `connector_metrics`. `log`: one line for the first trouble of each kind."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.log = OncePerReason()
        self.lookups = Counter(
            "kvstore_vllm_lookups", "Requests looked up, by outcome: hit, miss, failed.", ("outcome",),
            registry=registry,
        )  # fmt: skip
        self.loads = Counter(
            "kvstore_vllm_loads", "Loads by outcome: whole, part (the rest is recomputed), failed.", ("outcome",),
            registry=registry,
        )  # fmt: skip
        self.saves = Counter(
            "kvstore_vllm_saves", "Saves by outcome: stored, rejected, failed, full (no room on the way).",
            ("outcome",), registry=registry,
        )  # fmt: skip
        self.tokens = Counter(
            "kvstore_vllm_tokens", "Tokens loaded into blocks and saved from them.", ("direction",), registry=registry
        )  # fmt: skip
        self.unknown = Counter(
            "kvstore_vllm_unknown_requests", "Requests that tokens do not identify: neither loaded nor saved.",
            registry=registry,
        )  # fmt: skip


def connector_metrics(registry: CollectorRegistry = REGISTRY) -> ConnectorMetrics:
    """Both sides may live in one process: they share them."""
    with _making:
        return _connector_metrics(registry)


@cache
def _connector_metrics(registry: CollectorRegistry) -> ConnectorMetrics:
    return ConnectorMetrics(registry)
