"""What a planned get tells the link's estimate of an object that did not come, by what its request ended by."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest

from kvstore_client.errors import DeadlineExceeded, KvClientError, ProtocolViolation, Unavailable
from kvstore_client.pace import Pace
from kvstore_client.planner.choose import Chunk
from kvstore_client.planner.controller import Controller, Task
from kvstore_client.planner.estimates import DecodeEstimates, PeerEstimates
from kvstore_client.planner.sizes import LayerSizes
from kvstore_client.transports.blob import Blob
from kvstore_codec import Quality

CHUNK_BYTES = 1_000_000
RECOMPUTE_S = 5.0


class Get:
    """Of one chunk from a peer that is known to bring it at once. `ending`: what is done with the request after the
    controller has found it late."""

    def __init__(self) -> None:
        self.peer, self.is_late = PeerEstimates(), asyncio.Event()
        began = asyncio.get_running_loop().time()
        for _ in range(4):
            self.peer.link.observe(1e8, 1.0, began)
        chunk = Chunk(0, 256, 1000, {Quality.LOW: CHUNK_BYTES})
        self.controller = Controller(
            Task([chunk], [RECOMPUTE_S, 0.0], 256, RECOMPUTE_S), self.peer, DecodeEstimates(1), began
        )
        self.pace = Pace(
            self.controller, self.peer, DecodeEstimates(1), LayerSizes(), lambda size: None,
            asyncio.get_running_loop().time,
        )  # fmt: skip
        self.before = self.rates()
        late = self.controller.late

        def noted(*arguments: float) -> bool:
            going_on = late(*arguments)  # type: ignore[arg-type]
            self.is_late.set()
            return going_on

        self.controller.late = noted  # type: ignore[method-assign, assignment]

    def rates(self) -> tuple[float, float]:
        now = self.pace.clock()
        return self.peer.link.expected(now), self.peer.link.careful(now)

    async def run(self, error: KvClientError | None) -> None:
        async def objects() -> AsyncGenerator[Blob, None]:
            while not self.is_late.is_set():
                self.pace.received(CHUNK_BYTES // 100)
                await asyncio.sleep(0.002)
            if error is None:
                await asyncio.Event().wait()
            else:
                raise error
            yield Blob(memoryview(b""))

        assert self.controller.step(self.pace.clock()) is not None
        async with contextlib.aclosing(self.pace.objects(objects())) as timed:
            async for _ in timed:
                raise AssertionError("nothing comes")


@pytest.mark.parametrize("error", [Unavailable("gone"), ProtocolViolation("garbage")])
async def test_a_fault_leaves_the_estimate_as_it_was(error: KvClientError) -> None:
    get = Get()
    with pytest.raises(type(error)):
        await get.run(error)
    assert get.rates() == pytest.approx(get.before)


async def test_a_get_that_is_called_off_leaves_the_estimate_as_it_was() -> None:
    get = Get()
    running = asyncio.create_task(get.run(None))
    await get.is_late.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert get.rates() == pytest.approx(get.before)


async def test_the_calls_deadline_is_a_measurement_of_what_came_until_then() -> None:
    get = Get()
    with pytest.raises(DeadlineExceeded):
        await get.run(DeadlineExceeded("too late"))
    assert get.rates()[1] < get.before[1]


async def test_a_request_that_is_made_again_is_timed_from_then_on() -> None:
    get = Get()

    async def objects() -> AsyncGenerator[Blob, None]:
        await get.is_late.wait()
        get.pace.begin()
        yield Blob(memoryview(bytes(CHUNK_BYTES)))

    assert get.controller.step(get.pace.clock()) is not None
    get.is_late.clear()
    asyncio.get_running_loop().call_later(0.15, get.is_late.set)
    async with contextlib.aclosing(get.pace.objects(objects())) as timed:
        assert [len(blob.data) async for blob in timed] == [CHUNK_BYTES]
    assert get.peer.link.careful(get.pace.clock()) > CHUNK_BYTES / 0.15
