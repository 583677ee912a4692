"""Checks of the Redis servers that a node is configured with, over the connections a node uses."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Iterator

from kvstore.cli import render
from kvstore.cli.doctor_finding import Finding, Subject, fail, ok, warn
from kvstore.config import NodeConfig
from kvstore.tiers.redis_open import credentials_of
from kvstore.tiers.redis_server import Failure, RedisServer
from kvstore.tiers.redis_servers import Job, RedisServers
from kvstore_client.circuit import State

PINGS = 20
VERSION_MIN = (4, 0)  # UNLINK
SLOW_PART = 0.25  # of redis_timeout_ms
_FIXES = {
    "authentication": "set user and password in redis_url, or redis_password_file",
    "timeout": "is the server busy or far away? raise redis_timeout_ms",
    "connection": "start the server, or correct redis_url",
    "cluster": "heal the Cluster, or correct redis_cluster",
}


def check_redis(subject: Subject) -> Iterator[Finding]:
    config = subject.config
    if not config.redis_urls:
        yield ok("no redis_url: nodes share nothing")
        return
    servers = RedisServers(
        config.redis_urls, credentials_of(config), cluster=config.redis_cluster,
        timeout_s=config.redis_timeout_ms / 1000, clock=time.monotonic, rng=random.Random(), on_circuit=_quiet,
    )  # fmt: skip
    try:
        for server, answer in servers.ask_each([("INFO", "server"), ("INFO", "memory"), ("DBSIZE",)]).items():
            if isinstance(answer, Failure):
                yield _failed(answer)
                continue
            yield from _server(config, server.address, _fields(answer[0]), _fields(answer[1]), answer[2])
            yield _latency(config, servers, server)
        yield _commands(config, servers)
    finally:
        servers.close()


def _server(
    config: NodeConfig, address: str, server: dict[str, str], memory: dict[str, str], keys: int
) -> Iterator[Finding]:
    version = server.get("valkey_version") or server.get("redis_version", "0")
    name, mode = server.get("server_name", "redis"), server.get("redis_mode", "mode unknown")
    found = f"{address}: {name} {version}, {mode}, {keys} keys"
    if tuple(int(part) for part in version.split(".")[:2]) < VERSION_MIN:
        yield fail(found, "use Redis 6.2 or later; before 4.0 it has no UNLINK")
    elif mode == "cluster" and not config.redis_cluster:
        yield fail(found, "set redis_cluster = true")
    else:
        yield ok(found)
    yield _memory(config, address, memory)


def _memory(config: NodeConfig, address: str, memory: dict[str, str]) -> Finding:
    limit, policy = int(memory.get("maxmemory", 0)), memory.get("maxmemory_policy", "unknown")
    found = (
        f"{address}: {render.size(int(memory.get('used_memory', 0)))} used, maxmemory "
        f"{render.size(limit) if limit else 'none'}, {policy}"
    )
    if not limit:
        return warn(
            found, "set maxmemory and maxmemory-policy allkeys-lru: without a limit Redis grows until it is ended"
        )
    if policy == "noeviction":
        return warn(found, "set maxmemory-policy allkeys-lru: a full server refuses what we put")
    if policy.startswith("volatile") and not config.redis_ttl_s:
        return warn(found, "set redis_ttl_s, or maxmemory-policy allkeys-lru: what has no end is never evicted")
    return ok(found)


def _latency(config: NodeConfig, servers: RedisServers, server: RedisServer) -> Finding:
    times: list[float] = []
    for _ in range(PINGS):
        began_s = time.perf_counter()
        answer = servers.ask(server, [("PING",)])
        times.append(time.perf_counter() - began_s)
        if isinstance(answer, Failure):
            return _failed(answer)
    median_ms = statistics.median(times) * 1000
    found = (
        f"{server.address}: answers in {median_ms:.2f} ms (median of {PINGS}, longest {max(times) * 1000:.2f}), "
        f"redis_timeout_ms {config.redis_timeout_ms}"
    )
    if median_ms > SLOW_PART * config.redis_timeout_ms:
        return warn(found, "raise redis_timeout_ms, or use a nearer server: lookups would often be misses")
    return ok(found)


def _commands(config: NodeConfig, servers: RedisServers) -> Finding:
    """Whether this user may do what the tier does, on a key of our prefix that lives ten seconds at most."""
    key = f"{config.redis_prefix}:doctor:{os.getpid()}".encode()
    commands: list[tuple[object, ...]] = [("GETRANGE", key, 0, 3), ("STRLEN", key)]
    names = "GETRANGE, STRLEN"
    if config.redis_write != "off":
        commands = [
            ("SET", key, b"kvstore", "EX", 10), *commands, ("EXPIRE", key, 10),
            ("EVAL", "return redis.call('STRLEN', KEYS[1])", 1, key), ("UNLINK", key),
        ]  # fmt: skip
        names = f"SET, {names}, EXPIRE, EVAL, UNLINK"
    (answer,) = servers.run([Job(key, tuple(commands))])
    if isinstance(answer, Failure):
        return fail(answer.problem, _FIXES.get(answer.kind, f"allow this user {names} on keys {config.redis_prefix}:*"))
    return ok(f"{names} work on keys {config.redis_prefix}:*")


def _failed(failure: Failure) -> Finding:
    return fail(failure.problem, _FIXES.get(failure.kind, "the server's log says more"))


def _fields(info: bytes) -> dict[str, str]:
    return dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)


def _quiet(server: str, state: State) -> None:
    """The findings say it."""
