"""What a node is told before it starts: one flat, typed `NodeConfig`.

Sources, strongest first: command-line flags, `KVSTORE_<KEY>` environment variables, a TOML file, defaults. Every
key has the same name in all of them (`host_capacity`, `KVSTORE_HOST_CAPACITY`, `--host-capacity`). A key that
does not exist is an error naming the nearest one that does: a misspelt limit must not become a default in silence.

Sizes are bytes, as integers or as strings with a unit ("512MB" is 10⁶, "4GiB" is 2³⁰). Durations carry their unit
in the name.
"""

from __future__ import annotations

import difflib
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from kvstore.engine.upstream_config import UpstreamConfig
from kvstore.errors import ConfigError
from kvstore.service.tls_config import TlsConfig
from kvstore.tiers.redis_config import SECRET_KEYS, RedisConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENV_PREFIX = "KVSTORE_"
#: Variables of our own that are not keys of a node: the admin CLI's default target and its TLS, the config file's path,
#: and the switch of the heavier self-checks.
ENV_NOT_KEYS = frozenset(
    {
        "KVSTORE_TARGET", "KVSTORE_TARGET_TLS_CA", "KVSTORE_TARGET_TLS_CERT", "KVSTORE_TARGET_TLS_KEY",
        "KVSTORE_TARGET_TLS_NAME", "KVSTORE_CONFIG", "KVSTORE_STRICT",
    }
)  # fmt: skip

GIB = 1 << 30
_BYTE_SIZE = TypeAdapter(ByteSize)
# Kubernetes gives every pod variables named after each Service; one called "kvstore" (or "kvstore-…") has our prefix.
_SERVICE_LINK = re.compile(r"KVSTORE_(\w+_)?SERVICE_(HOST|PORT(_\w+)?)|KVSTORE_(\w+_)?PORT(_\d+_\w+)?")
_SERVICE_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://.*|\d+(\.\d+){3}|\d+|tcp|udp|sctp|[0-9a-f:]+")
_HOST_PORT = re.compile(r"(?P<host>\[[0-9a-fA-F:.%]+\]|[^:\[\]/\s,]+):(?P<port>\d{1,5})")


