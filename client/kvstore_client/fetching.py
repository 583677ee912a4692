"""Fetch: objects come as one ordered stream and are decoded, each into its place, while the next one arrives.

Nothing that a node sends is trusted: lengths are bounded by what its lookup declared (itself bounded by the layout),
pieces must come in order, and every object's identity, position, quality and checksums are compared before its values
count. The first object that does not pass ends the prefix.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import aclosing
from dataclasses import dataclass, replace

import kvstore_codec as codec
from kvstore_client.coder import DeadlineCoder
from kvstore_client.connection import Node, failures, understood
from kvstore_client.deadline import Deadline
from kvstore_client.errors import (
    DeadlineExceeded,
    KvClientError,
    ObjectForeign,
    ProtocolViolation,
    from_codec,
)  # fmt: skip
from kvstore_client.results import ChunkHit
from kvstore_codec import CodecId, KVArray, KVLayout, Profile, Quality
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import DATA_BYTES_MAX, HASHES_MAX, Framed

DECODES_MAX = 4  # objects received and not yet decoded
#: The profile with an id, or the KvClientError that says why it cannot be had.
ProfileSource = Callable[[bytes], Awaitable[Profile]]


@dataclass(frozen=True)
class Wanted:
    """What a fetch asks for: `chunks` of a prompt at `quality`, none of an effective quality under `min_quality`.
    `first_chunk`: hash of the prompt's first chunk, where it is not among them."""

    layout: KVLayout
    part: int
    chunks: Sequence[ChunkHit]
    quality: Quality
    min_quality: Quality
    first_chunk: bytes = b""


@dataclass
class Fetched:
    """How far a fetch came: intact chunks, and what ended it before the last one (None: nothing was wrong)."""

    chunks: int = 0
    error: KvClientError | None = None


async def fetch(
    node: Node, wanted: Wanted, lease_ids: Sequence[bytes], into: KVArray, executor: Executor, deadline: Deadline,
    count_received: Callable[[int], None], profile_of: ProfileSource | None = None,
) -> Fetched:  # fmt: skip
    """Fetches and decodes `wanted.chunks` into `into`, which starts with the first of them. Never raises for what a
    node does or fails to do. When it returns, or is cancelled, nothing writes to `into` any more.

    `profile_of`: asked for the profile of an object that names one; without it no such object can be read."""
    fetched = Fetched()
    decodes: list[Future[None]] = []
    running: list[Future[None]] = []
    coder = DeadlineCoder(deadline)
    try:
        async with aclosing(_objects(node, wanted, lease_ids, deadline, count_received)) as objects:
            async for blob in objects:
                chunk = wanted.chunks[len(decodes)]
                first = chunk.first_token - wanted.chunks[0].first_token
                place = codec.token_slice(into, first, first + chunk.tokens)
                named = _profile_named(wanted, chunk, blob)
                profile = await profile_of(named) if named is not None and profile_of is not None else None
                decodes.append(executor.submit(_decode, node, wanted, chunk, blob, place, coder, profile))
                running.append(decodes[-1])
                await _wait_for_turn(running, deadline)
        await _wait(decodes, deadline.remaining())
    except KvClientError as error:
        fetched.error = error
        await _wait(decodes, deadline.remaining())  # what came whole before it counts
    finally:
        coder.stop()
        await _call_off(decodes)
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
    node: Node, wanted: Wanted, lease_ids: Sequence[bytes], deadline: Deadline, count_received: Callable[[int], None]
) -> AsyncGenerator[memoryview, None]:
    """Whole objects in the order of `wanted.chunks`; ends early where the node has no more."""
    for number, first in enumerate(range(0, len(wanted.chunks), HASHES_MAX)):
        first_chunk = wanted.first_chunk or (wanted.chunks[0].hash if first else b"")
        part = replace(wanted, chunks=wanted.chunks[first : first + HASHES_MAX], first_chunk=first_chunk)
        lease_id = lease_ids[number] if number < len(lease_ids) else b""
        came = 0
        async with aclosing(_stream(node, part, lease_id, deadline, count_received)) as objects:
            async for blob in objects:
                came += 1
                yield blob
        if came < len(part.chunks):
            return


