"""Checks of the disk tier's directory: whether a node may use it, whether it has the room, how long a sync takes."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from kvstore.cli import render
from kvstore.cli.doctor_finding import Finding, Subject, fail, ok, warn
from kvstore.errors import DiskUnusable
from kvstore.tiers.disk_root import check_file_system

SYNCS = 16
SYNC_BYTES = 1 << 20
SYNC_S_MAX = 0.05  # a disk that turns needs about 20 ms; a durable put waits for two syncs
_REMOTE = ("nfs", "cifs", "smb", "9p", "fuse", "ceph", "gluster", "lustre")
_FLEETING = {"tmpfs", "ramfs", "overlay"}


def check_disk(subject: Subject) -> Iterator[Finding]:
    root = subject.config.disk_path
    if root is None:
        yield ok("no disk_path: nothing survives a restart")
        return
    place = _nearest(root)
    if not place.is_dir() or (root.exists() and place != root):
        yield fail(f"disk_path {root}: {place} is not a directory", "choose a directory")
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".kvstore-doctor-", dir=place) as scratch:
            yield _file_system(root, Path(scratch))
            yield _syncs(Path(scratch))
    except DiskUnusable as error:
        message, _, fix = str(error).partition(": ")
        yield fail(message, fix)
        return
    except OSError as error:
        yield fail(
            f"disk_path {root}: {error.strerror}", f"let user {os.getuid()} write below {place}, or choose another"
        )
        return
    yield _room(subject.config.disk_capacity, root, place)


def _file_system(root: Path, scratch: Path) -> Finding:
    """Raises DiskUnusable, OSError."""
    descriptor = os.open(scratch / "holes", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        check_file_system(scratch, descriptor)
    finally:
        os.close(descriptor)
    kind = _file_system_of(scratch)
    found = f"disk_path {root} is writable, on {kind}, which gives back blocks inside a file"
    if kind.startswith(_REMOTE):
        return warn(found, "use a local disk: here a sync is a round trip, and a lock may outlive its machine")
    if kind in _FLEETING:
        return warn(found, "use a volume or a disk: this one does not outlive the machine or the container")
    return ok(found)


def _syncs(scratch: Path) -> Finding:
    """Raises OSError."""
    data = os.urandom(SYNC_BYTES)
    times: list[float] = []
    with (scratch / "sync").open("wb", buffering=0) as file:
        for _ in range(SYNCS):
            began_s = time.perf_counter()
            file.write(data)
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began_s)
    median_s = statistics.median(times)
    found = (
        f"writing and syncing {render.size(SYNC_BYTES)} takes {median_s * 1000:.1f} ms "
        f"(median of {SYNCS}, longest {max(times) * 1000:.1f})"
    )
    return warn(found, "use a faster disk: durable puts wait for it") if median_s > SYNC_S_MAX else ok(found)


def _room(capacity_bytes: int, root: Path, place: Path) -> Finding:
    free_bytes = psutil.disk_usage(str(place)).free
    held_bytes = sum(_taken(path) for path in (root / "index", *(root / "segments").glob("*")))
    found = (
        f"disk_capacity {render.size(capacity_bytes)}: {render.size(held_bytes)} taken by objects, "
        f"{render.size(free_bytes)} free"
    )
    if held_bytes + free_bytes < capacity_bytes:
        return fail(found, "lower disk_capacity, or free room: on a full disk the tier only reads")
    return ok(found)


def _taken(path: Path) -> int:
    """Bytes on the medium; 0 for a file that has gone meanwhile."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _nearest(path: Path) -> Path:
    """The path, or the nearest above it that exists."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def _file_system_of(path: Path) -> str:
    real = path.resolve()
    mounts = [each for each in psutil.disk_partitions(all=True) if real.is_relative_to(each.mountpoint)]
    # The last of the longest: a mount hides what was mounted there before.
    return (
        max(enumerate(mounts), key=lambda each: (len(each[1].mountpoint), each[0]))[1].fstype if mounts else "unknown"
    )
