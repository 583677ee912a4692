"""`kvstore serve` and `kvstore sidecar`: configuration, logging, one node, one ready line.

A sidecar is a node that must have an upstream, and by default listens where processes of its user find it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from kvstore.cli.logs import start_logging
from kvstore.config import load_config
from kvstore.errors import ConfigError, ListenError
from kvstore.memory import share_arenas
from kvstore.service.server import Ready, run


def serve_node(config_path: Path | None, flags: Mapping[str, object], *, sidecar: bool = False) -> None:
    """Runs until SIGTERM or SIGINT. Raises ConfigError, ListenError and what opening the node raises."""
    share_arenas()
    defaults = {"listen": sidecar_address(os.environ)} if sidecar else {}
    config = load_config(config_path, flags, os.environ, defaults)
    if sidecar and config.upstream is None:
        raise ConfigError(["a sidecar needs nodes to ask: pass --upstream host:port, or run kvstore serve"])
    if config.listen == defaults.get("listen"):
        _make_private(Path(config.listen.removeprefix("unix:")).parent)
    start_logging(config)
    asyncio.run(run(config, _print_ready))


def sidecar_address(environ: Mapping[str, str]) -> str:
    """Where a sidecar listens unless it is told otherwise: in a folder of this user's alone."""
    runtime = environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) / "kvstore" if runtime else Path(tempfile.gettempdir()) / f"kvstore-{os.getuid()}"
    return f"unix:{folder / 'sidecar.sock'}"


def _make_private(folder: Path) -> None:
    """Others could put a socket of theirs into a folder that they may write. Raises ListenError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ListenError(f"cannot use {folder}: {error.strerror}, pass --listen") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ListenError(f"cannot use {folder}: others may write there, remove it or pass --listen")


def _print_ready(ready: Ready) -> None:
    print(json.dumps({"event": "ready", **dataclasses.asdict(ready)}), flush=True)
