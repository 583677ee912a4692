"""Fetch: objects come as one ordered stream and are decoded, each into its place, while the next one arrives.

Nothing that a node sends is trusted: lengths are bounded by the layout, pieces must come in order, and every object's
identity, position, quality and checksums are compared before its values count. The first object that does not pass ends
the prefix.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Executor, Future
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from typing import Any

import kvstore_codec as codec
from kvstore_client.coder import DeadlineCoder
from kvstore_client.connection import Node
from kvstore_client.deadline import Deadline
from kvstore_client.errors import (
    DeadlineExceeded,
    KvClientError,
    ObjectForeign,
    from_codec,
)  # fmt: skip
from kvstore_client.pace import Timing
from kvstore_client.planner.controller import Stop
from kvstore_client.results import ChunkHit
from kvstore_client.transports.blob import Blob
from kvstore_client.transports.transfer import Fetch
from kvstore_client.transports.wanted import Wanted
from kvstore_codec import CodecId, KVArray, Profile
from kvstore_proto.v1.framing import HASHES_MAX

DECODES_MAX = 4  # objects received and not yet decoded
#: The profile with an id, or the KvClientError that says why it cannot be had.
ProfileSource = Callable[[bytes], Coroutine[Any, Any, Profile]]
#: Takes a copy of an object that was good, with the profile that it was decoded with; in the decoding thread.
Keep = Callable[[ChunkHit, memoryview, "Profile | None"], None]


@dataclass
class Fetched:
    """How far a fetch came: intact chunks, and what ended it before the last one (None: nothing was wrong). `stopped`:
    why the planner left some to the engine."""

    chunks: int = 0
    error: KvClientError | None = None
    stopped: Stop | None = None


async def fetch(
    node: Node, wanted: Wanted, lease_ids: Sequence[bytes], into: KVArray, executor: Executor, deadline: Deadline,
    count_received: Callable[[int], None], profile_of: ProfileSource | None = None, timing: Timing | None = None,
    keep: Keep | None = None,
) -> Fetched:  # fmt: skip
    """Fetches and decodes `wanted.chunks` into `into`, which starts with the first of them. Never raises for what a
    node does or fails to do. When it returns, or is cancelled, nothing writes to `into` any more.

    `profile_of`: asked for the profile of an object that names one; without it no such object can be read. `timing`:
    sees when what comes; where it ends the fetch, that is no error. `keep`: sees what was decoded."""
    fetched = Fetched()
    decodes: list[Future[None]] = []
    running: list[Future[None]] = []
    confirms: list[Callable[[], Awaitable[None]]] = []
    coder = DeadlineCoder(deadline)
    async with AsyncExitStack() as fetches:
        try:
            begun_anew = (lambda: None) if timing is None else timing.begin
            objects = _objects(node, wanted, lease_ids, deadline, count_received, begun_anew, fetches, confirms)
            async with (
                aclosing(objects) as objects,
                aclosing(objects if timing is None else timing.objects(objects)) as timed,
            ):
                async for blob in timed:
                    chunk = wanted.chunks[len(decodes)]
                    first = chunk.first_token - wanted.chunks[0].first_token
                    place = codec.token_slice(into, first, first + chunk.tokens)
                    named = profile_named(wanted, chunk, blob.data)
                    profile = await profile_of(named) if named is not None and profile_of is not None else None
                    decodes.append(
                        executor.submit(decode_object, node, wanted, chunk, blob, place, coder, profile, timing, keep)
                    )
                    running.append(decodes[-1])
                    await wait_for_turn(running, deadline)
            await settle(decodes, deadline.remaining())
        except KvClientError as error:
            fetched.error = error
            await settle(decodes, deadline.remaining())  # what came whole before it counts
        finally:
            coder.stop()
            await call_off(decodes)
        try:
            for confirm in confirms:
                await confirm()
        except KvClientError as error:  # of what was read in place, nobody can say any more
            fetched.error = fetched.error or error
            return fetched
    for decode in decodes:
        if decode.cancelled():
            fetched.error = fetched.error or DeadlineExceeded("the call's deadline passed", seconds=deadline.seconds)
            break
        problem = decode.exception()
        if problem is not None:
            if not isinstance(problem, KvClientError):
                raise problem
            fetched.error = problem
            break
        fetched.chunks += 1
    return fetched


async def _objects(
    node: Node, wanted: Wanted, lease_ids: Sequence[bytes], deadline: Deadline,
    count_received: Callable[[int], None], begun_anew: Callable[[], None], fetches: AsyncExitStack,
    confirms: list[Callable[[], Awaitable[None]]],
) -> AsyncGenerator[Blob, None]:  # fmt: skip
    """Whole objects in the order of `wanted.chunks`; ends early where the node has no more. `fetches` closes what is
    open at the end, `confirms` are to be called when all of it has been decoded."""
    for number, first in enumerate(range(0, len(wanted.chunks), HASHES_MAX)):
        first_chunk = wanted.first_chunk or (wanted.chunks[0].hash if first else b"")
        part = replace(wanted, chunks=wanted.chunks[first : first + HASHES_MAX], first_chunk=first_chunk)
        lease_id = lease_ids[number] if number < len(lease_ids) else b""
        asked = Fetch(node, part, lease_id, deadline, count_received, begun_anew)
        fetches.push_async_callback(asked.aclose)
        confirms.append(asked.confirm)
        came = 0
        async with aclosing(asked.objects()) as objects:
            async for blob in objects:
                came += 1
                yield blob
        if came < len(part.chunks):
            return


def decode_object(
    node: Node, wanted: Wanted, chunk: ChunkHit, received: Blob, place: KVArray, coder: DeadlineCoder,
    profile: Profile | None, timing: Timing | None = None, keep: Keep | None = None,
) -> None:  # fmt: skip
    """Raises BadObject, DeadlineExceeded."""
    blob = received.data
    began = time.perf_counter()
    try:
        coder.check()
        header = codec.parse_header(blob)
        effective = max(header.quality_at(len(blob)), header.provenance)
        if (header.tokens, header.first_position) != (chunk.tokens, chunk.first_token):
            raise ObjectForeign("the object is of other tokens", node=node.address, first=header.first_position)
        if effective > wanted.min_quality:
            raise ObjectForeign("the object is of less quality than was declared", node=node.address, found=effective)
        codec.decode(
            blob, wanted.layout, quality=wanted.quality, out=place, chunk_hash=chunk.hash, part=wanted.part,
            profile=profile, coder=coder,
        )  # fmt: skip
        if timing is not None:
            timing.decoded(header, len(blob), time.perf_counter() - began)
        if keep is not None:
            keep(chunk, blob, profile)
    except codec.ObjectError as error:
        raise from_codec(error, node.address) from error
    finally:
        received.done()


def profile_named(wanted: Wanted, chunk: ChunkHit, blob: memoryview) -> bytes | None:
    """Id of the profile that an object is coded with. What else is wrong with its header, decoding says."""
    try:
        header = codec.parse_header(blob)
        codec.check_header(header, wanted.layout, chunk_hash=chunk.hash, part=wanted.part)
    except codec.ObjectError:
        return None
    return header.profile_id if header.codec is CodecId.PROFILE else None


async def wait_for_turn(running: list[Future[None]], deadline: Deadline) -> None:
    """Until few enough decodes run that the next object may be received; drops those that are done from `running`.
    Raises what a decode found."""
    while True:
        for decode in [decode for decode in running if decode.done()]:
            if (error := decode.exception()) is not None:
                raise error
            running.remove(decode)
        if deadline.remaining() <= 0:
            raise DeadlineExceeded("the call's deadline passed", seconds=deadline.seconds)
        if len(running) < DECODES_MAX:
            return
        await settle(running, deadline.remaining(), return_when=asyncio.FIRST_COMPLETED)


async def settle(decodes: Sequence[Future[Any]], timeout_s: float, return_when: str = asyncio.ALL_COMPLETED) -> None:
    """Until the decodes that run now are done (or the first of them), or the time is up."""
    running = [asyncio.wrap_future(decode) for decode in decodes if not decode.done()]
    if not running:
        return
    for future in running:
        future.add_done_callback(_seen)  # the caller asks the decode itself
    await asyncio.wait(running, timeout=timeout_s, return_when=return_when)


def _seen(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


async def call_off(decodes: Sequence[Future[Any]]) -> None:
    """Cancels the decodes that have not started and waits for the others, which stop soon."""
    for decode in decodes:
        decode.cancel()
    again: asyncio.CancelledError | None = None
    while not all(decode.done() for decode in decodes):
        try:
            await settle(decodes, timeout_s=1.0)
        except asyncio.CancelledError as error:  # a second one: still nothing may write to the caller's array
            again = error
    if again is not None:
        raise again
