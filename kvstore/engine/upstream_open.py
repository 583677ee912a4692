"""From the keys upstream* of a configuration to a place outside."""

from __future__ import annotations

import random
import time

from kvstore.config import NodeConfig
from kvstore.engine.upstream import Upstream
from kvstore.engine.upstream_peer import GrpcPeer
from kvstore.metrics import NodeMetrics


def open_upstream(config: NodeConfig, metrics: NodeMetrics) -> Upstream | None:
    """None where no upstream is set. The nodes are not asked yet: this one starts without them."""
    if not config.upstream_seeds:
        return None
    timeout_s = config.upstream_timeout_ms / 1000
    rng = random.Random()
    peers = [
        GrpcPeer(
            address, metrics, timeout_s=timeout_s, object_bytes_max=config.object_bytes_max, clock=time.monotonic,
            rng=rng,
        )
        for address in config.upstream_seeds
    ]  # fmt: skip
    return Upstream(
        peers, metrics, timeout_s=timeout_s, writes=config.upstream_write != "off",
        waits=config.upstream_write == "through",
    )  # fmt: skip
