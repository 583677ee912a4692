"""Makes good what nodes upstream missed while they were away: first the deletes, then the objects that did not arrive.

Deletes go as soon as the node is there, since it is not asked for anything before. Objects go one batch at a time, of
each prompt its parents first, with a pause after each as long as it took: at most half of what the link, the node and
our own disk can do, whatever that is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from kvstore.engine.outside import PutObject
from kvstore.engine.owed import WHOLE_NAMESPACE, Owed, OwedDelete, OwedObject
from kvstore.engine.upstream_peer import Peer
from kvstore.engine.upstream_writes import PENDING_BYTES_MAX, Writes
from kvstore.metrics import NodeMetrics
from kvstore_client.errors import KvClientError
from kvstore_proto.v1.framing import HASHES_MAX

log = logging.getLogger(__name__)

TICK_S = 0.1  # between looks at whether a node is there
RETRY_S = 1.0  # after a batch that failed, though the node is there
BATCH_OBJECTS = 32
BATCH_BYTES = 16 << 20  # read ahead, but for the last object

#: What is owed, read from this node's tiers; None: it is not held any more, or not whole.
Whole = Callable[[OwedObject], Awaitable[PutObject | None]]


class Repair:
    """`saved` is called when deletes were told: what is deleted twice may have been put in between."""

    def __init__(
        self, peers: Mapping[str, Peer], owed: Owed, writes: Writes, whole: Whole, saved: Callable[[], None],
        metrics: NodeMetrics,
    ) -> None:  # fmt: skip
        self._peers, self._owed, self._writes, self._whole = peers, owed, writes, whole
        self._saved, self._metrics = saved, metrics
        self._owes = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self.wake()  # something may be owed from before a restart
        self._tasks = [asyncio.get_running_loop().create_task(work()) for work in (self._tell, self._send)]

    def wake(self) -> None:
        """Something is owed."""
        self._owes.set()

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _tell(self) -> None:
        while True:
            await self._until_owing()
            for address, peer in self._peers.items():
                while peer.state == "closed" and (deletes := self._owed.next_deletes(address, HASHES_MAX)):
                    await self._told(peer, deletes)
            await asyncio.sleep(TICK_S)

    async def _told(self, peer: Peer, deletes: Sequence[OwedDelete]) -> None:
        hashes = [each.chunk_hash for each in deletes if each.chunk_hash != WHOLE_NAMESPACE]
        try:
            await peer.delete(deletes[0].namespace_id, hashes, deletes[0].part)
        except KvClientError:  # counted by the peer
            await asyncio.sleep(RETRY_S)
            return
        self._owed.told(deletes)
        self._saved()
        self._metrics.upstream_deletes.labels("told").inc(len(deletes))
        if not self._owed.owes_deletes(peer.address):
            log.info("upstream %s has been told all deletes that it missed", peer.address)

    async def _send(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._until_owing()
            there = [a for a, peer in self._peers.items() if peer.state == "closed" and not self._owed.owes_deletes(a)]
            owed = self._owed.next_objects(there, BATCH_OBJECTS)
            if not owed or self._writes.pending_bytes > PENDING_BYTES_MAX // 2:  # what is put now comes first
                await asyncio.sleep(TICK_S)
                continue
            began_s = loop.time()
            left = await self._left_of(owed)
            for prompt in dict.fromkeys(each.prompt for each in left):
                self._owed.postpone(prompt)
            await asyncio.sleep(RETRY_S if left else loop.time() - began_s)

    async def _left_of(self, owed: Sequence[OwedObject]) -> list[OwedObject]:
        """Sends as much of it as is read at a time; what no node took, and is owed still."""
        arriving: dict[OwedObject, asyncio.Future[bool]] = {}
        size_bytes, left = 0, []
        for each in owed:
            if size_bytes >= BATCH_BYTES:
                break
            put = await self._whole(each)
            if not self._owed.owes(each.key):
                continue  # deleted, or put again and sent, while it was read
            if put is None:
                self._owed.settle(each.key)
                self._metrics.upstream_repairs.labels("gone").inc()
                continue
            size_bytes += len(put.data)
            arrived = self._writes.put(put)
            if arrived is None:
                left.append(each)
                break
            arriving[each] = arrived
        if arriving:
            await asyncio.wait(arriving.values())
        settled = [arrived for each, arrived in arriving.items() if not self._owed.owes(each.key)]
        sent = sum(arrived.result() for arrived in settled)
        self._metrics.upstream_repairs.labels("sent").inc(sent)
        self._metrics.upstream_repairs.labels("rejected").inc(len(settled) - sent)
        return left + [each for each in arriving if self._owed.owes(each.key)]

    async def _until_owing(self) -> None:
        while not self._owed.objects and not self._owed.deletes:
            self._owes.clear()
            await self._owes.wait()
