"""The nodes upstream of this one, as one place outside: what makes a node a sidecar.

A prompt's chunks are with the node that a client of all these nodes would choose for it, or with the next in that order
where that one is away. What they hold is asked, not known; the same question is asked once at a time, however many wait
for the answer. Nothing here raises for what they do: it is a miss, or an object that goes later, and is counted.

A node that has missed a delete is not asked for anything before it has been told: what it holds may be what somebody
was told is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing

from kvstore.engine.model import UpstreamStat
from kvstore.engine.outside import Chain, FoundChunk, FoundObject, Keep, PutObject, Sent
from kvstore.engine.owed import WHOLE_NAMESPACE, Owed, OwedDelete, OwedObject
from kvstore.engine.owed_file import OwedJournal
from kvstore.engine.upstream_peer import Peer
from kvstore.engine.upstream_reads import Reads
from kvstore.engine.upstream_repair import Repair, Whole
from kvstore.engine.upstream_writes import Writes
from kvstore.errors import UpstreamAway
from kvstore.index.entry import ObjectKey
from kvstore.metrics import NodeMetrics
from kvstore_client.connection import worth_another_node
from kvstore_client.errors import KvClientError, LimitExceeded
from kvstore_cluster.placement import rank
from kvstore_codec import Quality
from kvstore_proto.v1.framing import HASHES_MAX

Question = tuple[Chain, int]


class Upstream:
    """A Place. `timeout_s`: longest wait for a lookup, all nodes together. `writes`: whether what is put here goes
    there too; `waits`: and is waited for. `whole`: reads an object from this node's tiers. `journal`: keeps what is
    owed beyond this process; it is told of `owed`'s changes already."""

    def __init__(
        self, peers: Sequence[Peer], metrics: NodeMetrics, *, timeout_s: float, writes: bool, waits: bool,
        owed: Owed, whole: Whole, journal: OwedJournal | None = None,
    ) -> None:  # fmt: skip
        self._peers = {peer.address: peer for peer in peers}
        self._metrics, self._timeout_s, self._writes_there, self.waits = metrics, timeout_s, writes, waits
        self._owed, self._journal = owed, journal
        self._asked: dict[Question, asyncio.Task[list[FoundChunk]]] = {}
        self._reads = Reads(self._fetch, metrics)
        self._writes = Writes(self._send, self._owe, metrics)
        self._repair = Repair(self._peers, owed, self._writes, whole, self._save, metrics)

    @property
    def pending_bytes(self) -> int:
        """Of objects on their way there."""
        return self._writes.pending_bytes

    @property
    def owed_objects(self) -> int:
        """That are to go there when it is back."""
        return self._owed.objects

    @property
    def owed_deletes(self) -> int:
        """That are to be told there when it is back."""
        return self._owed.deletes

    def states(self) -> list[UpstreamStat]:
        return [UpstreamStat(peer.address, peer.state) for peer in self._peers.values()]

    def start(self) -> None:
        for peer in self._peers.values():
            peer.start()
        self._repair.start()

    async def find(self, chain: Chain, lease_ms: int) -> list[FoundChunk]:
        """The leases run out by themselves: what is fetched is held here."""
        question = (chain, lease_ms)
        asked = self._asked.get(question)
        if asked is None:
            asked = self._asked[question] = asyncio.get_running_loop().create_task(self._find(chain, lease_ms))
            asked.add_done_callback(lambda _: self._asked.pop(question))
        else:
            self._metrics.upstream_coalesced.labels("lookup").inc()
        await asyncio.wait([asked])  # not by itself: a caller that is cancelled would cancel it for all
        return [] if asked.cancelled() else asked.result()

    async def read(self, chain: Chain, quality: Quality, keep: Keep) -> AsyncGenerator[FoundObject, None]:
        async with aclosing(self._reads.read(chain, quality, keep)) as objects:
            async for each in objects:
                yield each

    def write(self, put: PutObject) -> asyncio.Future[bool] | None:
        return self._writes.put(put) if self._writes_there else None

    async def delete(self, keys: Sequence[ObjectKey]) -> None:
        """At every node, as a client of all of them would; one that is away is told when it is back. Raises
        UpstreamAway where that cannot be promised."""
        doomed = frozenset(keys)
        await self._writes.wait(lambda key: key in doomed)
        for key in keys:
            self._owed.settle(key)
        self._reads.forget(lambda key: key in doomed)
        for first in range(0, len(keys), HASHES_MAX):
            some = keys[first : first + HASHES_MAX]
            await self._delete(some[0].namespace_id, [key.chunk_hash for key in some], some[0].part)
        self._reads.forget(lambda key: key in doomed)  # again: what was read until it was deleted there
        self._save()

    async def purge(self, namespace_id: bytes) -> None:
        await self._writes.wait(lambda key: key.namespace_id == namespace_id)
        self._owed.settle_namespace(namespace_id)
        await self._delete(namespace_id, [], 0)
        self._reads.forget(lambda key: key.namespace_id == namespace_id)
        self._save()

    async def aclose(self) -> None:
        await self._repair.aclose()
        await self._writes.wait()
        for asked in list(self._asked.values()):
            asked.cancel()
        await self._reads.aclose()
        for peer in self._peers.values():
            await peer.aclose()
        if self._journal is not None:
            self._journal.close()

    def _ranked(self, namespace_id: bytes, first: bytes) -> Iterator[Peer]:
        """The nodes that are there and have been told all, in the order in which a client asks them."""
        for address in rank(self._peers, namespace_id + first):
            if self._is_ready(self._peers[address]):
                yield self._peers[address]

    def _is_ready(self, peer: Peer) -> bool:
        return peer.state == "closed" and not self._owed.owes_deletes(peer.address)

    async def _find(self, chain: Chain, lease_ms: int) -> list[FoundChunk]:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._timeout_s
        for peer in self._ranked(chain.namespace_id, chain.first):
            left_s = end_s - loop.time()
            if left_s <= 0:
                break
            try:
                return await peer.lookup(chain, lease_ms, left_s)
            except KvClientError as error:  # counted by the peer
                if not worth_another_node(error):
                    break
        return []

    async def _fetch(self, chain: Chain, quality: Quality) -> AsyncGenerator[memoryview, None]:
        """From the first node that is there: another one may hold it only where that was away."""
        for peer in self._ranked(chain.namespace_id, chain.first):
            came = False
            try:
                async with aclosing(peer.fetch(chain, quality)) as objects:
                    async for data in objects:
                        came = True
                        yield data
                return
            except KvClientError as error:
                if came or not worth_another_node(error):
                    raise

    async def _send(self, objects: Sequence[PutObject]) -> list[Sent]:
        namespace_id, _, first = prompt = objects[0].prompt
        home = self._owed.home(prompt)
        for peer in self._ranked(namespace_id, first):
            try:
                outcomes = await peer.put(objects)
            except KvClientError as error:
                if worth_another_node(error):
                    continue
                if isinstance(error, LimitExceeded):
                    break
                outcomes = ["rejected"] * len(objects)
            for put, outcome in zip(objects, outcomes, strict=True):
                self._metrics.upstream_writes.labels(outcome).inc()
                if peer.address == home:
                    self._owed.settle(put.key)
                else:  # there it is found only while its own node is away
                    self._owe(put)
            return outcomes
        self._metrics.upstream_writes.labels("failed").inc(len(objects))
        self._metrics.warn_once("upstream write", "upstream takes nothing now: what is put goes there later")
        for put in objects:
            self._owe(put)
        return ["failed"] * len(objects)

    def _owe(self, put: PutObject) -> None:
        if not self._owed.owe(OwedObject(put.key, put.first)):
            self._metrics.upstream_repairs.labels("forgotten").inc()
            self._metrics.warn_once("upstream owed", "upstream is away for long: some of what is put never goes there")
        self._repair.wake()

    async def _delete(self, namespace_id: bytes, hashes: Sequence[bytes], part: int) -> None:
        deleting = (self._deleted(peer, namespace_id, hashes, part) for peer in self._peers.values())
        failed = [error for error in await asyncio.gather(*deleting, return_exceptions=True) if error is not None]
        if failed:
            raise failed[0]

    async def _deleted(self, peer: Peer, namespace_id: bytes, hashes: Sequence[bytes], part: int) -> None:
        told = False
        try:
            if self._is_ready(peer):
                await peer.delete(namespace_id, hashes, part)
                told = True
            else:
                self._metrics.upstream_failures.labels(peer.address, "delete", "open").inc()
        except KvClientError:  # counted by the peer
            pass
        finally:  # also where the caller gives up: it may have reached the node, or not
            if not told:
                self._owe_deletes(peer.address, namespace_id, hashes, part)

    def _owe_deletes(self, address: str, namespace_id: bytes, hashes: Sequence[bytes], part: int) -> None:
        self._metrics.warn_once("upstream delete", "%s is away: it is told of deletes when it is back", address)
        doomed = [OwedDelete(address, namespace_id, part, each) for each in hashes or [WHOLE_NAMESPACE]]
        remembered = [self._owed.owe(each) for each in doomed]
        self._metrics.upstream_deletes.labels("owed").inc(sum(remembered))
        self._repair.wake()
        if not all(remembered):
            self._metrics.upstream_deletes.labels("refused").inc(remembered.count(False))
            raise UpstreamAway(
                "a node upstream is away, and no more deletes can be kept for it: delete again when it is back, or the "
                "whole namespace now", node=address,
            )  # fmt: skip

    def _save(self) -> None:
        if self._journal is not None:
            self._journal.save()
