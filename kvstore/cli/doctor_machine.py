"""Checks of the machine: CPU, memory, open files, clock."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from kvstore.cli import render
from kvstore.cli.doctor_finding import Finding, Subject, fail, ok, warn
from kvstore.cli.doctor_network import ask, running_node
from kvstore.cli.outcome import CommandFailed
from kvstore.cli.remote import Target
from kvstore.engine.upstream_open import upstream_tls
from kvstore.errors import ConfigError
from kvstore.service.server import RPCS_MAX
from kvstore.tiers.arena import SPARE_BYTES_MIN, SPARE_PART
from kvstore.tiers.host import HostTier
from kvstore_codec import _native
from kvstore_codec.native import NativeCoder
from kvstore_proto.v1 import store_pb2 as pb

_CGROUPS = (  # version 2, version 1: limit, used
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
_TIME_ERROR = 5  # sys/timex.h: the clock is not synchronised
SKEW_S_MAX = 1.0


def check_cpu(subject: Subject) -> Iterator[Finding]:
    sets = [name for _, name in _native.instruction_sets()]
    chosen = NativeCoder().isa
    found = f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores for us; codec uses {chosen} of {', '.join(sets)}"
    if sets == ["scalar"]:
        yield warn(found, "run on a CPU with AVX2: the codec is several times faster there")
    else:
        yield ok(found)


def check_memory(subject: Subject) -> Iterator[Finding]:
    config = subject.config
    spare = max(config.host_capacity // SPARE_PART, SPARE_BYTES_MIN)
    wanted = config.host_capacity + spare + config.staged_bytes_max
    node = running_node(subject)
    taken = sum(tier.used_bytes for tier in node.tiers if tier.tier == pb.TIER_HOST) if node is not None else 0
    total, available = _memory()
    found = (
        f"host_capacity {render.size(config.host_capacity)}, with spare pages and staged_bytes_max up to "
        f"{render.size(wanted)}; {render.size(available)} of {render.size(total)} available"
        + (f", {render.size(taken)} more held by the running node" if taken else "")
    )
    if wanted > total:
        yield fail(found, "lower host_capacity (or staged_bytes_max), or give this machine or container more memory")
    elif wanted > available + taken:
        yield warn(found, "free memory, or lower host_capacity: the kernel ends processes when none is left")
    else:
        yield ok(found)
    if config.huge_pages:
        yield _huge_pages()


def check_files(subject: Subject) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * RPCS_MAX  # calls served at once: a connection, and a file that is read
    if 0 <= soft < wanted:
        yield warn(
            f"at most {soft} open files",
            f"allow {wanted}: ulimit -n {wanted}, LimitNOFILE= of systemd, ulimits of Compose (hard limit: {hard})",
        )
    else:
        yield ok(f"at most {soft} open files")


def check_clock(subject: Subject) -> Iterator[Finding]:
    if _clock_synchronised():
        yield ok("the kernel says that the clock is synchronised")
    else:
        yield warn("the kernel does not say that the clock is synchronised", "run chrony or another NTP client")
    tls = upstream_tls(subject.config)
    targets = [subject.at(subject.target)] if subject.target else []
    targets += [Target(seed, tls) for seed in subject.config.upstream_seeds if seed != subject.target]
    for target in targets:
        yield _skew(target, subject.deadline_s)


def _skew(target: Target, deadline_s: float) -> Finding:
    """How far a node's clock is off this machine's, as far as the time that its answer took can tell."""
    began_s = _now_s()
    try:
        theirs_s = ask(target, deadline_s)[1].unix_seconds
    except CommandFailed as error:
        return warn(f"the clock of {target}: {error}", "start the node, or correct the address")
    ended_s = _now_s()
    if not theirs_s:
        return warn(f"{target} does not say the time", "install the same version on both sides")
    skew_s = max(0.0, began_s - theirs_s, theirs_s - ended_s)
    if skew_s > SKEW_S_MAX:
        return warn(
            f"the clock of {target} is {skew_s:.1f} s off ours", "run an NTP client on both: log lines do not match"
        )
    return ok(f"the clock of {target} is within {skew_s + ended_s - began_s:.2f} s of ours")


def _now_s() -> float:
    return time.time()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _huge_pages() -> Finding:
    try:
        HostTier(SPARE_BYTES_MIN, huge_pages=True).close()
    except ConfigError as error:
        return fail("huge_pages cannot be had", str(error))
    return ok("huge_pages can be had")


def _memory() -> tuple[int, int]:
    """(total, available) bytes, of the machine or of the container."""
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    for limit, used in _CGROUPS:
        try:
            limit_bytes = int(limit.read_text())
            used_bytes = int(used.read_text())
        except (OSError, ValueError):  # not this version of cgroups; "max"
            continue
        total, available = min(total, limit_bytes), min(available, max(0, limit_bytes - used_bytes))
    return total, available


class _Timex(ctypes.Structure):
    """struct timex of sys/timex.h as far as it is looked at, which is not at all; `modes` 0 changes nothing."""

    _fields_ = [("modes", ctypes.c_uint), ("rest", ctypes.c_byte * 252)]


def _clock_synchronised() -> bool:
    return bool(ctypes.CDLL(None).adjtimex(ctypes.byref(_Timex())) not in (-1, _TIME_ERROR))
