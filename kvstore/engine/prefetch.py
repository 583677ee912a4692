"""Chains that are being brought to memory because somebody said that they will be read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from kvstore.index.entry import ObjectKey
from kvstore.metrics import NodeMetrics

UNDER_WAY_MAX = 8  # a hint more is not followed: reads come first

#: Reads the keys from a first one on, in order, up to the first miss; reading is what brings them to memory.
ReadChain = Callable[[Sequence[ObjectKey], bytes, int], AsyncGenerator[memoryview, None]]


class Prefetches:
    def __init__(self, read_chain: ReadChain, metrics: NodeMetrics) -> None:
        self._read_chain, self._metrics = read_chain, metrics
        self._tasks: dict[tuple[ObjectKey, ...], asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, keys: Sequence[ObjectKey], at: int, first_chunk: bytes) -> bool:
        """Whether the chunks of a prompt from `at` on are looked for now; the same hint twice is one. `first_chunk`: as
        of Node.find."""
        chain = tuple(keys)
        if chain not in self._tasks:
            if len(self._tasks) >= UNDER_WAY_MAX:
                self._metrics.prefetched_chunks.labels("refused").inc(len(chain) - at)
                return False
            task = asyncio.get_running_loop().create_task(self._follow(chain, at, first_chunk))
            self._tasks[chain] = task
            task.add_done_callback(lambda _: self._tasks.pop(chain))
        return True

    async def aclose(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _follow(self, chain: Sequence[ObjectKey], at: int, first_chunk: bytes) -> None:
        read = 0
        try:
            async with aclosing(self._read_chain(chain, first_chunk, at)) as objects:
                async for _ in objects:
                    read += 1
        finally:
            self._metrics.prefetched_chunks.labels("read").inc(read)
            self._metrics.prefetched_chunks.labels("missed").inc(len(chain) - at - read)
