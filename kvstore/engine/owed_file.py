"""What is owed upstream, kept on disk beside the objects: a restart forgets no delete, and no object to be sent.

One SQLite database, ROOT/upstream.sqlite. Each change of it is a transaction, synced; what a `kill -9` may cost is the
last second's objects. Deletes are there before they are answered.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path

from kvstore.engine.owed import OwedDelete, OwedObject, Record
from kvstore.index.entry import ObjectKey

log = logging.getLogger(__name__)

SAVE_S = 1.0
PROBLEM = "what is owed upstream cannot be saved: %s; a restart forgets it"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    number INTEGER PRIMARY KEY, namespace BLOB, chunk BLOB, part INTEGER, first BLOB, UNIQUE (namespace, chunk, part));
CREATE TABLE IF NOT EXISTS deletes (
    address TEXT, namespace BLOB, part INTEGER, chunk BLOB, PRIMARY KEY (address, namespace, part, chunk));
"""
_OWED: Mapping[type, str] = {
    OwedObject: "INSERT OR IGNORE INTO objects (namespace, chunk, part, first) VALUES (?, ?, ?, ?)",
    OwedDelete: "INSERT OR IGNORE INTO deletes (address, namespace, part, chunk) VALUES (?, ?, ?, ?)",
}
_SETTLED: Mapping[type, str] = {
    OwedObject: "DELETE FROM objects WHERE namespace = ? AND chunk = ? AND part = ? AND first = ?",
    OwedDelete: "DELETE FROM deletes WHERE address = ? AND namespace = ? AND part = ? AND chunk = ?",
}


class OwedFile:
    """Used by one thread at a time. Raises OSError where it cannot be used; a file that is no database is removed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._database = self._opened()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise OSError(errno.EIO, str(error)) from error
            log.warning("removed %s: %s; what was owed upstream is forgotten", path, error)
            path.unlink()
            self._database = self._opened()

    def load(self) -> list[Record]:
        """Deletes, then objects, in the order in which they were saved."""
        rows = self._database.execute("SELECT namespace, chunk, part, first FROM objects ORDER BY number")
        deletes = self._database.execute("SELECT address, namespace, part, chunk FROM deletes")
        return [
            *(OwedDelete(*row) for row in deletes),
            *(OwedObject(ObjectKey(namespace, chunk, part), first) for namespace, chunk, part, first in rows),
        ]

    def save(self, changes: Mapping[Record, bool]) -> None:
        """What is owed from now on (True), and what no more, as one change (blocking)."""
        try:
            with self._database:
                for record, owed in changes.items():
                    row = (*record.key, record.first) if isinstance(record, OwedObject) else record
                    self._database.execute((_OWED if owed else _SETTLED)[type(record)], row)
        except sqlite3.Error as error:
            raise OSError(errno.EIO, str(error)) from error

    def close(self) -> None:
        self._database.close()

    def _opened(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, check_same_thread=False)
        database.executescript(_SCHEMA)
        return database


class OwedJournal:
    """Gathers changes and saves them together. `on_disk`: as of Operations."""

    def __init__(self, file: OwedFile, on_disk: Callable[[Callable[[], None], str], None]) -> None:
        self._file, self._on_disk = file, on_disk
        self._changes: dict[Record, bool] = {}
        self._soon: asyncio.TimerHandle | None = None

    def note(self, record: Record, owed: bool) -> None:
        self._changes.pop(record, None)  # the last change of a record has its place in the order
        self._changes[record] = owed
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_later(SAVE_S, self.save)

    def save(self) -> None:
        """Queues what changed, before what is queued on the disk from now on."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        if self._changes:
            changes, self._changes = self._changes, {}
            self._on_disk(lambda: self._file.save(changes), PROBLEM)

    def close(self) -> None:
        self.save()
        self._on_disk(self._file.close, PROBLEM)
