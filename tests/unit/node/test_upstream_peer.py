"""When a node upstream that sends objects is given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from kvstore.engine.upstream_peer import _Arrivals
from kvstore_client.connection import Connections, Node
from kvstore_client.errors import DeadlineExceeded
from kvstore_client.transports.blob import Blob

PATIENCE_S = 0.2


@pytest.fixture
async def node() -> AsyncGenerator[Node, None]:
    connections = Connections(["127.0.0.1:1"])
    yield connections.node("127.0.0.1:1")
    await connections.aclose()


async def test_an_object_may_take_any_time_while_some_of_it_comes(node: Node) -> None:
    came = _Arrivals(PATIENCE_S)

    async def blobs() -> AsyncGenerator[Blob, None]:
        for _ in range(8):
            await asyncio.sleep(PATIENCE_S / 2)
            came.count(1)
        yield Blob(memoryview(b"whole"))

    coming = blobs()
    found = await came.next(coming, node)
    assert found is not None
    assert bytes(found.data) == b"whole"
    assert await came.next(coming, node) is None


async def test_silence_ends_it_and_what_sends_is_told(node: Node) -> None:
    came, ended = _Arrivals(PATIENCE_S), asyncio.Event()

    async def blobs() -> AsyncGenerator[Blob, None]:
        try:
            came.count(1)
            await asyncio.sleep(60)
            yield Blob(memoryview(b""))
        finally:
            ended.set()

    with pytest.raises(DeadlineExceeded, match="no progress"):
        await came.next(blobs(), node)
    assert ended.is_set()
