"""Put: encode what a node lacks, offer it, send what it wants, commit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import kvstore_codec as codec
from kvstore_client.coder import DeadlineCoder
from kvstore_client.connection import Node
from kvstore_client.deadline import Deadline
from kvstore_client.errors import DeadlineExceeded, ProtocolViolation, one_line
from kvstore_client.fetching import call_off, settle
from kvstore_client.results import PutResult
from kvstore_client.transports.blob import Buffers
from kvstore_client.transports.transfer import Put
from kvstore_codec import ChunkRef, KVArray, KVLayout, Profile, Quality
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import OFFERED_OBJECTS_MAX

#: One put stream carries about so much KV: what is encoded at a time is held in memory on both sides.
RAW_BYTES_MAX = 256 << 20
_VERDICTS = {pb.VERDICT_SEND, pb.VERDICT_HAVE, pb.VERDICT_REFUSED}
_OUTCOMES = {pb.OUTCOME_STORED, pb.OUTCOME_HAVE, pb.OUTCOME_REJECTED}


@dataclass(frozen=True)
class Source:
    """The KV of a prompt from token `first_token` on, and how it is to be stored."""

    layout: KVLayout
    part: int
    kv: KVArray
    first_token: int
    quality: Quality
    provenance: Quality
    durable: bool
    retain: tuple[int, int] | None = None  # priority, seconds
    profile: Profile | None = None  # of lossy qualities
    first_chunk: bytes = b""  # hash of the prompt's first, by which nodes are chosen


@dataclass(frozen=True)
class Chunk:
    """`held_bytes`: what the node said it stores of this chunk already, good enough; 0: nothing."""

    ref: ChunkRef
    held_bytes: int = 0


@dataclass(frozen=True)
class Stored:
    """A node's answer for one chunk. `outcome`: "stored", "have" or "rejected"; `reason`: one line for the last."""

    ref: ChunkRef
    outcome: str
    reason: str
    durable: bool
    object_bytes: int


