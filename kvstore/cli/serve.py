"""`kvstore serve`: configuration, logging, one node, one ready line."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

from kvstore.cli.logs import start_logging
from kvstore.config import load_config
from kvstore.memory import share_arenas
from kvstore.service.server import Ready, run


def serve_node(config_path: Path | None, flags: Mapping[str, object]) -> None:
    """Runs until SIGTERM or SIGINT. Raises ConfigError, ListenError and what opening the node raises."""
    share_arenas()
    config = load_config(config_path, flags, os.environ)
    start_logging(config)
    asyncio.run(run(config, _print_ready))


def _print_ready(ready: Ready) -> None:
    print(json.dumps({"event": "ready", **dataclasses.asdict(ready)}), flush=True)
