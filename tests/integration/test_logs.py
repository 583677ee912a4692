"""A node's log: one line an event, for people or for a collector."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from node_process import NodeProcess

from kvstore.cli.logs import start_logging
from kvstore.config import NodeConfig

KEYS = {"time", "level", "logger", "event", "node_id"}


def test_json_lines_of_a_node(tmp_path: Path, start_node: Callable[..., NodeProcess]) -> None:
    """With a Redis that is not there, so that there is trouble to log."""
    node = start_node(
        "--log-format", "json", "--node-id", "n1", "--disk-path", str(tmp_path / "disk"),
        "--redis-url", "redis://127.0.0.1:1",
    )  # fmt: skip
    assert node.stop() == 0
    lines = [json.loads(line) for line in node.log().splitlines()]
    assert len(lines) >= 4
    for line in lines:
        assert line.keys() >= KEYS
        assert line["node_id"] == "n1"
        assert line["level"] in {"debug", "info", "warning", "error"}
        assert datetime.datetime.fromisoformat(line["time"]).utcoffset() == datetime.timedelta(0)
        assert "\n" not in line["event"]
    ready = next(line for line in lines if line["event"].startswith("ready on"))
    assert (ready["level"], ready["logger"]) == ("info", "kvstore.service.server")
    warning = next(line for line in lines if line["level"] == "warning")
    assert "Redis" in warning["event"] or "redis" in warning["event"]


def test_text_is_the_default(start_node: Callable[..., NodeProcess]) -> None:
    node = start_node()
    assert " INFO kvstore.service.server: ready on " in node.log()


def test_fields_and_exceptions_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    start_logging(NodeConfig(log_format="json", node_id="n1", log_level="warning"))
    log = logging.getLogger("kvstore.test_logs")
    log.info("not severe enough")
    log.warning("disk %s: %s", "a\nb", "full", extra={"kind": "disk write", "bytes": 7})
    try:
        raise OSError("broken")
    except OSError:
        log.exception("failed")
    logging.captureWarnings(False)
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert first["event"] == "disk a\nb: full"
    assert (first["kind"], first["bytes"], first["level"]) == ("disk write", 7, "warning")
    assert second["exception"].endswith("OSError: broken")
