"""Objects on their way from upstream: each is fetched once, however many wait for it.

A fetch is a task of its own, of a few objects: a reader that goes away does not end what others wait for, and what it
brings is kept here even where nobody waits any more.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import kvstore_codec as codec
from kvstore.engine.outside import Chain, FoundObject, Keep
from kvstore.index.entry import Described, ObjectKey
from kvstore.metrics import NodeMetrics
from kvstore_client.errors import KvClientError
from kvstore_codec import Quality

BATCH_OBJECTS = 16
BATCH_BYTES = 64 << 20  # that one fetch may hold; what is left of it is asked for again
VERIFY_THREADS = 2

#: Objects of a chain as they were sent, up to the first that is not there. Raises KvClientError, counted.
Source = Callable[[Chain, Quality], AsyncGenerator[memoryview, None]]
Coming = asyncio.Future[FoundObject | None]  # None: a miss; cancelled: it is not known, ask again


class Reads:
    def __init__(self, source: Source, metrics: NodeMetrics) -> None:
        self._source, self._metrics = source, metrics
        self._coming: dict[tuple[ObjectKey, Quality], Coming] = {}
        self._fetches: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(VERIFY_THREADS, "kvstore-upstream")

    async def read(self, chain: Chain, quality: Quality, keep: Keep) -> AsyncGenerator[FoundObject, None]:
        """See Place.read."""
        at = 0
        while at < len(chain):
            for coming in self._next(chain.after(at), quality, keep):
                await asyncio.wait([coming])  # not by itself: a reader that is cancelled would cancel it for all
                if coming.cancelled():
                    break
                found = coming.result()
                if found is None:
                    return
                at += 1
                self._metrics.count_read("upstream", found.described.quality, len(found.data))
                yield found

    def forget(self, doomed: Callable[[ObjectKey], bool]) -> None:
        """Whoever reads them from now on asks anew."""
        for each in [each for each in self._coming if doomed(each[0])]:
            del self._coming[each]

    async def aclose(self) -> None:
        fetches = list(self._fetches)
        for fetch in fetches:
            fetch.cancel()
        if fetches:
            await asyncio.wait(fetches)
        self._threads.shutdown()

    def _next(self, chain: Chain, quality: Quality, keep: Keep) -> list[Coming]:
        """The first objects of a chain: those that are under way already, or a fetch of those that are not."""
        coming = [self._coming.get((chain.key(at), quality)) for at in range(min(len(chain), BATCH_OBJECTS))]
        joined = [each for each in itertools.takewhile(lambda each: each is not None, coming) if each is not None]
        if joined:
            self._metrics.upstream_coalesced.labels("fetch").inc(len(joined))
            return joined
        absent = len(list(itertools.takewhile(lambda each: each is None, coming)))
        fresh: list[Coming] = [asyncio.get_running_loop().create_future() for _ in range(absent)]
        asked = chain.part_of(0, absent)
        self._coming.update({(asked.key(at), quality): future for at, future in enumerate(fresh)})
        fetch = asyncio.get_running_loop().create_task(self._fetch(asked, quality, fresh, keep))
        self._fetches.add(fetch)
        fetch.add_done_callback(self._fetches.discard)
        return fresh

    async def _fetch(self, chain: Chain, quality: Quality, coming: Sequence[Coming], keep: Keep) -> None:
        received = at = 0
        try:
            async with aclosing(self._source(chain, quality)) as objects:
                async for data in objects:
                    found = await self._verified(chain, at, quality, data)
                    if found is None:
                        break
                    keep(chain.key(at), found)
                    coming[at].set_result(found)
                    received, at = received + len(data), at + 1
                    if received >= BATCH_BYTES or at == len(coming):
                        return
            coming[at].set_result(None)  # those behind it are asked for by whoever still wants them
        except KvClientError:  # counted by the source
            coming[at].set_result(None)
        finally:
            for index, future in enumerate(coming):
                future.cancel()  # nothing to one that is done
                if self._coming.get((chain.key(index), quality)) is future:
                    del self._coming[chain.key(index), quality]

    async def _verified(self, chain: Chain, at: int, quality: Quality, data: memoryview) -> FoundObject | None:
        key, parent = chain.key(at), chain.hashes[at - 1] if at else chain.before

        def verified() -> FoundObject:
            info = codec.verify(data)
            if ObjectKey.of(info.header) != key:
                raise codec.ForeignObject("another object was sent", found=info.header.chunk_hash.hex()[:16])
            described = _held(Described.of(info.header, parent), len(data))
            # At raw all that there is was asked for. A prefix is not kept: who reads it at a better quality wants more.
            return FoundObject(
                described, data, quality == Quality.RAW or described.length == info.header.layer_bytes[-1]
            )

        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, verified)
        except codec.ObjectError as error:
            self._metrics.integrity_failures.labels("upstream", error.code.value).inc()
            self._metrics.warn_once("upstream damage", "upstream: chunk %s: %s", key.chunk_hash.hex(), error)
            return None


def _held(described: Described, length: int) -> Described:
    """Of the first `length` bytes of what `described` is of: a node may hold fewer quality layers than were coded."""
    layers = described.layer_bytes.index(length) + 1
    return Described(
        described.parent, described.first_position, described.tokens, described.quality_of(layers),
        described.provenance, described.layer_bytes[:layers],
    )  # fmt: skip
