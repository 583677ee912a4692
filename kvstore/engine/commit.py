"""The second phase of a put: what arrived is checked, made room for, stored, and made visible, object by object."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import kvstore_codec as codec
from kvstore.engine.holdings import Holdings
from kvstore.engine.model import Offer, Outcome, Result
from kvstore.engine.outside import Outside, PutObject
from kvstore.engine.stage import Checked, Stage, Staged, bytes_of
from kvstore.index.entry import Described, ObjectKey, Retention
from kvstore.metrics import NodeMetrics
from kvstore.tiers.host import Reserved
from kvstore_codec import KVLayout, ObjectHeader, ObjectInfo

Settled = tuple[Outcome, str]


class Commit:
    """One commit of one stage. `remember` is told the layout before its first object is stored."""

    def __init__(
        self, stage: Stage, holdings: Holdings, outside: Outside, metrics: NodeMetrics,
        remember: Callable[[KVLayout], None], *, durable: bool, retention: Retention | None,
    ) -> None:  # fmt: skip
        self._stage, self._holdings, self._metrics, self._remember = stage, holdings, metrics, remember
        self._outside = outside
        self._durable, self._retention = durable, retention
        self._keys = stage.keys
        self._sent: list[asyncio.Future[bool]] = []  # elsewhere, to be waited for

    async def run(self) -> list[Result]:
        """See Node.commit. Frees the stage."""
        try:
            settled = [await self._counted(index, key) for index, key in enumerate(self._keys)]
            if self._durable:
                for key, (outcome, _) in zip(self._keys, settled, strict=True):
                    if outcome != "rejected":
                        await self._persisted(key)
            if self._sent:
                await asyncio.wait(self._sent)
            return [
                Result(outcome, reason, outcome != "rejected" and self._is_durable(key))
                for key, (outcome, reason) in zip(self._keys, settled, strict=True)
            ]
        finally:
            self._stage.close()

    async def _counted(self, index: int, key: ObjectKey) -> Settled:
        offer = self._stage.offers[index]
        outcome, reason = await self._settle(index, key, offer)
        self._metrics.puts.labels(outcome).inc()
        if outcome == "stored":
            self._metrics.put_bytes.inc(offer.object_bytes)
        return outcome, reason

    async def _settle(self, index: int, key: ObjectKey, offer: Offer) -> Settled:
        verdict = self._stage.verdicts[index]
        if verdict == "refused":
            return "rejected", "too large, or too much in flight: put less at a time"
        if verdict == "have":
            held = self._holdings.index.get(key)
            if held is not None and held.at_least(offer.quality):
                self._holdings.used_again(held, self._stage.may_go)
                return "have", ""
            return "rejected", "evicted since the offer: put it again"
        staged = self._stage.take(index)
        if staged is None:
            return "rejected", "incomplete: pieces are missing"
        data = bytes_of(staged)
        # A thread lets go of its work a moment after the answer is here, and memory that somebody sees is not free: so
        # it takes the object out of a box.
        box = [data]
        try:
            checked = self._stage.checked(index)
            if checked is None:
                checked = await self._holdings.in_thread(lambda: check(box.pop(), self._stage, offer))
            else:
                await asyncio.sleep(0)  # others have their turn between any two objects
            if isinstance(checked, codec.ObjectError):
                raise checked
            header = checked
            self._remember(self._stage.layout)
            settled = await self._store(key, Described.of(header, offer.parent), staged)
        except codec.ObjectError as error:
            self._metrics.integrity_failures.labels("put", error.code.value).inc()
            self._metrics.warn_once("put damage", "a put sent a bad object: %s", error)
            settled = "rejected", str(error)
        finally:
            if isinstance(staged, Reserved) and not staged.adopted:
                self._holdings.host.release(staged)
        if settled[0] == "stored":
            stage = self._stage
            put = PutObject(stage.layout, key, offer.parent, stage.first_chunk, header.quality, data)
            self._sent += self._outside.write(put)
        return settled

    async def _store(self, key: ObjectKey, described: Described, data: Staged) -> Settled:
        holdings, queue, may_go = self._holdings, self._holdings.queue, self._stage.may_go
        while True:
            if queue is not None:
                await queue.wait_for_room_in_queue()
                writing = queue.writing(key)
                if writing is not None:
                    await asyncio.shield(writing)
                    continue
            held = holdings.index.get(key)
            if held is not None and held.at_least(described.quality):
                return "have", ""  # another put was quicker
            in_host = isinstance(data, Reserved) or holdings.room.in_host(key, len(data), may_go)
            # Memory may be full of what is not on disk yet: that becomes evictable one write at a time.
            worth_waiting = not in_host and queue is not None and len(data) <= holdings.host.capacity_bytes
            if not worth_waiting or queue is None or not await queue.wait_for_one():
                break
        in_host, written = holdings.place(
            key, described, data, may_go, in_host=in_host, retention=self._retention, durable=self._durable
        )
        if in_host:
            return "stored", ""
        if written is None:
            return "rejected", "no room: what is held is leased, pinned or of this put, or too small a tier"
        if await asyncio.shield(written):
            return "stored", ""
        return "rejected", "the disk could not be written"

    async def _persisted(self, key: ObjectKey) -> None:
        entry = self._holdings.index.get(key)
        if entry is not None and not self._is_durable(key):
            written = self._holdings.persist(entry, self._stage.may_go)
            if written is not None:
                await asyncio.shield(written)

    def _is_durable(self, key: ObjectKey) -> bool:
        entry = self._holdings.index.get(key)
        return entry is not None and entry.layers_in("disk") == entry.layers


class Arrival:
    """`check` of a wanted object of a stage while it arrives in `buffer`, in order; one thread at a time. What is wrong
    with it is told at its end."""

    def __init__(self, buffer: memoryview, stage: Stage, offer: Offer) -> None:
        # A view of its own: the stage's is released when the stage is closed, which a piece's thread may outlast.
        self._arriving: codec.Arriving | None = codec.Arriving(buffer[:])
        self._bytes, self._stage, self._offer = len(buffer), stage, offer
        self._checked: Checked | None = None

    def to(self, length: int) -> Checked | None:
        """The first `length` bytes are there. What `check` finds, when all are."""
        if self._arriving is not None:
            try:
                info = self._arriving.to(length)
                if info is not None:
                    self._checked = _header_of(info, self._stage, self._offer)
            except codec.ObjectError as error:
                self._checked = error.with_traceback(None)  # as in `check`
            if self._checked is not None:
                self._arriving = None
        return self._checked if length == self._bytes else None


def check(data: memoryview, stage: Stage, offer: Offer) -> Checked:
    """Whether an object is all it was offered as. Any thread may ask."""
    try:
        return _header_of(codec.verify(data), stage, offer)
    except codec.ObjectError as error:
        return error.with_traceback(None)  # its frames see the object, and memory that somebody sees is not free


def _header_of(info: ObjectInfo, stage: Stage, offer: Offer) -> ObjectHeader:
    """Raises codec.ObjectError."""
    codec.check_header(info.header, stage.layout, chunk_hash=offer.hash, part=stage.part)
    if info.quality != offer.quality or info.header.quality != offer.quality:
        raise codec.ForeignObject(
            "the object has another quality than was offered, or is a truncated one",
            found=info.quality.label, whole=info.header.quality.label, offered=offer.quality.label,
        )  # fmt: skip
    return info.header
