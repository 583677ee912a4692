"""Bulk connections to one node that are open and in no use. Any thread may take them."""

from __future__ import annotations

import threading
import time

from kvstore_client.transports.bulk_connection import BulkConnection

UNUSED_MAX = 4  # connections kept open
UNUSED_S_MAX = 120.0  # less than a node's patience


class ReadyConnections:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unused: list[tuple[float, BulkConnection]] = []
        self._closed = False

    def __len__(self) -> int:
        return len(self._unused)

    def take(self) -> BulkConnection | None:
        """The one that was used last; None where there is none, or that was too long ago."""
        with self._lock:
            if not self._unused:
                return None
            since_s, connection = self._unused.pop()
        if time.monotonic() - since_s < UNUSED_S_MAX:
            return connection
        connection.close()
        self.clear()  # the others are older
        return None

    def give_back(self, connection: BulkConnection) -> None:
        """After a request that ended well."""
        with self._lock:
            kept = not self._closed and len(self._unused) < UNUSED_MAX
            if kept:
                self._unused.append((time.monotonic(), connection))
        if not kept:
            connection.close()

    def clear(self) -> None:
        with self._lock:
            unused, self._unused = self._unused, []
        for _, connection in unused:
            connection.close()

    def close(self) -> None:
        """Of those that are still in use, none is kept."""
        self._closed = True
        self.clear()
