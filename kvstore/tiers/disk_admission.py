"""Which objects are worth a write to the disk: those that are wanted a second time. Off by default.

Flash wears out with what is written to it, and many prompts never come again. With the filter (`disk_admission =
"second-use"`) an object is written behind only once it has been put or read twice; until then it lives in memory alone,
and a restart loses it. Durable puts pass by it, and so does what memory has no room for.
(The "reject first" admission policy of CacheLib: Berg et al., OSDI 2020.)
"""

from __future__ import annotations

from kvstore.index.entry import ObjectKey
from kvstore.tiers.disk_index import fingerprint

REMEMBERED = 1 << 17


class RejectFirst:
    """Remembers the last `remembered` to twice as many keys it has seen, at 70 to 100 bytes each. Pure: no I/O."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._recent: set[int] = set()
        self._older: set[int] = set()

    def admit(self, key: ObjectKey) -> bool:
        """Called whenever an object that is not on disk is put, read or about to leave memory: whether to write it."""
        name = fingerprint(key)
        seen = name in self._recent or name in self._older
        self._recent.add(name)
        if len(self._recent) >= self._remembered:
            self._older, self._recent = self._recent, set()
        return seen
