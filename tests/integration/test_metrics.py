"""docs/metrics.md and what a running node serves are the same list."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import kv_objects as kv
import pytest
from node_process import NodeProcess
from polling import wait_until
from prometheus_client.parser import text_string_to_metric_families
from redis_process import RedisProcess, running

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(\w+)` \| (\w+) \|([^|]*)\| [^|]+ \|", re.MULTILINE)
LAYOUT = kv.small_layout()


def documented() -> dict[str, tuple[str, frozenset[str]]]:
    """Name → (kind, labels)."""
    rows = ROW.findall(DOCUMENT.read_text())
    return {name: (kind, frozenset(labels.replace(",", " ").split())) for name, kind, labels in rows}


def served(text: str) -> tuple[dict[str, str], dict[str, set[frozenset[str]]]]:
    """Name → kind, and name → the sets of labels that its samples have."""
    kinds: dict[str, str] = {}
    labels: defaultdict[str, set[frozenset[str]]] = defaultdict(set)
    for family in text_string_to_metric_families(text):
        if family.name.endswith("_created"):  # the client library's own, one for each counter and histogram
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        kinds[name] = family.type
        for sample in family.samples:
            labels[name].add(frozenset(sample.labels) - {"le"})
    return kinds, labels


@pytest.fixture
def busy(tmp_path: Path, start_node: Callable[..., NodeProcess]) -> NodeProcess:
    """A node with every tier, small enough to evict, that has seen good and bad puts, hits and misses."""
    redis = RedisProcess(tmp_path / "redis")
    with running(redis):
        node = start_node(
            "--host-capacity", "64KiB", "--disk-path", str(tmp_path / "disk"), "--disk-capacity", "256KiB",
            "--redis-url", redis.url, "--redis-timeout-ms", "1000", "--metrics-listen", "127.0.0.1:0",
        )  # fmt: skip
        for seed in range(24):
            chunks = kv.chunks(LAYOUT, 4, seed, quality="high")
            kv.put(node.store, LAYOUT, chunks, durable=True)
            hashes = [chunk.hash for chunk in chunks]
            kv.lookup(node.store, LAYOUT, [*hashes, bytes(32)])
            kv.fetch(node.store, LAYOUT, hashes)
        good = kv.chunks(LAYOUT, 1, 99)[0]
        kv.put(node.store, LAYOUT, [kv.StoredChunk(good.ref, good.blob[:-1] + bytes([good.blob[-1] ^ 1]))])

    def redis_is_given_up() -> bool:
        kv.lookup(node.store, LAYOUT, [bytes(32)])
        return "kvstore_redis_circuit_changes_total{" in node.metrics()

    wait_until(redis_is_given_up, "the node has noticed that Redis is gone", deadline_s=30)
    return node


def test_the_document_lists_what_a_node_serves(busy: NodeProcess) -> None:
    kinds, labels = served(busy.metrics())
    table = documented()
    assert {name: kind for name, (kind, _) in table.items()} == kinds
    for name, seen in labels.items():
        assert seen <= {table[name][1]}, name


def test_what_an_operator_alerts_on_has_been_seen_to_count(busy: NodeProcess) -> None:
    """Rows of the table that nothing here makes count would be hearsay."""
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(busy.metrics())
        for sample in family.samples
    }

    def total(name: str, *labels: str) -> float:
        return sum(value for (found, *rest), value in samples.items() if found == name and set(labels) <= set(rest))

    for name, label in (
        ("kvstore_lookup_chunks_total", "hit"), ("kvstore_lookup_chunks_total", "miss"),
        ("kvstore_reads_total", "host"), ("kvstore_reads_by_quality_total", "high"),
        ("kvstore_puts_total", "stored"), ("kvstore_puts_total", "rejected"),
        ("kvstore_integrity_failures_total", "put"), ("kvstore_tier_failures_total", "redis"),
        ("kvstore_redis_failures_total", "connection"), ("kvstore_redis_circuit_changes_total", "open"),
        ("kvstore_stream_bytes_total", "in"), ("kvstore_stream_bytes_total", "out"),
        ("kvstore_operation_seconds_count", "commit"), ("kvstore_reuse_distance_seconds_count", ""),
        ("kvstore_evictions_total", "capacity"), ("kvstore_degradations_total", "capacity"),
    ):  # fmt: skip
        assert total(name, *([label] if label else [])) > 0, (name, label)
    assert total("kvstore_reads_by_quality_total", "host", "high") > 0, "tier and quality together"
    assert total("kvstore_tier_state", "redis", "open") + total("kvstore_tier_state", "redis", "half-open") == 1
    assert total("kvstore_tier_state", "disk", "ok") == 1
    assert total("process_open_fds") > 0
