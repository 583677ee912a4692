"""What lies outside the node and holds objects too: asked where its own tiers end, told what is put here.

A node has any number of such places, in the order in which it asks them. None of them is trusted to be there: each
answers in time or with a miss, and counts what it could not do. With none, all of this does nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

from kvstore.errors import UpstreamAway
from kvstore.index.entry import Described, ObjectKey
from kvstore.tiers.base import Bytes
from kvstore_codec import KVLayout, Quality

UNKNOWN = bytes(32)  # instead of a hash

Prompt = tuple[bytes, int, bytes]  # namespace, part, first chunk
Sent = Literal["stored", "have", "rejected", "failed"]  # what became of an object that was sent; the last: it is away


@dataclass(frozen=True)
class Chain:
    """Consecutive chunks of a prompt. `first`: hash of the prompt's first chunk, by which nodes are chosen.
    `before`: hash of the chunk before these, UNKNOWN where nobody said."""

    namespace_id: bytes
    hashes: tuple[bytes, ...]
    part: int
    first: bytes
    before: bytes = UNKNOWN

    @classmethod
    def of(cls, namespace_id: bytes, hashes: Sequence[bytes], part: int, first: bytes) -> Chain:
        """`first` empty: the chain begins with it."""
        return cls(namespace_id, tuple(hashes), part, first or (hashes[0] if hashes else UNKNOWN))

    def __len__(self) -> int:
        return len(self.hashes)

    def key(self, at: int) -> ObjectKey:
        return ObjectKey(self.namespace_id, self.hashes[at], self.part)

    def part_of(self, start: int, end: int) -> Chain:
        """Chunks `start` to `end`, without it."""
        before = self.hashes[start - 1] if start else self.before
        return replace(self, hashes=self.hashes[start:end], before=before)

    def after(self, count: int) -> Chain:
        """Without the first `count` chunks."""
        return self.part_of(count, len(self))


class FoundChunk(NamedTuple):
    """A chunk that a place says it holds. `tier`: what lookups call the place."""

    tokens: int
    quality: int
    provenance: int
    stored_bytes: int
    tier: str


class FoundObject(NamedTuple):
    """An object that was verified, or its prefix that reads at the quality asked for. `whole`: it is all that is
    stored there."""

    described: Described
    data: memoryview
    whole: bool


@dataclass(frozen=True)
class PutObject:
    """An object that was stored here. `first`: as of its Chain."""

    layout: KVLayout
    key: ObjectKey
    parent: bytes
    first: bytes
    quality: Quality
    data: Bytes

    @property
    def prompt(self) -> Prompt:
        return self.key.namespace_id, self.key.part, self.first


Keep = Callable[[ObjectKey, FoundObject], None]


class Place(Protocol):
    """One of them. No call but `delete` and `purge` raises for what the place does or fails to do; each ends within a
    bounded time."""

    @property
    def waits(self) -> bool:
        """Whether a put is answered only when what it sent there has arrived."""

    def start(self) -> None:
        """Begins to watch whether the place is there."""

    async def find(self, chain: Chain, lease_ms: int) -> Sequence[FoundChunk]:
        """The longest stored prefix of a chain, held there for `lease_ms` where the place has leases."""

    def read(self, chain: Chain, quality: Quality, keep: Keep) -> AsyncGenerator[FoundObject, None]:
        """These objects, in order, up to the first that is not there or not what it should be, or sooner. `keep` is
        told of each; maybe after the reader has gone."""

    def write(self, put: PutObject) -> asyncio.Future[bool] | None:
        """Sends an object there; the result is whether it is there now. None: it is not sent."""

    async def delete(self, keys: Sequence[ObjectKey]) -> None:
        """Raises UpstreamAway where they may be read from there again."""

    async def purge(self, namespace_id: bytes) -> None:
        """As `delete`."""

    async def aclose(self) -> None:
        """Waits for what is on its way, which takes a bounded time."""


class Outside:
    """All of a node's places as one."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = tuple(places)

    def start(self) -> None:
        for place in self._places:
            place.start()

    async def find(self, chain: Chain, lease_ms: int) -> list[FoundChunk]:
        """The longest prefix of a chain that the places hold together, each asked for what those before it lack."""
        found: list[FoundChunk] = []
        for place in self._places:
            if len(found) < len(chain):
                found += await place.find(chain.after(len(found)), lease_ms)
        return found

    async def read(self, chain: Chain, quality: Quality, keep: Keep) -> AsyncGenerator[FoundObject, None]:
        """Objects of the first place that has the first of them; there may be more."""
        for place in self._places:
            came = False
            async with aclosing(place.read(chain, quality, keep)) as objects:
                async for each in objects:
                    came = True
                    yield each
            if came:
                return

    def write(self, put: PutObject) -> list[asyncio.Future[bool]]:
        """Sends an object everywhere; what its put has to wait for."""
        sent = [(place.waits, place.write(put)) for place in self._places]
        return [future for waits, future in sent if waits and future is not None]

    async def delete(self, keys: Sequence[ObjectKey]) -> None:
        await self._everywhere(lambda place: place.delete(keys))

    async def purge(self, namespace_id: bytes) -> None:
        await self._everywhere(lambda place: place.purge(namespace_id))

    async def aclose(self) -> None:
        for place in self._places:
            await place.aclose()

    async def _everywhere(self, change: Callable[[Place], Awaitable[None]]) -> None:
        """Raises what one of them raised when all have been told."""
        failed: UpstreamAway | None = None
        for place in self._places:
            try:
                await change(place)
            except UpstreamAway as error:
                failed = error
        if failed is not None:
            raise failed
