"""What a check of `kvstore admin doctor` says: one line each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kvstore.cli.remote import Target
from kvstore.config import NodeConfig
from kvstore_client.tls import TLS


class Level(str, Enum):
    OK = "ok"
    WARN = "warn"  # it works, but not as well or as safely as it could
    FAIL = "fail"  # a node would not start, or not do what it is configured for


@dataclass(frozen=True)
class Finding:
    """`fix`: what to do about it; empty where all is well."""

    level: Level
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Subject:
    """What is checked. `target`: a running node to look at, where one is given. `tls`: to it and to this one's."""

    config: NodeConfig
    target: str | None
    deadline_s: float
    tls: TLS | None = None

    def at(self, address: str) -> Target:
        return Target(address, self.tls)


def ok(found: str) -> Finding:
    return Finding(Level.OK, found)


def warn(found: str, fix: str) -> Finding:
    return Finding(Level.WARN, found, fix)


def fail(found: str, fix: str) -> Finding:
    return Finding(Level.FAIL, found, fix)
