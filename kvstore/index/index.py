"""The index: which objects are stored, in which tiers, and which of them would go first.

Pure bookkeeping: no bytes, no I/O, no clock of its own. One thread uses it (the node's event loop).

Eviction is leaf-first: an object is a victim in a tier only while no child of it is held there, because a chunk
without its prefix is dead weight. Among leaves the least recently used goes first; using a chunk uses its whole
prefix, so a parent is never older than its child. Leased objects are never victims.

Who a chunk's parent is, its writer says. It counts as a child only of an object that ends where it begins, so no
claim, however wrong, makes a circle in which nothing is a leaf.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence

from kvstore.index.entry import Entry, ObjectKey
from kvstore_codec import ObjectHeader


class Index:
    def __init__(self, tiers: Sequence[str], is_leased: Callable[[ObjectKey], bool] = lambda _: False) -> None:
        """`tiers`: names, fastest first. `is_leased`: whose answer keeps an object from being a victim."""
        self._tiers = tuple(tiers)
        self._is_leased = is_leased
        self._entries: dict[ObjectKey, Entry] = {}
        self._tick = 0
        # Children held in a tier, by parent and the position they begin at; the parent itself need not be stored.
        self._children: dict[tuple[str, ObjectKey, int], int] = {}
        # Per tier (last use, key) of objects that were leaves when pushed; stale pairs are skipped when popped.
        self._queues: dict[str, list[tuple[int, ObjectKey]]] = {tier: [] for tier in tiers}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, key: ObjectKey) -> Entry | None:
        return self._entries.get(key)

    def prefix(self, namespace_id: bytes, hashes: Sequence[bytes], part: int) -> list[Entry]:
        """Entries of the longest stored prefix of a chain, in one pass."""
        found: list[Entry] = []
        for chunk_hash in hashes:
            entry = self._entries.get(ObjectKey(namespace_id, chunk_hash, part))
            if entry is None:
                break
            found.append(entry)
        return found

    def touch(self, entries: Sequence[Entry], now_s: float) -> None:
        """Marks a prefix as used now, its last chunk first, so that parents stay younger than children."""
        for entry in reversed(entries):
            self._tick += 1
            entry.last_use, entry.last_use_s = self._tick, now_s
            for tier in entry.tiers:
                self._queue_if_leaf(entry, tier)

    def add(self, key: ObjectKey, parent: bytes, header: ObjectHeader, tier: str, now_s: float) -> Entry:
        """The object is now held in `tier`; makes its entry where there is none."""
        entry = self._entries.get(key)
        if entry is None:
            self._tick += 1
            entry = Entry(key, parent, header, last_use=self._tick, last_use_s=now_s)
            self._entries[key] = entry
        if tier not in entry.tiers:
            entry.tiers = tuple(name for name in self._tiers if name == tier or name in entry.tiers)
            above = (tier, entry.parent_key, entry.header.first_position)
            self._children[above] = self._children.get(above, 0) + 1
            self._queue_if_leaf(entry, tier)
        return entry

    def drop(self, entry: Entry, tier: str) -> None:
        """The object is no longer held in `tier`; forgets it when that was the last one. Idempotent."""
        if tier not in entry.tiers:
            return
        entry.tiers = tuple(name for name in entry.tiers if name != tier)
        above = (tier, entry.parent_key, entry.header.first_position)
        self._children[above] -= 1
        if not self._children[above]:
            del self._children[above]
            parent = self._entries.get(entry.parent_key)
            if parent is not None:
                self._queue_if_leaf(parent, tier)
        if not entry.tiers:
            del self._entries[entry.key]
        self._shorten(tier)

    def is_leaf(self, entry: Entry, tier: str) -> bool:
        return (tier, entry.key, _end_position(entry)) not in self._children

    def victim(self, tier: str, may_go: Callable[[Entry], bool] = lambda _: True) -> Entry | None:
        """The object that goes next from `tier`, or None if none may go. It stays until dropped."""
        queue, kept = self._queues[tier], []
        found = None
        while queue:
            last_use, key = queue[0]
            entry = self._entries.get(key)
            if entry is None or entry.last_use != last_use or tier not in entry.tiers or not self.is_leaf(entry, tier):
                heapq.heappop(queue)
            elif self._is_leased(key) or not may_go(entry):
                kept.append(heapq.heappop(queue))
            else:
                found = entry
                break
        for pair in kept:
            heapq.heappush(queue, pair)
        return found

    def _queue_if_leaf(self, entry: Entry, tier: str) -> None:
        if tier not in entry.tiers or not self.is_leaf(entry, tier):
            return
        heapq.heappush(self._queues[tier], (entry.last_use, entry.key))
        self._shorten(tier)

    def _shorten(self, tier: str) -> None:
        """Starts a queue afresh that is mostly stale pairs."""
        queue = self._queues[tier]
        if len(queue) > 64 + 4 * len(self._entries):
            queue[:] = [
                (each.last_use, each.key)
                for each in self._entries.values()
                if tier in each.tiers and self.is_leaf(each, tier)
            ]
            heapq.heapify(queue)


def _end_position(entry: Entry) -> int:
    return entry.header.first_position + entry.header.tokens
