"""How fast objects come and are decoded: what a fetch tells the planner, and what the planner tells a fetch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator

from kvstore_client.errors import DeadlineExceeded
from kvstore_client.planner.controller import Controller
from kvstore_client.planner.estimates import DecodeEstimates, PeerEstimates
from kvstore_client.planner.refine import Refine
from kvstore_client.planner.sizes import LayerSizes
from kvstore_client.transports.blob import Blob
from kvstore_codec import ObjectHeader, Quality
from kvstore_codec.layout import DTYPE_BYTES

#: Longer than this share of the time between two objects in our own hands: the link may be faster than it looks.
_HELD_UP_SHARE = 0.5


class Timing:
    """Of one fetch from one node, whatever asked for it; `clock` as the estimates have it."""

    def __init__(
        self, peer: PeerEstimates, decode: DecodeEstimates, sizes: LayerSizes, count_received: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.clock = clock
        self._peer, self._decode, self._sizes, self._count_received = peer, decode, sizes, count_received
        self._object_bytes = 0  # received since the last whole object
        self._last = 0.0  # when that came, or was asked for
        self._heard = 0.0  # when its last bytes came since
        self._first = True  # of its request

    def received(self, size_bytes: int) -> None:
        self._count_received(size_bytes)
        self._object_bytes += size_bytes
        self._heard = self.clock()

    def begin(self) -> None:
        """A request goes out now; also one that is made again, over another connection."""
        self._last, self._first, self._object_bytes = self.clock(), True, 0

    def answered(self, seconds: float) -> None:
        """A node has told what it holds. Called in any thread, as is `came`."""
        self._peer.latency.observe(seconds)

    def came(self, size_bytes: int, seconds: float, waited_s: float, now: float) -> None:
        """An object took `seconds` to come, in which it waited for us for so long."""
        self._peer.link.observe(size_bytes, seconds, now, at_least=waited_s > _HELD_UP_SHARE * seconds)

    def decoded(self, header: ObjectHeader, size_bytes: int, seconds: float) -> None:
        """One thread has decoded an object of so many bytes. Called in that thread."""
        elements = header.raw_bytes // DTYPE_BYTES[header.dtype]
        self._decode.observe(header.quality_at(size_bytes), elements, seconds, self.clock())
        self._sizes.learn(header)

    def copied(self, elements: int, seconds: float) -> None:
        """As `decoded`, of raw objects of so many elements together."""
        self._decode.observe(Quality.RAW, elements, seconds, self.clock())

    async def objects(self, objects: AsyncGenerator[Blob, None]) -> AsyncGenerator[Blob, None]:
        """`objects`, timed; ends earlier where this fetch is not to go on."""
        self.begin()
        going_on = True
        while going_on:
            asked = self.clock()
            blob = await self._next(objects)
            if blob is None:
                return
            now = self.clock()
            seconds = self._seconds(now)
            held_up = not self._first and asked - self._last > _HELD_UP_SHARE * seconds
            self._last, self._first, self._object_bytes = now, False, 0
            going_on = self._arrived(len(blob.data), seconds, now, held_up)
            yield blob

    def _seconds(self, now: float) -> float:
        """How long the object on its way has been coming."""
        seconds = now - self._last
        if self._first:  # the request travelled meanwhile; but a latency that is an estimate never explains all of it
            return max(seconds - self._peer.latency.expected, seconds / 2)
        return seconds

    def _coming(self) -> tuple[int, float, float, float]:
        """Of the object on its way: the bytes that have come, in how many seconds, the time, and how long ago the last
        of them came."""
        now = self.clock()
        seconds = self._seconds(now)
        return self._object_bytes, seconds, now, min(seconds, now - max(self._heard, self._last))

    async def _next(self, objects: AsyncGenerator[Blob, None]) -> Blob | None:
        return await anext(objects, None)

    def _arrived(self, size_bytes: int, seconds: float, now: float, held_up: bool) -> bool:
        self._peer.link.observe(size_bytes, seconds, now, at_least=held_up)
        return True


class Pace(Timing):
    """Of a get that follows the planner: a fetch ends where the controller wants something else."""

    def __init__(
        self, controller: Controller, peer: PeerEstimates, decode: DecodeEstimates, sizes: LayerSizes,
        count_received: Callable[[int], None], clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        super().__init__(peer, decode, sizes, count_received, clock)
        self._controller = controller

    async def _next(self, objects: AsyncGenerator[Blob, None]) -> Blob | None:
        """None also where the object is not worth waiting for: what is left of it never comes."""
        coming = asyncio.ensure_future(anext(objects, None))
        try:
            while True:
                await asyncio.wait([coming], timeout=max(0.0, self._controller.give_up_at - self.clock()))
                if coming.done():
                    return coming.result()
                if self.clock() >= self._controller.give_up_at and not self._controller.late(*self._coming()):
                    return None
        except DeadlineExceeded:
            self._controller.overdue(*self._coming())
            raise
        except BaseException:  # a fault; or the call was cancelled
            self._controller.broken()
            raise
        finally:
            if not coming.done():
                coming.cancel()
                await asyncio.wait([coming])

    def _arrived(self, size_bytes: int, seconds: float, now: float, held_up: bool) -> bool:
        return self._controller.arrived(size_bytes, seconds, now, held_up=held_up)


class RefinePace(Timing):
    """Of what a planned get refines: it ends when what comes cannot be decoded in time any more. `indices`: of the
    chunks that come, in order."""

    def __init__(
        self, controller: Controller, refine: Refine, indices: Iterator[int], peer: PeerEstimates,
        decode: DecodeEstimates, sizes: LayerSizes, count_received: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        super().__init__(peer, decode, sizes, count_received, clock)
        self._controller, self._refine, self._indices = controller, refine, indices

    @property
    def left_s(self) -> float:
        return max(0.0, self._controller.began + self._refine.until_s - self.clock())

    async def _next(self, objects: AsyncGenerator[Blob, None]) -> Blob | None:
        coming = asyncio.ensure_future(anext(objects, None))
        try:
            await asyncio.wait([coming], timeout=self.left_s)
            return coming.result() if coming.done() else None
        finally:
            if not coming.done():
                coming.cancel()
                await asyncio.wait([coming])

    def _arrived(self, size_bytes: int, seconds: float, now: float, held_up: bool) -> bool:
        self._controller.refined(next(self._indices), self._refine.quality, size_bytes, seconds, now, held_up=held_up)
        return True
