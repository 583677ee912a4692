"""What is stored of a chain, read batch by batch for who sends it: what memory holds at once, the rest as it comes.

Belongs to the event loop.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from kvstore.engine.node import Node, ObjectKey
from kvstore_codec import Quality


@dataclass
class ChainReader:
    """`keys` (of one namespace and part), each at `quality`; `first_chunk`: as of `Node.find`. `bytes_max`: of a batch,
    which the last of its objects may exceed. `held_bytes`: of each object, the beginning that the reader has and is not
    given (empty: none of any); the first that has no more ends what is stored."""

    node: Node
    keys: Sequence[ObjectKey]
    quality: Quality
    first_chunk: bytes
    bytes_max: float
    slow_bytes_max: float
    held_bytes: Sequence[int] = ()
    taken: int = field(default=0, init=False)
    slow: AsyncGenerator[memoryview, None] | None = field(default=None, init=False)
    given: int = field(default=0, init=False)
    is_over: bool = field(default=False, init=False)

    @property
    def is_read(self) -> bool:
        """Whether nothing is left to read; False is no promise."""
        return self.is_over or (self.taken == len(self.keys) and self.slow is None)

    def at_once(self) -> list[memoryview]:
        """What memory holds of what comes next, about a batch."""
        if self.slow is not None or self.is_over:
            return []
        batch = self.node.read_at_once(self.keys[self.taken :], self.quality, self.bytes_max)
        self.taken += len(batch)
        return self._lacking(batch)

    async def batch(self) -> list[memoryview]:
        """The next objects; none at the end of what is stored."""
        batch = self.at_once()
        if batch or self.is_read:
            return batch
        bytes_max = self.slow_bytes_max
        if self.slow is None:
            self.slow = self.node.read_chain(self.keys, self.quality, self.first_chunk, self.taken)
            bytes_max = 1  # the first that takes time alone, as soon as it is there
        size = 0
        while size < bytes_max and (stored := await anext(self.slow, None)) is not None:
            batch.append(stored)
            size += len(stored)
        return self._lacking(batch)

    def _lacking(self, batch: list[memoryview]) -> list[memoryview]:
        if self.held_bytes:
            held = self.held_bytes[self.given : self.given + len(batch)]
            rests = [stored[size:] for stored, size in zip(batch, held, strict=True)]
            batch = list(itertools.takewhile(len, rests))
            self.is_over = len(batch) < len(rests)
        self.given += len(batch)
        return batch

    async def aclose(self) -> None:
        if self.slow is not None:
            await self.slow.aclose()
