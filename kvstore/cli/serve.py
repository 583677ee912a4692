"""`kvstore serve`: configuration, logging, one node, one ready line."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from kvstore.config import load_config
from kvstore.service.server import Ready, run


def serve_node(config_path: Path | None, flags: Mapping[str, object]) -> None:
    """Runs until SIGTERM or SIGINT. Raises ConfigError, ListenError and what opening the node raises."""
    config = load_config(config_path, flags, os.environ)
    logging.basicConfig(
        stream=sys.stderr,
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    asyncio.run(run(config, _print_ready))


def _print_ready(ready: Ready) -> None:
    print(json.dumps({"event": "ready", **dataclasses.asdict(ready)}), flush=True)
