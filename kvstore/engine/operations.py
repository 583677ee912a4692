"""What an operator does to a node's objects: list, verify, evict, pin."""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Callable, Sequence

import kvstore_codec as codec
from kvstore.engine.holdings import Holdings
from kvstore.engine.model import ObjectEntry, VerifyProgress
from kvstore.engine.namespaces import Namespaces
from kvstore.engine.pin_file import PinFile
from kvstore.errors import InvalidRequest
from kvstore.index.entry import ObjectKey
from kvstore.index.held import Entry
from kvstore.metrics import NodeMetrics

OnDisk = Callable[[Callable[[], None], str], None]


class Operations:
    """`on_disk`: queues a change of what is kept beside the objects, and says so where the disk refuses it."""

    def __init__(
        self, holdings: Holdings, namespaces: Namespaces, pin_file: PinFile | None, on_disk: OnDisk,
        metrics: NodeMetrics, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._holdings, self._namespaces, self._pin_file, self._on_disk = holdings, namespaces, pin_file, on_disk
        self._metrics, self._clock = metrics, clock

    async def list_objects(
        self, namespace_id: bytes | None, hash_prefix: bytes, limit: int, page_token: str
    ) -> tuple[list[ObjectEntry], str]:
        """A page of objects in the order of their keys, and the token of the next ("": no more).

        Raises InvalidRequest for a token that is none."""
        after = _key_of_token(page_token) if page_token else None
        keys = self._holdings.index.keys(namespace_id)
        chosen = (key for key in keys if key.chunk_hash.startswith(hash_prefix) and (after is None or key > after))
        # In a thread: a million keys take a second, and lookups go on meanwhile.
        page = await self._holdings.in_thread(lambda: heapq.nsmallest(limit + 1, chosen))
        token = _token_of_key(page[limit - 1]) if len(page) > limit else ""
        self._holdings.room.expire()
        entries = [entry for entry in map(self._holdings.index.get, page[:limit]) if entry is not None]
        return [self._object_entry(entry) for entry in entries], token

    async def verify(self, namespace_id: bytes | None, hashes: Sequence[bytes] | None) -> AsyncIterator[VerifyProgress]:
        """Reads every copy of the chosen objects again; a damaged copy is dropped and reported."""
        index = self._holdings.index
        chosen = index.keys(namespace_id) if hashes is None else [e.key for e in index.named(hashes, namespace_id)]
        for checked, key in enumerate(chosen, 1):
            entry = index.get(key)
            problem = await self._problem(entry) if entry is not None else None
            yield VerifyProgress(checked, len(chosen), key.chunk_hash if problem else None, problem)

    async def evict(self, tier: str | None, wanted: int, hashes: Sequence[bytes] | None) -> tuple[int, int]:
        """(objects, bytes) evicted: the named chunks, or at least `wanted` bytes (0: all) in the usual order.

        Leased objects stay. `tier` None: from every tier."""
        holdings = self._holdings
        await holdings.wait_for_writes()  # what is on its way to disk is not evicted from memory
        evicted: set[ObjectKey] = set()
        freed = 0
        named = None if hashes is None else holdings.index.named(hashes)
        for held in (each for each in holdings.tiers if tier in (None, each.name)):
            if named is not None:
                going = iter([each for each in named if holdings.room.may_evict(each, held.name)])
            else:
                going = iter(lambda: None if 0 < wanted <= freed else holdings.room.victim(held.name), None)  # noqa: B023
            for entry in going:
                freed += held.cost_bytes(entry.length_in(held.name))
                evicted.add(entry.key)
                holdings.room.evict(entry, held.name, "admin")
        await holdings.wait_for_writes()
        return len(evicted), freed

    def pin(self, hashes: Sequence[bytes], seconds: int) -> tuple[int, int]:
        """(pinned, refused) objects: stored ones of these chunks, softly for `seconds`, or hard for 0."""
        now_s, pins = self._clock(), self._holdings.pins
        until_s = now_s + seconds if seconds else None
        entries = self._holdings.index.named(hashes)
        pinned = sum(pins.pin(entry.row, entry.length, until_s, now_s) for entry in entries)
        if not seconds:
            self._save_pins()
        return pinned, len(entries) - pinned

    def unpin(self, hashes: Sequence[bytes] | None) -> int:
        """How many objects were pinned and are no more; all without `hashes`."""
        pins = self._holdings.pins
        rows = pins.rows() if hashes is None else [entry.row for entry in self._holdings.index.named(hashes)]
        unpinned = sum(pins.forget(row) for row in rows)
        self._save_pins()
        return unpinned

    def _save_pins(self) -> None:
        """Hard pins outlive the process, where there is a disk."""
        keys = [self._holdings.index.key_of(row) for row in self._holdings.pins.hard_rows()]
        if self._pin_file is not None:
            file = self._pin_file
            self._on_disk(lambda: file.save(keys), "hard pins cannot be saved: %s; they end with this process")

    async def _problem(self, entry: Entry) -> str | None:
        problem = None
        for tier in entry.tiers:
            length = entry.length_in(tier) if entry.held else 0
            if not length:
                continue  # it went while another copy was read
            try:
                await self._holdings.read_checked(entry, tier, length)
            except codec.ObjectError as error:
                problem = f"{tier}: {error}"
        return problem

    def _object_entry(self, entry: Entry) -> ObjectEntry:
        key, described = entry.key, entry.described
        layout = self._namespaces.get(key.namespace_id)
        return ObjectEntry(
            key=key,
            parent=described.parent,
            tokens=described.tokens,
            first_position=described.first_position,
            quality=entry.quality,
            provenance=described.provenance,
            length=entry.length,
            tiers=entry.tiers,
            idle_seconds=max(0.0, self._clock() - entry.last_use_s),
            reads=entry.reads,
            leased=self._holdings.leases.holds(entry.row),
            pinned=self._holdings.pins.holds(entry.row),
            model=layout.model if layout is not None else "",
            revision=layout.revision if layout is not None else "",
        )


def _token_of_key(key: ObjectKey) -> str:
    return f"{key.namespace_id.hex()}{key.chunk_hash.hex()}{key.part:04x}"


def _key_of_token(token: str) -> ObjectKey:
    try:
        raw = bytes.fromhex(token)
    except ValueError:
        raw = b""
    if len(raw) != 66:
        raise InvalidRequest("page_token is not one that this node gave")
    return ObjectKey(raw[:32], raw[32:64], int.from_bytes(raw[64:], "big"))
