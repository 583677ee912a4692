"""A node's own tiers as its configuration has them, with what its disk holds."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.config import NodeConfig
from kvstore.engine.holdings import Holdings
from kvstore.engine.namespaces import Namespaces
from kvstore.engine.pin_file import PinFile
from kvstore.errors import DiskUnusable
from kvstore.metrics import NodeMetrics
from kvstore.policies.choice import POLICIES
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk_admission import RejectFirst
from kvstore.tiers.host import HostTier
from kvstore_codec import Quality


def open_tiers(
    config: NodeConfig, metrics: NodeMetrics, clock: Callable[[], float]
) -> tuple[Holdings, Namespaces, PinFile | None]:  # fmt: skip
    """Blocks while the disk is read. Raises DiskUnusable, TierFailed, ConfigError."""
    floor = None if config.degrade_floor == "none" else Quality.parse(config.degrade_floor)

    def holdings(host: HostTier, disk: DiskTier | None) -> Holdings:
        return Holdings(
            host, disk, metrics, clock, policy=POLICIES[config.eviction_policy], floor=floor,
            disk_write=config.disk_write, admission=RejectFirst() if config.disk_admission == "second-use" else None,
            soft_pin_share=config.soft_pin_share, hard_pin_share=config.hard_pin_share,
        )  # fmt: skip

    host = HostTier(config.host_capacity, config.huge_pages)
    if config.disk_path is None:
        return holdings(host, None), Namespaces(None), None
    disk = DiskTier(config.disk_path, config.disk_capacity)
    try:
        held = holdings(host, disk)
        pin_file = PinFile(config.disk_path / "pins.json")
        for key in pin_file.load():
            row = held.index.row_of(key)
            if row is not None:
                held.pins.pin(row, held.index.described(row).length, None, clock())
        return held, Namespaces(config.disk_path / "namespaces"), pin_file
    except OSError as error:
        disk.close()
        raise DiskUnusable(f"disk_path {config.disk_path} cannot be used: {error.strerror}") from error
    except BaseException:
        disk.close()
        raise