async def _stream(
    node: Node, wanted: Wanted, lease_id: bytes, deadline: Deadline, count_received: Callable[[int], None]
) -> AsyncGenerator[memoryview, None]:
    request = pb.FetchRequest(
        namespace_id=wanted.layout.namespace_id, chunk_hashes=b"".join(chunk.hash for chunk in wanted.chunks),
        part=wanted.part, quality=wanted.quality, lease_id=lease_id, first_chunk_hash=wanted.first_chunk,
    )  # fmt: skip
    call = None
    try:
        index, buffer, received = 0, bytearray(), 0
        async with failures(node):
            call = node.stub.Fetch(request, timeout=deadline.remaining())
            async for message in call:
                received += _check_piece(node, wanted, understood(node, message), index, received, len(buffer))
                count_received(len(message.data))
                if not message.head.offset and len(message.data) == message.head.object_bytes:
                    yield memoryview(message.data)  # in one piece: not even copied
                else:
                    if not message.head.offset:
                        buffer = bytearray(message.head.object_bytes)
                    buffer[message.head.offset : received] = message.data
                    if received < len(buffer):
                        continue
                    yield memoryview(buffer)
                index, buffer, received = index + 1, bytearray(), 0
        if received:
            raise ProtocolViolation("a fetch ended inside an object", node=node.address)
    finally:
        if call is not None:
            call.cancel()


def _check_piece(
    node: Node, wanted: Wanted, message: Framed[pb.FetchResponse], index: int, received: int, object_bytes: int
) -> int:
    """Length of a piece that continues object `index` after `received` bytes. Raises ProtocolViolation."""
    head, size = message.head, len(message.data)
    if not received:
        object_bytes = head.object_bytes
    sane = (
        index < len(wanted.chunks)
        and head.chunk_index == index
        and head.offset == received
        and 0 < size <= DATA_BYTES_MAX
        and object_bytes <= wanted.chunks[index].stored_bytes
        and received + size <= object_bytes
    )
    if not sane:
        raise ProtocolViolation(
            "a fetch sent a piece out of place", node=node.address, chunk=head.chunk_index, expected=index,
            offset=head.offset, received=received, bytes=size, object_bytes=object_bytes,
        )  # fmt: skip
    return size


def _decode(
    node: Node, wanted: Wanted, chunk: ChunkHit, blob: memoryview, place: KVArray, coder: DeadlineCoder,
    profile: Profile | None,
) -> None:  # fmt: skip
    """Raises BadObject, DeadlineExceeded."""
    coder.check()
    try:
        header = codec.parse_header(blob)
        effective = max(header.quality_at(len(blob)), header.provenance)
        if (header.tokens, header.first_position) != (chunk.tokens, chunk.first_token):
            raise ObjectForeign("the object is of other tokens", node=node.address, first=header.first_position)
        if effective > wanted.min_quality:
            raise ObjectForeign("the object is of less quality than was declared", node=node.address, found=effective)
        codec.decode(
            blob, wanted.layout, out=place, chunk_hash=chunk.hash, part=wanted.part, profile=profile, coder=coder
        )  # fmt: skip
    except codec.ObjectError as error:
        raise from_codec(error, node.address) from error


def _profile_named(wanted: Wanted, chunk: ChunkHit, blob: memoryview) -> bytes | None:
    """Id of the profile that an object is coded with. What else is wrong with its header, decoding says."""
    try:
        header = codec.parse_header(blob)
        codec.check_header(header, wanted.layout, chunk_hash=chunk.hash, part=wanted.part)
    except codec.ObjectError:
        return None
    return header.profile_id if header.codec is CodecId.PROFILE else None


async def _wait_for_turn(running: list[Future[None]], deadline: Deadline) -> None:
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
        await _wait(running, deadline.remaining(), return_when=asyncio.FIRST_COMPLETED)


async def _wait(decodes: Sequence[Future[None]], timeout_s: float, return_when: str = asyncio.ALL_COMPLETED) -> None:
    """Until the decodes that run now are done (or the first of them), or the time is up."""
    running = [asyncio.wrap_future(decode) for decode in decodes if not decode.done()]
    if not running:
        return
    for future in running:
        future.add_done_callback(_seen)  # the caller asks the decode itself
    await asyncio.wait(running, timeout=timeout_s, return_when=return_when)


def _seen(future: asyncio.Future[None]) -> None:
    if not future.cancelled():
        future.exception()


async def _call_off(decodes: Sequence[Future[None]]) -> None:
    """Cancels the decodes that have not started and waits for the others, which stop soon."""
    for decode in decodes:
        decode.cancel()
    again: asyncio.CancelledError | None = None
    while not all(decode.done() for decode in decodes):
        try:
            await _wait(decodes, timeout_s=1.0)
        except asyncio.CancelledError as error:  # a second one: still nothing may write to the caller's array
            again = error
    if again is not None:
        raise again
