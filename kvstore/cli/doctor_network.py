"""Checks of addresses: whether a node could listen there, or which one answers already."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore import __version__
from kvstore.cli.doctor_finding import Finding, Level, Subject, fail, ok, warn
from kvstore.cli.outcome import CommandFailed
from kvstore.cli.remote import Target, connect
from kvstore.cli.scrape import scrape
from kvstore_proto.v1 import store_pb2 as pb

PROBE_S = 2.0
_ANY = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "::": "[::1]"}  # noqa: S104 - nothing is bound to them


def check_listen(subject: Subject) -> Iterator[Finding]:
    for address in subject.config.listen_addresses:
        yield _listen(subject, address)
    if subject.config.metrics_listen is not None:
        yield _metrics(subject.config.metrics_listen)


def check_node(subject: Subject) -> Iterator[Finding]:
    """The node at `subject.target`; without one, that of the configuration."""
    target = subject.target or reachable(subject.config.listen_addresses[0])
    try:
        health, stat, answer_s = ask(subject.at(target), subject.deadline_s)
    except CommandFailed as error:
        yield fail(str(error), "start it, or correct --target")
        return
    if health != health_pb2.HealthCheckResponse.SERVING:
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(health)
        yield fail(f"{target}: {name}", "it is shutting down: wait for its end and start it again")
        return
    found = f"{_named(target, stat)}, {stat.objects} objects, answers in {answer_s * 1000:.1f} ms"
    yield ok(found) if stat.version == __version__ else _other_version(found)
    failures = {
        name: count for name, count in sorted(stat.counters.items())
        if name.startswith(("integrity_failures", "tier_failures")) and count
    }  # fmt: skip
    if failures:
        counts = ", ".join(f"{name} {count}" for name, count in failures.items())
        yield warn(
            f"{target}: since its start {counts}", "its log has a line on each; kvstore admin verify re-reads all"
        )


def running_node(subject: Subject) -> pb.StatResponse | None:
    """What the node that is configured so says, if it runs."""
    for address in subject.config.listen_addresses:
        try:
            return ask(subject.at(reachable(address)), PROBE_S)[1]
        except CommandFailed:
            continue
    return None


def reachable(address: str) -> str:
    """Where to reach what listens on `address`: every address of this machine includes the loopback one."""
    host, _, port = address.rpartition(":")
    return f"{_ANY.get(host, host)}:{port}"


def _listen(subject: Subject, address: str) -> Finding:
    try:
        _, stat, _ = ask(subject.at(reachable(address)), PROBE_S)
    except CommandFailed:
        free = _free(address, "listen")
        if free.level is Level.FAIL and subject.config.tls_cert is not None and subject.tls is None:
            return warn(free.found, "or is it this node? pass --tls-ca to ask it")
        return free
    found = f"{_named(address, stat)} runs there"
    return ok(found) if stat.version == __version__ else _other_version(found)


def _metrics(address: str) -> Finding:
    url = f"http://{reachable(address)}/metrics"
    try:
        scrape(url, PROBE_S)
    except CommandFailed:
        return _free(address, "metrics_listen")
    return ok(f"{url} serves metrics")


def _free(address: str, key: str) -> Finding:
    if address.startswith("unix:"):
        return _free_path(Path(address.removeprefix("unix:")))
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        with closing(socket.create_server((host.strip("[]"), int(port)), family=family)):
            return ok(f"{address} is free")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return fail(f"{address} is taken by something that is no node", f"end it, or choose another {key}")
        return fail(f"{address}: {error.strerror}", f"choose another {key}: an address of this machine")


def _free_path(path: Path) -> Finding:
    if not path.parent.is_dir():
        return fail(f"unix:{path}: there is no {path.parent}", "create it, or choose another listen")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return fail(f"unix:{path}: {path.parent} is not writable", f"let user {os.getuid()} write there")
    if path.exists() and not path.is_socket():
        return fail(f"unix:{path}: a file of another kind is there", "choose another path")
    return ok(f"unix:{path} is free")


def ask(target: Target, deadline_s: float) -> tuple[int, pb.StatResponse, float]:
    """(health, Stat, seconds that Stat took). Raises CommandFailed."""
    with connect(target, deadline_s) as remote:
        health = health_pb2_grpc.HealthStub(remote.channel).Check(
            health_pb2.HealthCheckRequest(), timeout=deadline_s
        ).status  # fmt: skip
        began_s = time.perf_counter()
        stat = remote.store.Stat(pb.StatRequest(), timeout=deadline_s)
        return health, stat, time.perf_counter() - began_s


def _named(address: str, stat: pb.StatResponse) -> str:
    return f"{address}: node {stat.node_id}, kvstore {stat.version}"


def _other_version(found: str) -> Finding:
    return warn(f"{found}; this command is of {__version__}", "install the same version on both sides")
