"""What the bulk streams count."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter


class StreamMetrics:
    """Payload bytes through Fetch and Put, and of live writes, since start."""

    def __init__(self, registry: CollectorRegistry) -> None:
        moved = Counter(
            "kvstore_stream_bytes", "Bytes of objects through Fetch (out) and Put (in).", ("direction",),
            registry=registry,
        )  # fmt: skip
        self.fetched_bytes = moved.labels("out")
        self.put_bytes = moved.labels("in")
        live = Counter(
            "kvstore_live_bytes", "Bytes of live writes, received (in) and handed on (out).", ("direction",),
            registry=registry,
        )  # fmt: skip
        self.live_in, self.live_out = live.labels("in"), live.labels("out")
