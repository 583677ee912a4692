"""The client against a node that fails deletes and stats, or at whose port something else is spoken."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc
import pytest
from hostile_calls import CHUNKS, HELD, OTHER, STATUSES, calling, logged, raised, timed
from hostile_server import Answer, Context, HostileServer, takes_all
from kv_strategies import bits

from kvstore_client import DeadlineExceeded, KvClientError, ProtocolViolation, RequestRefused, ServerFailed, Unavailable
from kvstore_client.errors import ERROR_OF_STATUS
from kvstore_proto.v1 import store_pb2 as pb


async def test_an_honest_server_of_this_kind_is_a_hit(caplog: pytest.LogCaptureFixture) -> None:
    """Or else the misses below would prove nothing."""
    with HostileServer(lookup=HELD.lookup, fetch=HELD.fetch, put=takes_all) as server:
        async with calling(server.address, strict=True) as caller:
            kv, tokens = await caller.namespace().get(HELD.tokens)
            stored = await caller.namespace().put(OTHER.tokens, OTHER.kv, quality="raw")
    assert tokens == len(HELD.tokens)
    assert bits(kv) == bits(HELD.kv)
    assert (stored.stored, stored.rejected) == (CHUNKS, 0)
    assert logged(caplog) == []


@pytest.mark.parametrize("status", STATUSES, ids=lambda status: status.name)
async def test_a_delete_that_fails(status: grpc.StatusCode, caplog: pytest.LogCaptureFixture) -> None:
    def delete(request: pb.DeleteRequest, context: Context) -> Answer:
        context.abort(status, "not\ntoday")
        raise AssertionError("abort returned")

    kind = ERROR_OF_STATUS[status]
    with HostileServer(delete=delete) as server:
        async with calling(server.address) as lenient, calling(server.address, strict=True) as strict:
            result, error = await asyncio.gather(
                timed(lenient.namespace().delete(HELD.tokens)), raised(strict.namespace().delete(HELD.tokens))
            )
    assert type(error) is kind
    assert (result.objects, result.bytes, len(result.reasons)) == (0, 0, 1)
    assert lenient.counted("failures", call="delete", reason=kind.code.value) == 1
    (line,) = logged(caplog)
    assert line.startswith(f"delete: {kind.code.value}: ")


async def test_garbage_for_delete_and_stat() -> None:
    garbage = b"\xff" * 100
    with HostileServer(delete=lambda _, __: garbage, stat=lambda _, __: garbage) as server:
        async with calling(server.address, strict=True) as caller:
            assert type(await raised(caller.namespace().delete(HELD.tokens))) is ProtocolViolation
            assert type(await raised(caller.client.stat())) is ProtocolViolation


async def test_a_stat_raises_also_where_the_client_is_not_strict() -> None:
    def stat(request: pb.StatRequest, context: Context) -> Answer:
        context.abort(grpc.StatusCode.INTERNAL, "not today")
        raise AssertionError("abort returned")

    with HostileServer(stat=stat) as server:
        async with calling(server.address) as caller:
            assert type(await raised(caller.client.stat())) is ServerFailed


async def test_a_server_of_something_else(caplog: pytest.LogCaptureFixture) -> None:
    """A port where gRPC is spoken, but not our service."""
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    async with calling(address) as lenient, calling(address, strict=True) as strict:
        assert (await timed(lenient.namespace().get(HELD.tokens)))[1] == 0
        assert type(await raised(strict.namespace().get(HELD.tokens))) is RequestRefused
    server.stop(None).wait()
    assert lenient.counted("misses", reason="refused") == 1


@pytest.mark.parametrize(
    ("spoken", "kinds"), [(b"HTTP/1.1 400 Bad Request\r\n\r\n", {Unavailable}), (b"", {DeadlineExceeded, Unavailable})]
)
async def test_a_port_where_something_else_or_nothing_is_spoken(spoken: bytes, kinds: set[type[KvClientError]]) -> None:
    handlers: list[asyncio.Task[Any]] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.append(task)
        try:
            while await reader.read(1 << 16):
                if spoken:
                    writer.write(spoken)
                    break
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with calling(address) as lenient, calling(address, strict=True) as strict:
            (_, tokens), error = await asyncio.gather(
                timed(lenient.namespace().get(HELD.tokens)), raised(strict.namespace().get(HELD.tokens))
            )
        await asyncio.gather(*handlers, return_exceptions=True)
    assert tokens == 0
    assert type(error) in kinds, error
