"""Puts in the background: how much may wait, whose turn it is, and how they end when their client is closed.

One at a time, in the order of the calls: a prompt's first chunks are stored before those that another call adds behind
them, and what an earlier one has stored, a later one does not encode again.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvstore_client.deadline import Deadline
from kvstore_client.errors import ClientClosed, DeadlineExceeded, KvClientError, LimitExceeded
from kvstore_client.metrics import ClientMetrics

#: Of KV that waits or is being put, by default: about that of 8,000 tokens of an 8B model.
QUEUE_BYTES_MAX = 1 << 30


class Dropped(Exception):
    """A put that ended without a node's answer, as this queue has it. `cause`: what a strict client raises."""

    def __init__(self, cause: KvClientError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class BackgroundPuts:
    """Of one session. `admit` and `release` may be called in any thread, the rest in the session's event loop."""

    def __init__(self, bytes_max: int, metrics: ClientMetrics) -> None:
        self._bytes_max, self._metrics = bytes_max, metrics
        self._lock = threading.Lock()
        self._bytes = 0
        self._running: set[asyncio.Task[object]] = set()  # or waiting for their turn
        self._last: asyncio.Future[None] | None = None  # done when the last in the queue has had its turn
        self._closed = False

    def admit(self, size_bytes: int) -> bool:
        """Whether a put of so much KV may wait: `release` it when it has ended. One that is larger than the queue may
        where nothing else does, or it could never be stored."""
        with self._lock:
            if self._bytes and self._bytes + size_bytes > self._bytes_max:
                return False
            self._bytes += size_bytes
        self._metrics.background_puts.inc()
        self._metrics.background_bytes.inc(size_bytes)
        return True

    def release(self, size_bytes: int) -> None:
        with self._lock:
            self._bytes -= size_bytes
        self._metrics.background_puts.dec()
        self._metrics.background_bytes.dec(size_bytes)

    @asynccontextmanager
    async def turn(self, limit: Deadline, *, admitted: bool) -> AsyncIterator[None]:
        """Inside, it is the running task's turn. Raises Dropped where that does not come, or is cut off by `aclose`."""
        if not admitted:
            raise Dropped(LimitExceeded("the queue of background puts is full", bytes_max=self._bytes_max))
        task, turn = asyncio.current_task(), asyncio.get_running_loop().create_future()
        assert task is not None
        before, self._last = self._last, turn
        self._running.add(task)
        try:
            await self._wait(before, limit)
            yield
        except asyncio.CancelledError:
            if self._closed:
                raise Dropped(ClientClosed("the client was closed before the put was done")) from None
            raise
        finally:
            self._running.discard(task)
            if before is None or before.done():
                turn.set_result(None)
            else:  # given up before its turn: who comes next waits for the one before it
                before.add_done_callback(lambda _: turn.set_result(None))

    async def _wait(self, before: asyncio.Future[None] | None, limit: Deadline) -> None:
        if self._closed:
            raise Dropped(ClientClosed("the client was closed before the put was done"))
        if before is not None:
            await asyncio.wait([before], timeout=limit.remaining())
        if limit.remaining() <= 0 or (before is not None and not before.done()):
            raise Dropped(DeadlineExceeded("the deadline passed before the put had its turn", seconds=limit.seconds))

    async def aclose(self, wait_s: float) -> None:
        """Gives what is queued so many seconds, and drops the rest. Idempotent."""
        if self._running:
            await asyncio.wait(self._running, timeout=wait_s)
        self._closed = True
        late = list(self._running)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)
