"""Everything that can go wrong inside a node, as one tree.

    KvStoreError
    ├── ConfigError      the configuration cannot be used; `problems` has one line each
    ├── ListenError      an address cannot be listened on
    ├── InvalidRequest   a request's field is not what the protocol says: the caller's mistake
    ├── StreamStalled    a put or fetch made no progress within its limit
    ├── DiskUnusable     the disk tier's directory cannot be used, or another node uses it
    ├── UpstreamAway     a delete did not reach a node upstream, and cannot be kept for it
    ├── TierFull         a tier has no room for an object
    └── TierFailed       a tier's medium refused to read or write

`code` is stable and names the metric label; `context` holds what was expected and what was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum


class Code(str, Enum):
    CONFIG = "config"
    LISTEN = "listen"
    INVALID_REQUEST = "invalid_request"
    STREAM_STALLED = "stream_stalled"
    DISK_UNUSABLE = "disk_unusable"
    UPSTREAM_AWAY = "upstream_away"
    TIER_FULL = "tier_full"
    TIER_FAILED = "tier_failed"
    INTERNAL = "internal"


class KvStoreError(Exception):
    """Root of the node's errors; `str()` is one line."""

    def __init__(self, message: str, *, code: Code, **context: object) -> None:
        super().__init__(message)
        self.code = code
        self.context = context

    def __str__(self) -> str:
        details = ", ".join(f"{key}={value}" for key, value in self.context.items())
        return f"{self.args[0]} ({details})" if details else str(self.args[0])


class ConfigError(KvStoreError):
    """The configuration cannot be used. `problems`: one line each, naming source, key, value and fix."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems), code=Code.CONFIG)
        self.problems = tuple(problems)


class ListenError(KvStoreError):
    def __init__(self, message: str, **context: object) -> None:
        super().__init__(message, code=Code.LISTEN, **context)


class InvalidRequest(KvStoreError):
    def __init__(self, message: str, **context: object) -> None:
        super().__init__(message, code=Code.INVALID_REQUEST, **context)


class StreamStalled(KvStoreError):
    def __init__(self, message: str, **context: object) -> None:
        super().__init__(message, code=Code.STREAM_STALLED, **context)


class DiskUnusable(KvStoreError):
    def __init__(self, message: str, **context: object) -> None:
        super().__init__(message, code=Code.DISK_UNUSABLE, **context)


class UpstreamAway(KvStoreError):
    def __init__(self, message: str, **context: object) -> None:
        super().__init__(message, code=Code.UPSTREAM_AWAY, **context)


class TierFull(KvStoreError):
    def __init__(self, message: str, **context: object) -> None:
        super().__init__(message, code=Code.TIER_FULL, **context)


class TierFailed(KvStoreError):
    def __init__(self, message: str, **context: object) -> None:
        super().__init__(message, code=Code.TIER_FAILED, **context)
