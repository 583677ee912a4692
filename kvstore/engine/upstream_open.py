"""From the keys upstream* of a configuration to a place outside."""

from __future__ import annotations

import random
import time

from kvstore.config import NodeConfig
from kvstore.engine.upstream import Upstream
from kvstore.engine.upstream_peer import GrpcPeer
from kvstore.errors import ConfigError
from kvstore.metrics import NodeMetrics
from kvstore_client.errors import InvalidArgument
from kvstore_client.tls import TLS


def open_upstream(config: NodeConfig, metrics: NodeMetrics) -> Upstream | None:
    """None where no upstream is set. The nodes are not asked yet: this one starts without them. Raises ConfigError for
    certificates that cannot be used."""
    if not config.upstream_seeds:
        return None
    timeout_s = config.upstream_timeout_ms / 1000
    rng = random.Random()
    tls = upstream_tls(config)
    try:
        peers = [
            GrpcPeer(
                address, metrics, timeout_s=timeout_s, object_bytes_max=config.object_bytes_max, clock=time.monotonic,
                rng=rng, tls=tls,
            )
            for address in config.upstream_seeds
        ]  # fmt: skip
    except InvalidArgument as error:
        raise ConfigError([f"upstream_tls_*: {error}"]) from None
    return Upstream(
        peers, metrics, timeout_s=timeout_s, writes=config.upstream_write != "off",
        waits=config.upstream_write == "through",
    )  # fmt: skip


def upstream_tls(config: NodeConfig) -> TLS | None:
    if config.upstream_tls_ca is None:
        return None
    return TLS(config.upstream_tls_ca, config.upstream_tls_cert, config.upstream_tls_key, config.upstream_tls_name)
