"""From the keys upstream* of a configuration to a place outside."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import kvstore_codec as codec
from kvstore.config import NodeConfig
from kvstore.engine.holdings import Holdings
from kvstore.engine.namespaces import Namespaces
from kvstore.engine.outside import PutObject
from kvstore.engine.owed import Owed, OwedObject
from kvstore.engine.owed_file import OwedFile, OwedJournal
from kvstore.engine.upstream import Upstream
from kvstore.engine.upstream_peer import RemotePeer
from kvstore.engine.upstream_repair import Whole
from kvstore.errors import ConfigError, DiskUnusable
from kvstore.metrics import NodeMetrics
from kvstore_client.errors import InvalidArgument
from kvstore_client.tls import TLS

OnDisk = Callable[[Callable[[], None], str], None]


def open_upstream(
    config: NodeConfig, metrics: NodeMetrics, holdings: Holdings, namespaces: Namespaces, on_disk: OnDisk
) -> Upstream | None:  # fmt: skip
    """None where no upstream is set. The nodes are not asked yet: this one starts without them. `on_disk`: as of
    Operations. Raises ConfigError for certificates that cannot be used, DiskUnusable."""
    if not config.upstream_seeds:
        return None
    owed = Owed(config.upstream_seeds)
    return Upstream(
        upstream_peers(config, metrics), metrics, timeout_s=config.upstream_timeout_ms / 1000,
        writes=config.upstream_write != "off", waits=config.upstream_write == "through", owed=owed,
        whole=_whole_from(holdings, namespaces), journal=_journal(config, owed, on_disk),
    )  # fmt: skip


def upstream_peers(config: NodeConfig, metrics: NodeMetrics) -> list[RemotePeer]:
    """One a seed. Raises ConfigError."""
    rng, tls = random.Random(), upstream_tls(config)
    try:
        return [
            RemotePeer(
                address, metrics, timeout_s=config.upstream_timeout_ms / 1000,
                object_bytes_max=config.object_bytes_max, clock=time.monotonic, rng=rng, tls=tls,
                transport=config.upstream_transport,
            )
            for address in config.upstream_seeds
        ]  # fmt: skip
    except InvalidArgument as error:
        raise ConfigError([f"upstream_tls_*: {error}"]) from None


def _journal(config: NodeConfig, owed: Owed, on_disk: OnDisk) -> OwedJournal | None:
    """With what was owed in another life; None where there is no disk."""
    if config.disk_path is None:
        return None
    path = config.disk_path / "upstream.sqlite"
    try:
        file = OwedFile(path)
        journal = OwedJournal(file, on_disk)
        for record in owed.load(file.load()):
            journal.note(record, False)
    except OSError as error:
        raise DiskUnusable(f"{path} cannot be used: {error.strerror}") from error
    owed.changed = journal.note
    return journal


def _whole_from(holdings: Holdings, namespaces: Namespaces) -> Whole:
    async def whole(owed: OwedObject) -> PutObject | None:
        """Not counted as use, nor brought to memory: what is read more than it is put stays where it is."""
        entry, layout = holdings.index.get(owed.key), namespaces.get(owed.key.namespace_id)
        if entry is None or layout is None:
            return None
        described = entry.described
        for tier in entry.tiers:
            if entry.held and entry.layers_in(tier) == described.layers:
                try:
                    data = await holdings.read_checked(entry, tier, described.length)
                except codec.ObjectError:  # counted, and dropped from the tier
                    continue
                if data is not None:
                    return PutObject(layout, owed.key, described.parent, owed.first, described.quality, data)
        return None

    return whole


def upstream_tls(config: NodeConfig) -> TLS | None:
    if config.upstream_tls_ca is None:
        return None
    return TLS(config.upstream_tls_ca, config.upstream_tls_cert, config.upstream_tls_key, config.upstream_tls_name)
