"""Objects on a local file system, one file each (docs/design/0001).

    ROOT/lock                     held while a node uses ROOT
    ROOT/objects/ab/NAME.kvc      the object's bytes, then a trailer of 64 bytes
    ROOT/tmp/                     files being written; emptied at every start
    ROOT/namespaces/ID.json       layouts (engine/namespaces.py)

A file becomes an object by `rename` after `fsync`, then its directory is synced: a process killed, or a machine
losing power, at any instant leaves the object whole or absent. Opening ROOT removes whatever is not an object, so a
directory that holds folders of these names but no lock is refused.
The trailer carries what the object's own bytes do not say, and a checksum over itself:

    magic "KVCTAIL1" (8) · object bytes u64 · parent hash (32) · 0 u64 · XXH3-64 of the 56 bytes before
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import xxhash

import kvstore_codec as codec
from kvstore.errors import DiskUnusable, TierFailed, TierFull
from kvstore.index.entry import ObjectKey
from kvstore.tiers.base import Bytes, StoredObject

log = logging.getLogger(__name__)

BLOCK_BYTES = 4096  # files take whole blocks
_TRAILER = struct.Struct("<8sQ32sQQ")
_MAGIC = b"KVCTAIL1"
_SUFFIX = ".kvc"


class DiskTier:
    """Raises DiskUnusable from the constructor when ROOT cannot be used or another node uses it."""

    name = "disk"

    def __init__(self, root: Path, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._objects_dir, self._tmp_dir = root / "objects", root / "tmp"
        self._sizes: dict[ObjectKey, int] = {}
        self._used_bytes = 0
        self._serial = 0
        self._unrecorded_uses = 0
        try:
            root.mkdir(parents=True, exist_ok=True)
            _refuse_foreign(root, self._objects_dir, self._tmp_dir)
            self._lock = _lock(root / "lock")
            try:
                self._prepare(root)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise DiskUnusable(
                f"disk_path {root} cannot be used: {error.strerror}: choose a directory that this process may write"
            ) from error

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def objects(self) -> int:
        return len(self._sizes)

    def cost_bytes(self, length: int) -> int:
        return -(-(length + _TRAILER.size) // BLOCK_BYTES) * BLOCK_BYTES

    def put(self, key: ObjectKey, parent: bytes, data: Bytes) -> None:
        cost = self.cost_bytes(len(data))
        # While it is written, a replacement stands beside what it replaces.
        if self._used_bytes + cost > self.capacity_bytes:
            raise TierFull("disk tier has no room", needed=cost, free=self.capacity_bytes - self._used_bytes)
        path = self._path(key)
        self._serial += 1
        temporary = self._tmp_dir / f"{self._serial}"
        try:
            with temporary.open("wb", buffering=0) as file:
                _write_all(file.fileno(), [data, _trailer(len(data), parent)])
                os.fsync(file.fileno())
            temporary.rename(path)
            self._used_bytes += cost - self._sizes.get(key, 0)
            self._sizes[key] = cost
            try:
                _sync_directory(path.parent)
            except OSError:
                self.delete(key)  # it may not outlive a loss of power: better none than one that is not durable
                raise
        except OSError as error:
            with contextlib.suppress(OSError):  # the first error is the one to report; the next start empties tmp
                temporary.unlink(missing_ok=True)
            raise TierFailed(f"disk tier cannot write: {error.strerror}", errno=error.errno) from error

    def read(self, key: ObjectKey, length: int) -> memoryview | None:
        """Raises TierFailed where the medium cannot be read."""
        try:
            with self._path(key).open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size - _TRAILER.size < length:
                    return None
                data = bytearray(length)
                view, at = memoryview(data), 0
                while at < length:
                    count = file.readinto(view[at:])
                    if not count:
                        return None
                    at += count
                self._record_use(file.fileno())
                return view
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TierFailed(f"disk tier cannot read: {error.strerror}", errno=error.errno) from error

    def delete(self, key: ObjectKey) -> bool:
        """Raises TierFailed where the medium refuses."""
        try:
            self._path(key).unlink()
            found = True
        except FileNotFoundError:
            found = False
        except OSError as error:
            raise TierFailed(f"disk tier cannot delete: {error.strerror}", errno=error.errno) from error
        self._used_bytes -= self._sizes.pop(key, 0)
        return found

    def scan(self) -> Iterator[StoredObject]:
        """Counts what is there and removes what is no object. Raises TierFailed."""
        found: list[tuple[int, Path, StoredObject]] = []
        removed = 0
        try:
            for directory in self._objects_dir.iterdir():
                for path in directory.iterdir():
                    stored = _read_stored(path)
                    if stored is None or path != self._path(stored.key):
                        _remove(path)
                        removed += 1
                        continue
                    status = path.stat()
                    self._sizes[stored.key] = self.cost_bytes(stored.header.object_bytes)
                    self._used_bytes += self._sizes[stored.key]
                    found.append((status.st_mtime_ns, path, stored))
        except OSError as error:
            raise TierFailed(f"disk tier cannot be scanned: {error.strerror}", errno=error.errno) from error
        if removed:
            log.warning("removed %d files under %s that are no intact objects", removed, self._objects_dir)
        return iter([stored for _, _, stored in sorted(found, key=lambda each: each[:2])])

    def close(self) -> None:
        os.close(self._lock)

    def _prepare(self, root: Path) -> None:
        shutil.rmtree(self._tmp_dir, ignore_errors=True)
        self._tmp_dir.mkdir()
        self._objects_dir.mkdir(exist_ok=True)
        names = {f"{prefix:02x}" for prefix in range(256)}
        for path in self._objects_dir.iterdir():
            if path.name not in names or path.is_symlink() or not path.is_dir():
                log.warning("removed %s: not a folder of objects", path)
                _remove(path)
        for name in names:
            (self._objects_dir / name).mkdir(exist_ok=True)
        for directory in (self._objects_dir, root):
            _sync_directory(directory)

    def _record_use(self, descriptor: int) -> None:
        """The order of use outlives the process, where the file system lets it."""
        try:
            os.utime(descriptor)
        except OSError as error:
            if not self._unrecorded_uses:
                log.warning("uses of objects cannot be recorded: %s; after a restart others go first", error.strerror)
            self._unrecorded_uses += 1

    def _path(self, key: ObjectKey) -> Path:
        name = f"{key.chunk_hash.hex()}-{key.part}-{key.namespace_id.hex()}{_SUFFIX}"
        return self._objects_dir / key.chunk_hash[:1].hex() / name


def _trailer(length: int, parent: bytes) -> bytes:
    body = _TRAILER.pack(_MAGIC, length, parent, 0, 0)[:-8]
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


def _read_stored(path: Path) -> StoredObject | None:
    """Header and trailer of an object's file; None where it is not one."""
    if path.suffix != _SUFFIX or not path.is_file() or path.is_symlink():
        return None
    with path.open("rb", buffering=0) as file:
        head = file.read(codec.HEADER_BYTES)
        end = file.seek(0, os.SEEK_END)
        if end < codec.HEADER_BYTES + _TRAILER.size:
            return None
        file.seek(end - _TRAILER.size)
        tail = file.read(_TRAILER.size)
    magic, length, parent, _, checksum = _TRAILER.unpack(tail)
    if magic != _MAGIC or checksum != xxhash.xxh3_64_intdigest(tail[:-8]) or length != end - _TRAILER.size:
        return None
    try:
        header = codec.parse_header(head)
    except codec.ObjectError:
        return None
    if header.object_bytes != length:
        return None
    return StoredObject(ObjectKey(header.namespace_id, header.chunk_hash, header.part), parent, header)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _write_all(descriptor: int, buffers: list[Bytes]) -> None:
    """All of the buffers; a file system may take less at a time."""
    views = [memoryview(buffer) for buffer in buffers]
    while views:
        written = os.writev(descriptor, views)
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if views and written:
            views[0] = views[0][written:]


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_foreign(root: Path, *folders: Path) -> None:
    """What a node finds in its folders it removes: they must not be somebody else's."""
    for folder in folders:
        if folder.exists() and not (root / "lock").exists():
            raise DiskUnusable(
                f"disk_path {root} has a folder {folder.name} but no file lock, so no node made it: choose an empty "
                "directory, or create the file if this one was a node's"
            )


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DiskUnusable(
            f"disk_path {path.parent} is in use by another node: stop that node or choose another disk_path"
        ) from None
    return descriptor
