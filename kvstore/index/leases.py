"""Leases: a promise, for a bounded time, that the objects of a lookup will not be evicted."""

from __future__ import annotations

import heapq
import secrets
from collections import Counter
from collections.abc import Iterable

from kvstore.index.entry import ObjectKey

LEASE_ID_BYTES = 16
LEASES_MAX = 100_000  # beyond it lookups are answered without a lease


class Leases:
    """Counts how many leases hold a key. Expired ones are let go whenever the clock is shown.

    A lease is on the key, not on one version of its object: a better version that replaces it is held as well.
    """

    def __init__(self) -> None:
        self._keys: dict[bytes, tuple[ObjectKey, ...]] = {}
        self._expiries: list[tuple[float, bytes]] = []
        self._counts: Counter[ObjectKey] = Counter()

    def __len__(self) -> int:
        return len(self._keys)

    def holds(self, key: ObjectKey) -> bool:
        return key in self._counts

    def take(self, keys: Iterable[ObjectKey], now_s: float, lease_s: float) -> bytes:
        """A lease on `keys` until now_s + lease_s; b"" where none is to be had."""
        self.expire(now_s)
        held = tuple(keys)
        if not held or lease_s <= 0 or len(self._keys) >= LEASES_MAX:
            return b""
        lease_id = secrets.token_bytes(LEASE_ID_BYTES)
        self._keys[lease_id] = held
        self._counts.update(held)
        heapq.heappush(self._expiries, (now_s + lease_s, lease_id))
        return lease_id

    def expire(self, now_s: float) -> None:
        while self._expiries and self._expiries[0][0] <= now_s:
            _, lease_id = heapq.heappop(self._expiries)
            for key in self._keys.pop(lease_id):
                self._counts[key] -= 1
                if not self._counts[key]:
                    del self._counts[key]