def batches(source: Source, chunks: Sequence[Chunk]) -> Iterator[Sequence[Chunk]]:
    """`chunks` in the order given, cut into what one put stream carries."""
    raw_bytes = source.layout.chunk_tokens * source.layout.part_layout(source.part).bytes_per_token
    size = max(1, min(OFFERED_OBJECTS_MAX, RAW_BYTES_MAX // max(1, raw_bytes)))
    return (chunks[first : first + size] for first in range(0, len(chunks), size))


async def put(
    node: Node, source: Source, chunks: Sequence[Chunk], executor: Executor, threads: int, deadline: Deadline,
    count_sent: Callable[[int], None], buffers: Buffers,
) -> list[Stored]:  # fmt: skip
    """One put stream; objects are made in `buffers`, by so many threads of `executor`. Raises the typed error of a
    failed call, ProtocolViolation, codec.ValuesError."""
    taken: list[npt.NDArray[np.uint8]] = []

    def allocate(size: int) -> memoryview:
        buffer, view = buffers.take(size)
        taken.append(buffer)
        return view

    blobs = await _encode(source, chunks, executor, threads, deadline, allocate)
    stored = await put_encoded(node, source, chunks, blobs, deadline, count_sent)
    # Not after a failure: a thread may still be sending from them.
    for buffer in taken:
        buffers.give_back(buffer)
    return stored


async def put_encoded(
    node: Node, source: Source, chunks: Sequence[Chunk], blobs: Sequence[bytes | memoryview | None], deadline: Deadline,
    count_sent: Callable[[int], None],
) -> list[Stored]:  # fmt: skip
    """The same with one object a chunk, None for what the node holds; of `source`, the KV is not looked at."""
    async with aclosing(Put(node, deadline, count_sent)) as sending:
        verdicts = (await sending.offer(_offer(source, chunks, blobs))).verdicts
        _check(node, len(verdicts) == len(chunks) and _VERDICTS.issuperset(verdicts))
        await sending.send(
            [
                (index, blob)
                for index, (blob, verdict) in enumerate(zip(blobs, verdicts, strict=True))
                if verdict == pb.VERDICT_SEND and blob is not None
            ]
        )
        results = (await sending.commit()).results
        _check(node, len(results) == len(chunks) and _OUTCOMES.issuperset(result.outcome for result in results))
    return [
        Stored(
            chunk.ref, pb.Outcome.Name(result.outcome).removeprefix("OUTCOME_").lower(), one_line(result.reason),
            result.durable, len(blob) if blob is not None else chunk.held_bytes,
        )
        for chunk, blob, result in zip(chunks, blobs, results, strict=True)
    ]  # fmt: skip


async def _encode(
    source: Source, chunks: Sequence[Chunk], executor: Executor, threads: int, deadline: Deadline,
    allocate: Callable[[int], memoryview],
) -> list[memoryview | None]:  # fmt: skip
    """One object a chunk; None for what the node holds. Raises DeadlineExceeded, with no encoder left running."""
    coder = DeadlineCoder(deadline)
    blobs: list[memoryview | None] = [None] * len(chunks)
    lacking = [(at, chunk.ref) for at, chunk in enumerate(chunks) if not chunk.held_bytes]
    work = iter(lacking)

    def encode() -> None:
        for at, ref in work:  # each thread takes the next one: a task for each would cost more than a small object
            coder.check()
            first = ref.first_token - source.first_token
            blobs[at] = codec.encode(
                codec.token_slice(source.kv, first, first + ref.tokens), source.layout, quality=source.quality,
                first_position=ref.first_token, chunk_hash=ref.hash, part=source.part, provenance=source.provenance,
                profile=source.profile, coder=coder, allocate=allocate,
            )  # fmt: skip

    encoders = [executor.submit(encode) for _ in range(min(threads, len(lacking)))]
    try:
        await settle(encoders, deadline.remaining())
    finally:
        coder.stop()  # where the caller has gone away
        await call_off(encoders)  # those that had no turn, behind other calls'
    for encoder in encoders:
        if not encoder.cancelled():
            encoder.result()
    if any(blobs[at] is None for at, _ in lacking):
        raise DeadlineExceeded("the call's deadline passed while coding", seconds=deadline.seconds)
    return blobs


def result_of(before: int | None, stored: Sequence[Stored]) -> PutResult:
    """`before`: tokens that the node holds before the first of `stored`; None where it lacks some."""
    outcomes = [each.outcome for each in stored]
    kept = next((index for index, outcome in enumerate(outcomes) if outcome == "rejected"), len(outcomes))
    return PutResult(
        stored=outcomes.count("stored"),
        have=outcomes.count("have"),
        rejected=outcomes.count("rejected"),
        tokens=0 if before is None else before + sum(each.ref.tokens for each in stored[:kept]),
        bytes=sum(each.object_bytes for each in stored if each.outcome == "stored"),
        durable=bool(stored) and all(each.durable for each in stored),
        reasons=tuple(dict.fromkeys(each.reason for each in stored if each.outcome == "rejected")),
    )


def _offer(source: Source, chunks: Sequence[Chunk], blobs: Sequence[bytes | memoryview | None]) -> pb.PutOffer:
    return pb.PutOffer(
        namespace_id=source.layout.namespace_id,
        layout=source.layout.canonical_bytes,
        part=source.part,
        first_chunk_hash=source.first_chunk,
        durability=pb.DURABILITY_DISK if source.durable else pb.DURABILITY_MEMORY,
        retention=None if source.retain is None else pb.Retention(priority=source.retain[0], seconds=source.retain[1]),
        objects=[
            pb.ObjectOffer(
                chunk_hash=chunk.ref.hash,
                parent_hash=chunk.ref.parent,
                object_bytes=len(blob) if blob is not None else chunk.held_bytes,
                quality=source.quality,
            )
            for chunk, blob in zip(chunks, blobs, strict=True)
        ],
    )


def _check(node: Node, sane: bool) -> None:
    if not sane:
        raise ProtocolViolation("a put was answered out of place", node=node.address)
