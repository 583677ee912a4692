"""Targets: `host:port`, `unix:/path` or `unix:///path`; several with commas or as a list."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvstore_client.errors import InvalidArgument

_HOST_PORT = re.compile(r"(?:\[[0-9a-fA-F:.%]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})")
_HOW = 'use "host:port", "unix:///path/of/socket", or several of them'


def parse_target(target: str | Sequence[str]) -> tuple[str, ...]:
    """The distinct seeds in the order given, as gRPC spells them. Raises InvalidArgument."""
    if isinstance(target, str):
        target = target.split(",")
    elif not isinstance(target, Sequence):
        raise InvalidArgument(f"bad target {target!r}: {_HOW}")
    seeds = [_seed(one) for one in target]
    if not seeds:
        raise InvalidArgument(f"no target given: {_HOW}")
    return tuple(dict.fromkeys(seeds))


def _seed(text: object) -> str:
    if not isinstance(text, str):
        raise InvalidArgument(f"bad target {text!r}: {_HOW}")
    text = text.strip()
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        if path.startswith("/") and path.isprintable() and len(path.encode()) <= 107:
            return f"unix:{path}"
        raise InvalidArgument(f"bad target {text!r}: a socket's path is absolute, printable and has at most 107 bytes")
    match = _HOST_PORT.fullmatch(text)
    if match is None or not 1 <= int(match["port"]) <= 65535:
        raise InvalidArgument(f"bad target {text!r}: {_HOW}")
    return text
