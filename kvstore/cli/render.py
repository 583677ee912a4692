"""Protocol messages as JSON values and as tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from kvstore_codec import Quality
from kvstore_proto.v1 import store_pb2 as pb

SHORT_HEX_DIGITS = 12


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def print_table(table: Table) -> None:
    Console().print(table)


def tier_name(tier: int) -> str:
    """ "host", "disk" …"""
    return pb.Tier.Name(tier).removeprefix("TIER_").lower()


def quality_name(value: int) -> str:
    return Quality(value).label if value in list(Quality) else str(value)


def size(value: float) -> str:
    """Bytes with a binary unit, three significant digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 999.5:  # 1000 would be shown as 1e+03
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def upstream_state(state: str) -> str:
    """Of a circuit, as what it means for the node."""
    return "asked" if state == "closed" else f"away ({state})"


def stat_json(stat: pb.StatResponse) -> dict[str, Any]:
    return {
        "version": stat.version,
        "node_id": stat.node_id,
        "uptime_seconds": stat.uptime_seconds,
        "objects": stat.objects,
        "namespaces": stat.namespaces,
        "leases": stat.leases,
        "pinned_bytes": stat.pinned_bytes,
        "staged_objects": stat.staged_objects,
        "staged_bytes": stat.staged_bytes,
        "tiers": [
            {
                "tier": tier_name(tier.tier),
                "objects": tier.objects,
                "used_bytes": tier.used_bytes,
                "capacity_bytes": tier.capacity_bytes,
            }
            for tier in stat.tiers
        ],
        "upstreams": [{"address": each.address, "state": each.state} for each in stat.upstreams],
        "counters": dict(sorted(stat.counters.items())),
    }


def stat_tables(stat: pb.StatResponse) -> Iterable[Table]:
    node = Table(title=f"{stat.node_id} · kvstore {stat.version}", title_justify="left", show_header=False)
    node.add_row("up", f"{stat.uptime_seconds:.0f} s")
    node.add_row("objects", f"{stat.objects} in {stat.namespaces} namespaces")
    node.add_row("leases", str(stat.leases))
    node.add_row("pinned", size(stat.pinned_bytes))
    node.add_row("staged", f"{stat.staged_objects} objects, {size(stat.staged_bytes)}")
    for upstream in stat.upstreams:
        node.add_row("upstream", f"{upstream.address}, {upstream_state(upstream.state)}")
    yield node
    tiers = Table("tier", "objects", "used", "capacity", "full")
    for tier in stat.tiers:
        full = f"{100 * tier.used_bytes / tier.capacity_bytes:.1f} %" if tier.capacity_bytes else "–"
        tiers.add_row(tier_name(tier.tier), str(tier.objects), size(tier.used_bytes), size(tier.capacity_bytes), full)
    yield tiers
    counters = Table("since start", "count")
    for name, value in sorted(stat.counters.items()):
        counters.add_row(name, str(value))
    yield counters


def object_json(entry: pb.ObjectEntry) -> dict[str, Any]:
    return {
        "namespace_id": entry.namespace_id.hex(),
        "chunk_hash": entry.chunk_hash.hex(),
        "part": entry.part,
        "parent_hash": entry.parent_hash.hex(),
        "tokens": entry.tokens,
        "first_position": entry.first_position,
        "quality": quality_name(entry.quality),
        "provenance": quality_name(entry.provenance),
        "stored_bytes": entry.stored_bytes,
        "tiers": [tier_name(tier) for tier in entry.tiers],
        "idle_seconds": entry.idle_seconds,
        "reads": entry.reads,
        "leased": entry.leased,
        "pinned": entry.pinned,
        "model": entry.model,
        "revision": entry.revision,
    }


def objects_table(entries: Iterable[pb.ObjectEntry]) -> Table:
    table = Table(
        "chunk", "part", "namespace", "model", "positions", "quality", "size", "tiers", "reads", "idle", "kept"
    )
    for entry in entries:
        table.add_row(
            entry.chunk_hash.hex()[:SHORT_HEX_DIGITS],
            str(entry.part),
            entry.namespace_id.hex()[:SHORT_HEX_DIGITS],
            entry.model,
            f"{entry.first_position}–{entry.first_position + entry.tokens - 1}",
            quality_name(max(entry.quality, entry.provenance)),
            size(entry.stored_bytes),
            " ".join(tier_name(tier) for tier in entry.tiers),
            str(entry.reads),
            f"{entry.idle_seconds:.0f} s",
            " ".join(word for word, held in (("leased", entry.leased), ("pinned", entry.pinned)) if held),
        )
    return table


def object_table(entry: pb.ObjectEntry) -> Table:
    table = Table(show_header=False)
    for key, value in object_json(entry).items():
        shown = " ".join(value) if isinstance(value, list) else str(value)
        table.add_row(key, f"{shown} ({size(entry.stored_bytes)})" if key == "stored_bytes" else shown)
    return table
