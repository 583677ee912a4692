"""Lookups that a node answers with lies, garbage, failures or not: a miss, or the typed error, within the deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from typing import Any

import grpc
import kv_objects
import numpy as np
import pytest
from hostile_calls import CHUNK, CHUNKS, DEADLINE_S, HELD, LAYOUT, STATUSES, calling, logged, raised, timed, waits
from hostile_server import Answer, Context, HostileServer, Lookup, hang

import kvstore_codec as codec
from kvstore_client import AsyncNamespace, DeadlineExceeded, Hit, KvClientError, ProtocolViolation, PutResult
from kvstore_client.errors import ERROR_OF_STATUS
from kvstore_proto.v1 import store_pb2 as pb


def lies() -> Iterator[tuple[str, list[kv_objects.ChunkStatus]]]:
    raw_bytes = CHUNK * LAYOUT.bytes_per_token
    too_large = codec.object_bytes_max(raw_bytes) + 1
    honest = HELD.status(0)
    yield "more chunks than asked for", [*map(HELD.status, range(CHUNKS)), HELD.status(0)]
    yield "no tokens", [honest, HELD.status(1, tokens=0)]
    yield "a token less", [honest, HELD.status(1, tokens=CHUNK - 1)]
    yield "2**32 - 1 tokens", [honest, HELD.status(1, tokens=2**32 - 1)]
    yield "unknown quality", [honest, HELD.status(1, quality=5)]
    yield "unknown provenance", [honest, HELD.status(1, provenance=2**32 - 1)]
    yield "no bytes", [honest, HELD.status(1, stored_bytes=0)]
    yield "more bytes than an object has", [honest, HELD.status(1, stored_bytes=too_large)]
    yield "2**64 - 1 bytes", [honest, HELD.status(1, stored_bytes=2**64 - 1)]
    yield "an empty status", [kv_objects.ChunkStatus()]


def calls(namespace: AsyncNamespace) -> list[tuple[str, Awaitable[Any]]]:
    return [
        ("lookup", namespace.lookup(HELD.tokens)),
        ("get", namespace.get(HELD.tokens)),
        ("put", namespace.put(HELD.tokens, HELD.kv)),
    ]


async def look_up_both_ways(lookup: Lookup, kind: type[KvClientError], caplog: pytest.LogCaptureFixture) -> None:
    """Each call that starts with a lookup, of a client that is strict and of one that is not."""
    with HostileServer(lookup=lookup, fetch=HELD.fetch) as server:
        async with calling(server.address) as lenient, calling(server.address, strict=True) as strict:
            hit, (kv, tokens), put, *errors = await asyncio.gather(
                *(timed(call) for _, call in calls(lenient.namespace())),
                *(raised(call) for _, call in calls(strict.namespace())),
            )
    assert [type(error) for error in errors] == [kind] * 3, errors
    assert hit == Hit()
    assert (kv.shape[2], tokens) == (0, 0)
    assert put == PutResult(rejected=CHUNKS, reasons=put.reasons)
    assert len(put.reasons) == len(put.reasons[0].splitlines()) == 1
    assert server.calls.count("Fetch") == server.calls.count("Put") == 0
    reason = kind.code.value
    for call in ("lookup", "get", "put"):
        assert lenient.counted("failures", call=call, reason=reason) == 1
    assert lenient.counted("misses", reason=reason) == 2
    assert lenient.counted("rejected_chunks", reason=reason) == CHUNKS
    assert sorted(line.split(": ")[0] for line in logged(caplog)) == ["get", "lookup", "put"]


@pytest.mark.parametrize(("what", "chunks"), [pytest.param(*lie, id=lie[0]) for lie in lies()])
async def test_a_lookup_that_lies(
    what: str, chunks: list[kv_objects.ChunkStatus], caplog: pytest.LogCaptureFixture
) -> None:
    answer = kv_objects.answer_of(chunks)
    await look_up_both_ways(lambda request, context: answer, ProtocolViolation, caplog)


async def test_a_lookup_of_garbage(caplog: pytest.LogCaptureFixture) -> None:
    await look_up_both_ways(lambda request, context: b"\xff" * 100, ProtocolViolation, caplog)


@pytest.mark.slow
async def test_a_lookup_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    def lookup(request: pb.LookupRequest, context: Context) -> Answer:
        hang(context)
        return pb.LookupResponse()

    await look_up_both_ways(lookup, DeadlineExceeded, caplog)


@pytest.mark.parametrize("status", STATUSES, ids=lambda status: status.name)
async def test_a_lookup_that_fails(status: grpc.StatusCode, caplog: pytest.LogCaptureFixture) -> None:
    def lookup(request: pb.LookupRequest, context: Context) -> Answer:
        context.abort(status, "not\ntoday")
        raise AssertionError("abort returned")

    await look_up_both_ways(lookup, ERROR_OF_STATUS[status], caplog)


async def test_no_answer_of_an_unknown_tier_is_refused() -> None:
    """A later version may have tiers that this one does not know; they change nothing."""
    answer = kv_objects.answer_of([HELD.status(0, tier=99)])
    with HostileServer(lookup=lambda request, context: answer) as server:
        async with calling(server.address, strict=True) as caller:
            hit = await caller.namespace().lookup(HELD.tokens)
    assert [chunk.tier for chunk in hit.chunks] == ["unknown"]


@pytest.mark.slow
async def test_many_slow_lookups_of_one_prompt_share_its_deadline() -> None:
    """A prompt of more chunks than one lookup takes; every lookup alone is in time."""
    layout = kv_objects.small_layout("long", layers=1, head_dim=2)
    tokens = np.arange(4096 * 3 * layout.chunk_tokens)

    def lookup(request: pb.LookupRequest, context: Context) -> Answer:
        waits(context, DEADLINE_S * 0.7)
        one = kv_objects.ChunkStatus(tokens=layout.chunk_tokens, stored_bytes=500, tier=pb.TIER_HOST)
        return kv_objects.answer_of([one] * (len(request.chunk_hashes) // 32))

    with HostileServer(lookup=lookup) as server:
        async with calling(server.address, strict=True) as caller:
            error = await raised(caller.namespace(layout).lookup(tokens))
    assert type(error) is DeadlineExceeded
