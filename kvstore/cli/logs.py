"""What a node writes to stderr: one line an event, as text for people or as JSON for a collector.

    {"time": "2026-11-25T01:13:21.099+00:00", "level": "info", "logger": "kvstore.service.server",
     "event": "ready on 127.0.0.1:7070, 0 objects", "node_id": "a"}

A JSON line has these five keys, `exception` where there is one, and the fields that the event was logged with
(`extra`). Times are UTC in JSON and local in text. Warnings of Python and its libraries take the same way.
"""

from __future__ import annotations

import datetime
import logging
import sys

from pythonjsonlogger.core import LogData
from pythonjsonlogger.json import JsonFormatter

from kvstore.config import NodeConfig

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _JsonLines(JsonFormatter):
    def __init__(self, node_id: str) -> None:
        super().__init__(
            ("asctime", "levelname", "name", "message"),
            rename_fields={
                "asctime": "time", "levelname": "level", "name": "logger", "message": "event",
                "exc_info": "exception",
            },
            static_fields={"node_id": node_id},
        )  # fmt: skip

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        when = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        return when.isoformat(timespec="milliseconds")

    def process_log_record(self, log_data: LogData) -> LogData:
        return {**log_data, "level": log_data["level"].lower()}


def start_logging(config: NodeConfig) -> None:
    """Every logger of the process writes to stderr from now on, from `log_level` up, in `log_format`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_TEXT) if config.log_format == "text" else _JsonLines(config.node_name))
    logging.basicConfig(handlers=[handler], level=config.log_level.upper())
    logging.captureWarnings(True)
