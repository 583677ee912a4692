"""Objects on their way upstream: a queue for each prompt, so that no chunk goes before its parent."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice

from kvstore.engine.outside import Prompt, PutObject, Sent
from kvstore.index.entry import ObjectKey
from kvstore.metrics import NodeMetrics

STREAMS_MAX = 4  # at a time
BATCH_OBJECTS = 64  # of one stream
PENDING_BYTES_MAX = 128 << 20  # beyond it an object does not go upstream

#: Sends objects of one prompt, parents first; what became of each. Raises nothing.
Send = Callable[[Sequence[PutObject]], Awaitable[Sequence[Sent]]]
Queued = tuple[PutObject, asyncio.Future[bool]]


class Writes:
    """`dropped` is told of what is not even sent."""

    def __init__(self, send: Send, dropped: Callable[[PutObject], object], metrics: NodeMetrics) -> None:
        self._send, self._dropped, self._metrics = send, dropped, metrics
        self._queues: dict[Prompt, deque[Queued]] = {}
        self._drains: set[asyncio.Task[None]] = set()
        self._streams = asyncio.Semaphore(STREAMS_MAX)
        self._under_way: dict[asyncio.Future[bool], ObjectKey] = {}
        self.pending_bytes = 0

    def put(self, put: PutObject) -> asyncio.Future[bool] | None:
        """Queues an object; the result is whether it arrived. None where too much is on its way."""
        if self.pending_bytes + len(put.data) > PENDING_BYTES_MAX:
            self._metrics.upstream_writes.labels("full").inc()
            self._metrics.warn_once("upstream queue", "upstream is slower than puts are: some objects go later")
            self._dropped(put)
            return None
        self.pending_bytes += len(put.data)
        arrived: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._under_way[arrived] = put.key
        arrived.add_done_callback(lambda future: self._under_way.pop(future))
        if put.prompt in self._queues:
            self._queues[put.prompt].append((put, arrived))
        else:
            self._queues[put.prompt] = deque([(put, arrived)])
            drain = asyncio.get_running_loop().create_task(self._drain(put.prompt))
            self._drains.add(drain)
            drain.add_done_callback(self._drains.discard)
        return arrived

    async def wait(self, concerns: Callable[[ObjectKey], bool] = lambda key: True) -> None:
        """Until the writes that are on their way now have ended."""
        writes = [future for future, key in self._under_way.items() if concerns(key)]
        if writes:
            await asyncio.wait(writes)

    async def _drain(self, prompt: Prompt) -> None:
        queue = self._queues[prompt]
        async with self._streams:
            while queue:
                batch = list(islice(queue, BATCH_OBJECTS))
                outcomes = await self._send([put for put, _ in batch])
                for (put, future), outcome in zip(batch, outcomes, strict=True):
                    queue.popleft()
                    self._settle(put, future, outcome in ("stored", "have"))
                if not {"stored", "have"}.issuperset(outcomes):  # what is queued behind it is of no use there now
                    self._metrics.upstream_writes.labels("orphaned").inc(len(queue))
                    while queue:
                        put, future = queue.popleft()
                        if "failed" in outcomes:
                            self._dropped(put)
                        self._settle(put, future, False)
        del self._queues[prompt]

    def _settle(self, put: PutObject, future: asyncio.Future[bool], there: bool) -> None:
        self.pending_bytes -= len(put.data)
        future.set_result(there)
