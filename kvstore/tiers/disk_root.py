"""The directory of the disk tier: whose it is, and what a node may remove from it.

ROOT/lock          held while a node uses ROOT; freed by the kernel however the process ends
ROOT/index         disk_index.py
ROOT/segments/     disk_segments.py
ROOT/namespaces/   layouts (engine/namespaces.py)
ROOT/upstream.sqlite   what nodes upstream have not been told (engine/owed_file.py)
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from pathlib import Path

from kvstore.errors import DiskUnusable
from kvstore.tiers.disk_segments import punch
from kvstore.tiers.disk_writer import BLOCK_BYTES

log = logging.getLogger(__name__)

_OURS = ("segments", "index")
_OLD = ("objects", "tmp")  # one file an object: what was never released


def claim(root: Path) -> int:
    """A descriptor that holds the lock. Raises DiskUnusable where ROOT is somebody else's or in use, OSError."""
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "lock").exists():
        for name in (*_OURS, *_OLD):
            if os.path.lexists(root / name):
                raise DiskUnusable(
                    f"disk_path {root} has {name} but no file lock, so no node made it: choose an empty directory, or "
                    "create the file if this one was a node's"
                )
    descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DiskUnusable(
            f"disk_path {root} is in use by another node: stop that node or choose another disk_path"
        ) from None
    return descriptor


def check_file_system(root: Path, descriptor: int) -> None:
    """`descriptor`: of an empty file in ROOT. Raises DiskUnusable where blocks cannot be given back one by one."""
    block_bytes = os.statvfs(root).f_frsize
    try:
        punch(descriptor, 0, BLOCK_BYTES)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        block_bytes = 0
    if not 0 < block_bytes <= BLOCK_BYTES:
        raise DiskUnusable(
            f"disk_path {root} is on a file system that cannot free blocks of {BLOCK_BYTES} bytes inside a file: use "
            "one on ext4, XFS, Btrfs or tmpfs"
        )


def remove_old_format(root: Path) -> None:
    """Raises OSError."""
    old = [root / name for name in _OLD if os.path.lexists(root / name)]
    for path in old:
        remove(path)
    if old:
        log.warning("removed %s: objects in a format from before the first release", ", ".join(map(str, old)))


def remove(path: Path) -> None:
    """Whatever it is; what a link points at stays. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
