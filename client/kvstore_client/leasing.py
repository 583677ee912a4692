"""Leases of a lookup: renewed by heartbeat for as long as their holder reads, and given back when it has read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from kvstore_client.connection import Node, failures, timeout_s, understood
from kvstore_client.deadline import Deadline
from kvstore_client.errors import KvClientError
from kvstore_client.results import Lease
from kvstore_client.session import Session
from kvstore_proto.v1 import store_pb2 as pb

HEARTBEATS = 3  # in the time that a lease runs, so that one may get lost
RELEASE_S_MAX = 1.0  # of letting go of a lease, which runs out by itself, where nothing else bounds it


async def renew(session: Session, lease: Lease, lease_ms: int, deadline: Deadline) -> bool:
    """Whether the node still holds all of it, from now on for `lease_ms`. Raises the typed error of a failed call."""
    node = session.connections.node(lease.node)
    answers = [await _renew(node, lease_id, lease_ms, deadline) for lease_id in lease.ids]
    return all(answers)


async def _renew(node: Node, lease_id: bytes, lease_ms: int, deadline: Deadline) -> bool:
    request = pb.RenewRequest(lease_id=lease_id, lease_ms=lease_ms)
    async with failures(node):
        answer = understood(node, await node.stub.Renew(request, timeout=timeout_s(deadline)))
    held: bool = answer.lease_ms > 0
    return held


@asynccontextmanager
async def kept_alive(session: Session, lease: Lease | None, deadline_s: float) -> AsyncIterator[None]:
    """Renews a lease while inside and lets go of it at the end, which takes `deadline_s` at most. A heartbeat that
    fails is counted and tried again: what is read without a lease is read all the same, or is a miss."""
    if lease is None:
        yield
        return
    beating = asyncio.create_task(_beat(session, lease))
    try:
        yield
    finally:
        beating.cancel()
        await asyncio.wait([beating])
        with suppress(KvClientError):  # it runs out by itself
            await _counted(session, lease, 0, deadline_s)


async def _beat(session: Session, lease: Lease) -> None:
    held, beat_s = True, lease.duration_ms / 1000 / HEARTBEATS
    while held:
        await asyncio.sleep(beat_s)
        with suppress(KvClientError):
            held = await _counted(session, lease, lease.duration_ms, beat_s)


async def _counted(session: Session, lease: Lease, lease_ms: int, deadline_s: float) -> bool:
    try:
        return await renew(session, lease, lease_ms, Deadline(deadline_s))
    except KvClientError as error:
        session.metrics.failures.labels("renew", error.code.value).inc()
        session.warn("renew", error.code, str(error))
        raise
