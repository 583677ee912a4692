"""Leases: a promise, for a bounded time, that the objects of a lookup will not be evicted.

Its holder renews it by heartbeat for as long as it reads; a lease that nobody renews runs out by itself.
"""

from __future__ import annotations

import heapq
import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.index.columns import Columns
from kvstore.index.hash_table import Rows

LEASE_ID_BYTES = 16
LEASES_MAX = 100_000  # beyond it lookups are answered without a lease


@dataclass
class _Lease:
    rows: Rows
    births: npt.NDArray[np.uint32]  # of the rows' objects: a row that another object took is not held by it
    until_s: float


class Leases:
    """Counts how many leases hold a row, in its column `leases`: one of thousands of rows is taken and let go in a few
    steps. Expired ones are let go whenever the clock is shown; those of a row whose object is gone hold nothing."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._leases: dict[bytes, _Lease] = {}
        self._expiries: list[tuple[float, bytes]] = []  # also of leases that were renewed since

    def __len__(self) -> int:
        return len(self._leases)

    def holds(self, row: int) -> bool:
        return bool(self._columns["leases"][row])

    def take(self, rows: Rows, now_s: float, lease_s: float) -> bytes:
        """A lease on `rows`, each named once, until now_s + lease_s; b"" where none is to be had."""
        self.expire(now_s)
        if not len(rows) or lease_s <= 0 or len(self._leases) >= LEASES_MAX:
            return b""
        lease_id = secrets.token_bytes(LEASE_ID_BYTES)
        self._leases[lease_id] = _Lease(rows, self._columns["birth"][rows], now_s + lease_s)
        self._columns["leases"][rows] += np.uint32(1)
        heapq.heappush(self._expiries, (now_s + lease_s, lease_id))
        return lease_id

    def renew(self, lease_id: bytes, now_s: float, lease_s: float) -> bool:
        """Holds on until now_s + lease_s at least; False for a lease that ran out or never was."""
        self.expire(now_s)
        lease = self._leases.get(lease_id)
        if lease is None:
            return False
        if now_s + lease_s > lease.until_s:
            lease.until_s = now_s + lease_s
            heapq.heappush(self._expiries, (lease.until_s, lease_id))
        return True

    def release(self, lease_id: bytes) -> bool:
        """Lets go before the time; False for a lease that ran out or never was."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return False
        same = self._columns["birth"][lease.rows] == lease.births
        self._columns["leases"][lease.rows[same]] -= np.uint32(1)
        return True

    def expire(self, now_s: float) -> None:
        while self._expiries and self._expiries[0][0] <= now_s:
            _, lease_id = heapq.heappop(self._expiries)
            lease = self._leases.get(lease_id)
            if lease is not None and lease.until_s <= now_s:
                self.release(lease_id)
        if len(self._expiries) > 64 + 4 * len(self._leases):  # mostly of leases renewed or released
            self._expiries = [(lease.until_s, lease_id) for lease_id, lease in self._leases.items()]
            heapq.heapify(self._expiries)
