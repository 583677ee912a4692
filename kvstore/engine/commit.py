"""The second phase of a put: what arrived is checked, made room for, stored, and made visible, object by object."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import kvstore_codec as codec
from kvstore.engine.disk_queue import MayGo
from kvstore.engine.holdings import Holdings
from kvstore.engine.model import Offer, Outcome, Result
from kvstore.engine.stage import Stage
from kvstore.index.entry import Entry, ObjectKey
from kvstore.metrics import NodeMetrics
from kvstore_codec import KVLayout, ObjectHeader

Settled = tuple[Outcome, str]


async def commit(
    stage: Stage, holdings: Holdings, metrics: NodeMetrics, remember: Callable[[KVLayout], None], *, durable: bool
) -> list[Result]:
    """See Node.commit. `remember` is told the layout before its first object is stored."""
    try:
        return await _commit(stage, holdings, metrics, remember, durable=durable)
    finally:
        stage.close()


async def _commit(
    stage: Stage, holdings: Holdings, metrics: NodeMetrics, remember: Callable[[KVLayout], None], *, durable: bool
) -> list[Result]:
    keys = [ObjectKey(stage.layout.namespace_id, offer.hash, stage.part) for offer in stage.offers]
    chain = frozenset(keys)

    def may_go(entry: Entry) -> bool:
        """A put does not make room for its later chunks at the cost of its first: they would be dead weight."""
        return entry.key not in chain

    settled: list[Settled] = []
    for index, (key, offer) in enumerate(zip(keys, stage.offers, strict=True)):
        outcome, reason = await _settle(stage, index, key, offer, holdings, metrics, remember, may_go)
        metrics.puts.labels(outcome).inc()
        if outcome == "stored":
            metrics.put_bytes.inc(offer.object_bytes)
        settled.append((outcome, reason))
    if durable:
        for key, (outcome, _) in zip(keys, settled, strict=True):
            if outcome != "rejected":
                await _persisted(holdings, key, may_go)
    return [
        Result(outcome, reason, outcome != "rejected" and _is_durable(holdings, key))
        for key, (outcome, reason) in zip(keys, settled, strict=True)
    ]


async def _settle(
    stage: Stage, index: int, key: ObjectKey, offer: Offer, holdings: Holdings, metrics: NodeMetrics,
    remember: Callable[[KVLayout], None], may_go: MayGo,
) -> Settled:  # fmt: skip
    verdict = stage.verdicts[index]
    if verdict == "refused":
        return "rejected", "too large, or too much in flight: put less at a time"
    if verdict == "have":
        held = holdings.index.get(key)
        if held is not None and held.at_least(offer.quality):
            return "have", ""
        return "rejected", "evicted since the offer: put it again"
    data = stage.take(index)
    if data is None:
        return "rejected", "incomplete: pieces are missing"
    try:
        header = await holdings.in_thread(lambda: _checked(data, stage, offer))
    except codec.ObjectError as error:
        metrics.integrity_failures.labels("put", error.code.value).inc()
        metrics.warn_once("put damage", "a put sent a bad object: %s", error)
        return "rejected", str(error)
    remember(stage.layout)
    return await _store(holdings, key, offer.parent, header, data, may_go)


def _checked(data: bytearray, stage: Stage, offer: Offer) -> ObjectHeader:
    """The header of an object that is all it was offered as. Raises codec.ObjectError."""
    info = codec.verify(data)
    codec.check_header(info.header, stage.layout, chunk_hash=offer.hash, part=stage.part)
    if info.quality != offer.quality or info.header.quality != offer.quality:
        raise codec.ForeignObject(
            "the object has another quality than was offered, or is a truncated one",
            found=info.quality.label, whole=info.header.quality.label, offered=offer.quality.label,
        )  # fmt: skip
    return info.header


async def _store(
    holdings: Holdings, key: ObjectKey, parent: bytes, header: ObjectHeader, data: bytearray, may_go: MayGo
) -> Settled:
    queue = holdings.queue
    while True:
        if queue is not None:
            await queue.wait_for_room_in_queue()
            writing = queue.writing(key)
            if writing is not None:
                await asyncio.shield(writing)
                continue
        held = holdings.index.get(key)
        if held is not None and held.at_least(header.quality):
            return "have", ""  # another put was quicker
        in_host = holdings.room_in_host(key, len(data), may_go)
        # Memory may be full of what is not on disk yet: that becomes evictable one write at a time.
        worth_waiting = not in_host and queue is not None and len(data) <= holdings.host.capacity_bytes
        if not worth_waiting or queue is None or not await queue.wait_for_one():
            break
    written = holdings.place(key, parent, header, data, may_go, in_host=in_host)
    if in_host:
        return "stored", ""
    if written is None:
        return "rejected", "no room: what is held is leased or of this put, or too small a tier"
    if await asyncio.shield(written):
        return "stored", ""
    return "rejected", "the disk could not be written"


async def _persisted(holdings: Holdings, key: ObjectKey, may_go: MayGo) -> None:
    entry = holdings.index.get(key)
    if entry is not None and "disk" not in entry.tiers:
        written = holdings.persist(entry, may_go)
        if written is not None:
            await asyncio.shield(written)


def _is_durable(holdings: Holdings, key: ObjectKey) -> bool:
    entry = holdings.index.get(key)
    return entry is not None and "disk" in entry.tiers