def _size(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError('must be bytes as an integer or a string such as "4GiB"')
    try:
        return int(_BYTE_SIZE.validate_python(value))
    except ValidationError:
        raise ValueError('must be bytes as an integer or a string such as "4GiB"') from None


def _address(value: str) -> str:
    """`host:port` (port 0: any free one) or `unix:/absolute/path`."""
    if value.startswith("unix:"):
        path = value.removeprefix("unix:")
        if not path.startswith("/") or len(path.encode()) > 107:
            raise ValueError("a unix address is unix:/absolute/path of at most 107 bytes")
        return value
    match = _HOST_PORT.fullmatch(value)
    if match is None or int(match["port"]) > 65535:
        raise ValueError("must be host:port or unix:/absolute/path")
    return value


def _addresses(value: str) -> str:
    for address in value.split(","):
        _address(address.strip())
    return value


def _bulk_addresses(value: str) -> str:
    return value if value in ("auto", "none") else _addresses(value)


def _metrics_address(value: str) -> str:
    if value.startswith("unix:"):
        raise ValueError("must be host:port")
    return _address(value)


Size = Annotated[int, BeforeValidator(_size), Field(ge=0, lt=1 << 63)]
PolicyName = Literal["gittins", "lru", "s3-fifo", "sieve", "2q"]  # as in kvstore.policies.choice, without loading it
ObjectSize = Annotated[int, BeforeValidator(_size), Field(ge=0, lt=1 << 32)]  # as the index counts lengths


class NodeConfig(TlsConfig, UpstreamConfig, RedisConfig):
    """Everything one node is configured with; frozen. Raises pydantic's ValidationError, `load_config` ConfigError."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    listen: Annotated[str, AfterValidator(_addresses)] = Field(
        default="127.0.0.1:7070",
        description="host:port or unix:/path to serve gRPC on; several with commas; port 0: any",
    )
    bulk_listen: Annotated[str, AfterValidator(_bulk_addresses)] = Field(
        default="auto",
        description="where objects move over bare sockets: host:port or unix:/path, several with commas; auto: beside "
        "each gRPC address, any port, and for this machine's processes; none: over gRPC only",
    )
    node_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")] | None = Field(
        default=None, description="name of this node in answers and metrics (default: the host's name)"
    )
    host_capacity: Size = Field(default=4 * GIB, description="bytes of objects held in RAM")
    huge_pages: bool = Field(
        default=False, description="keep objects in pages of 2 MiB; for objects much larger than that"
    )
    disk_path: Path | None = Field(default=None, description="directory of the disk tier; none: no disk tier")
    disk_capacity: Size = Field(default=16 * GIB, description="bytes of objects held on disk")
    disk_write: Literal["behind", "through", "demote"] = Field(
        default="behind",
        description="when objects go to disk: behind every put, before it is answered, or when memory has no room",
    )
    disk_admission: Literal["all", "second-use"] = Field(
        default="all", description="which objects go to disk: all, or those that are used again, to spare flash"
    )
    eviction_policy: PolicyName = Field(
        default="gittins", description="which objects go first when a tier is full (docs/eviction.md)"
    )
    degrade_floor: Literal["none", "high", "medium", "low"] = Field(
        default="medium",
        description="quality to which cold objects shrink before any is evicted; none: they are evicted whole",
    )
    soft_pin_share: float = Field(
        default=0.25, ge=0, le=1, description="of the largest tier, what pins with an end may hold"
    )
    hard_pin_share: float = Field(
        default=0.25, ge=0, le=1, description="of the largest tier, what pins without an end may hold"
    )
    object_bytes_max: ObjectSize = Field(default=GIB // 4, description="largest object taken")
    staged_bytes_max: Size = Field(default=GIB, description="bytes of puts in flight, all together")
    stream_idle_s: float = Field(
        default=15.0, gt=0, le=3600, description="seconds a put or fetch may make no progress before it is aborted"
    )
    lease_ms_max: int = Field(default=60_000, ge=0, le=86_400_000, description="longest lease granted, milliseconds")
    shutdown_grace_s: float = Field(
        default=10.0, ge=0, le=3600, description="seconds that calls in flight get to finish after SIGTERM"
    )
    metrics_listen: Annotated[str, AfterValidator(_metrics_address)] | None = Field(
        default=None, description="host:port of the Prometheus endpoint; none: no endpoint"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe line logged"
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="lines for people, or one JSON object a line for a collector"
    )

    @model_validator(mode="after")
    def _disk_has_room(self) -> NodeConfig:
        if self.disk_path is not None and self.disk_capacity == 0:
            raise ValueError("disk_capacity is 0 with a disk_path set: give it room or unset disk_path")
        if self.disk_path is None and self.host_capacity == 0:
            raise ValueError("host_capacity is 0 and there is no disk_path: the node could hold nothing")
        return self

    @model_validator(mode="after")
    def _asks_others(self) -> NodeConfig:
        mine = {address.replace("unix://", "unix:") for address in self.listen_addresses}
        for seed in self.upstream_seeds:
            if seed in mine:
                raise ValueError(f"upstream names {seed}, where this node listens: name other nodes")
        return self

    @property
    def listen_addresses(self) -> tuple[str, ...]:
        return tuple(address.strip() for address in self.listen.split(","))

    @property
    def node_name(self) -> str:
        """`node_id`, or the host's name where none is set."""
        return self.node_id if self.node_id is not None else socket.gethostname()


def load_config(
    path: str | Path | None, overrides: Mapping[str, Any], environ: Mapping[str, str],
    defaults: Mapping[str, Any] | None = None,
) -> NodeConfig:  # fmt: skip
    """The config of a node from a TOML file (None: none), `environ`'s KVSTORE_* and `overrides` (flags; None: unset).
    `defaults`: of a node with a role, instead of those of the keys.

    Raises ConfigError; its `problems` are one line each, naming source, key, value and fix.
    """
    values: dict[str, Any] = dict(defaults or {})
    sources: dict[str, str] = {}
    problems: list[str] = []
    flags = {key: value for key, value in overrides.items() if value is not None}
    for source, given in (
        (str(path), {} if path is None else _read_toml(Path(path))),
        ("environment", _env_values(environ)),
        ("flags", flags),
    ):
        for key, value in given.items():
            if key in NodeConfig.model_fields:
                values[key] = value
                sources[key] = source
            else:
                problems.append(_unknown(key, source))
    if problems:
        raise ConfigError(problems)
    try:
        return NodeConfig(**values)
    except ValidationError as error:
        raise ConfigError([_problem(dict(detail), sources) for detail in error.errors()]) from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: not valid TOML: {error}"]) from None


def _env_values(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name.removeprefix(ENV_PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(ENV_PREFIX) and name not in ENV_NOT_KEYS and not _is_service_link(name, value)
    }


def _is_service_link(name: str, value: str) -> bool:
    return bool(_SERVICE_LINK.fullmatch(name) and _SERVICE_LINK_VALUE.fullmatch(value))


def _unknown(key: str, source: str) -> str:
    name = _spelling(key, source)
    near = difflib.get_close_matches(key.lower(), NodeConfig.model_fields, n=1, cutoff=0.0)
    return f"{source}: unknown key {name}; did you mean {_spelling(near[0], source)}?"


def _spelling(key: str, source: str) -> str:
    if source == "environment":
        return ENV_PREFIX + key.upper()
    return "--" + key.replace("_", "-") if source == "flags" else key


def _problem(detail: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    message = str(detail["msg"]).removeprefix("Value error, ").replace("\n", " ")
    if not detail["loc"]:
        return message
    key = str(detail["loc"][0])
    source = sources.get(key, "defaults")
    shown = "(not shown)" if key in SECRET_KEYS else repr(detail["input"])
    return f"{source}: {_spelling(key, source)} = {shown}: {message}"
