"""What is counted, taken and added up; and that docs/vllm.md says what each metric means."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from kvstore_client.integrations.vllm.config import ConnectorConfig
from kvstore_client.integrations.vllm.metrics import COUNTERS, SECONDS, ConnectorMetrics, connector_metrics, merged

DOCUMENT = (Path(__file__).resolve().parents[3] / "docs" / "vllm.md").read_text()


def test_what_is_taken_was_added_since() -> None:
    registry = CollectorRegistry()
    metrics = ConnectorMetrics(registry)
    assert metrics.take() is None
    metrics.count("lookups", "hit")
    metrics.count("lookups", "hit")
    metrics.count("unknown_requests")
    metrics.count("tokens", "load", 0)
    metrics.observe("load_seconds", 0.25)
    added: Any = metrics.take()
    assert added == {
        "counters": {"lookups": {"hit": 2}, "unknown_requests": {"": 1}},
        "seconds": {"load_seconds": [0.25]},
    }
    assert json.loads(json.dumps(added)) == added
    assert metrics.take() is None
    metrics.count("lookups", "miss")
    added = metrics.take()
    assert added == {"counters": {"lookups": {"miss": 1}}, "seconds": {}}
    assert registry.get_sample_value("kvstore_vllm_lookups_total", {"outcome": "hit"}) == 2
    assert registry.get_sample_value("kvstore_vllm_load_seconds_sum") == 0.25


def test_what_two_have_added() -> None:
    first = {"counters": {"lookups": {"hit": 1}}, "seconds": {"load_seconds": [1.0]}}
    second = {"counters": {"lookups": {"hit": 2, "miss": 1}, "saves": {"full": 1}}, "seconds": {"load_seconds": [2.0]}}
    both = merged(first, second)  # type: ignore[arg-type]
    assert both == {
        "counters": {"lookups": {"hit": 3, "miss": 1}, "saves": {"full": 1}}, "seconds": {"load_seconds": [1.0, 2.0]},
    }  # fmt: skip
    assert first["counters"] == {"lookups": {"hit": 1}}


def test_a_registry_has_them_once() -> None:
    registry = CollectorRegistry()
    assert connector_metrics(registry) is connector_metrics(registry)


def test_every_metric_is_documented() -> None:
    shown: dict[str, str] = dict(re.findall(r"^\| `vllm:kvstore_(\w+)` \|\s*(\w*)\s*\|", DOCUMENT, re.MULTILINE))
    counters = {f"{name}_total": spec.label or "" for name, spec in COUNTERS.items()}
    assert shown == {**counters, **dict.fromkeys(SECONDS, "")}


def test_every_key_is_documented_with_its_default() -> None:
    rows: dict[str, str] = dict(re.findall(r"^\| `(\w+)` \|\s*([^|]*?)\s*\|", DOCUMENT, re.MULTILINE))
    shown = {name: default for name, default in rows.items() if name in ConnectorConfig.__dataclass_fields__}
    assert shown.keys() == ConnectorConfig.__dataclass_fields__.keys()
    config = ConnectorConfig("h:1")
    for name, default in shown.items():
        if name not in ("address", "chunk_tokens"):  # it has none; it depends
            assert default == _shown(getattr(config, name)), name


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return f"`{value}`"
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
