"""A get that comes back with coarse values at once: the rest follows, once, and is written when it is asked to be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hostile_server import Answer, Context, Held, HostileServer, hang, pieces
from kv_objects import answer_of, chunks, fetch, put, small_layout
from kv_strategies import bits
from node_process import NodeProcess
from polling import wait_until
from prometheus_client import CollectorRegistry
from prompts import Prompt, layout, prompt, same

import kvstore_codec as codec
from kvstore_client import AsyncClient, Client, InvalidArgument, ObjectDamaged, Quality
from kvstore_client.transports.bulk_path import Transport
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import CHANNEL_OPTIONS, FramedStoreStub

CHUNK = 16
DEADLINE_S = 30.0  # of what is not about time
Fetch = Callable[[pb.FetchRequest, Context], Iterator[Answer]]


@pytest.fixture
def mine(request: pytest.FixtureRequest) -> Prompt:
    return prompt(layout(request.node.name), 4 * CHUNK)


def received(registry: CollectorRegistry) -> float:
    return registry.get_sample_value("kvstore_client_stream_bytes_total", {"direction": "in"}) or 0.0


def at(mine: Prompt, quality: str) -> Any:
    """What a get reads of the prompt stored `high`, at another quality."""
    out = codec.empty(mine.layout, len(mine.tokens))
    for index, ref in enumerate(mine.refs):
        place = codec.token_slice(out, ref.first_token, ref.first_token + ref.tokens)
        codec.decode(mine.blob(index, "high"), mine.layout, quality=quality, out=place)
    return out


@pytest.mark.parametrize("transport", ["grpc", "tcp", "unix", "shm"])
def test_coarse_values_first_and_only_the_rest_behind_them(
    shared: NodeProcess, registry: CollectorRegistry, transport: Transport
) -> None:
    mine = prompt(layout(f"refined over {transport}", wide=transport == "grpc"), 4 * CHUNK)
    with Client(shared.address, strict=True, deadline=DEADLINE_S, registry=registry, transport=transport) as client:
        cache = client.namespace(mine.layout)
        stored = cache.put(mine.tokens, mine.kv, quality="high")
        restored = cache.get(mine.tokens, refine=True)
        kv, n = restored
        assert (n, restored.n, restored.kv is kv) == (64, 64, True)
        assert same(kv, at(mine, "low"))
        refinement = restored.refinement
        assert refinement.wait(DEADLINE_S)
        assert (refinement.done, refinement.tokens, refinement.reason) == (True, 64, "")
        assert received(registry) == stored.bytes, "nothing travelled twice"
        assert same(kv, at(mine, "low")), "nothing is written behind the caller's back"
        better, better_n = refinement.apply()
        assert (better_n, np.shares_memory(better, kv)) == (64, True)
        assert same(kv, at(mine, "high"))


def test_better_values_into_another_array(client: Client, mine: Prompt) -> None:
    cache = client.namespace(mine.layout)
    cache.put(mine.tokens, mine.kv, quality="high")
    room = torch.zeros(mine.kv.shape, dtype=torch.bfloat16)
    kv, refinement = (restored := cache.get(mine.tokens, refine=True)).kv, restored.refinement
    assert refinement.wait(DEADLINE_S)
    better, n = refinement.apply(room)
    assert isinstance(better, torch.Tensor)
    assert (n, better.data_ptr()) == (64, room.data_ptr())
    assert room.view(torch.int16).numpy().tobytes() == at(mine, "high").tobytes()
    assert same(kv, at(mine, "low"))
    small = codec.empty(mine.layout, 2 * CHUNK + 3)
    assert refinement.apply(small)[1] == 2 * CHUNK
    assert same(small[:, :, : 2 * CHUNK], at(mine, "high")[:, :, : 2 * CHUNK])


@pytest.mark.parametrize(("floor", "best"), [("medium", None), ("low", "medium"), ("high", None)])
def test_min_quality_is_what_comes_first_and_quality_what_comes_in_the_end(
    client: Client, mine: Prompt, floor: str, best: str | None
) -> None:
    cache = client.namespace(mine.layout)
    cache.put(mine.tokens, mine.kv, quality="high")
    restored = cache.get(mine.tokens, refine=True, min_quality=floor, quality=best)
    assert same(restored.kv, at(mine, floor))
    assert restored.refinement.wait(DEADLINE_S)
    restored.refinement.apply()
    assert same(restored.kv, at(mine, best or "high"))


def test_what_cannot_get_better_is_done_at_once(client: Client, mine: Prompt, registry: CollectorRegistry) -> None:
    cache = client.namespace(mine.layout)
    stored = cache.put(mine.tokens, mine.kv, quality="lossless")
    restored = cache.get(mine.tokens, refine=True)
    assert same(restored.kv, mine.kv)
    refinement = restored.refinement
    assert (refinement.done, refinement.wait(0), refinement.tokens) == (True, True, 64)
    other = codec.empty(mine.layout, 64)
    assert refinement.apply(other)[1] == 64
    assert same(other, mine.kv)
    assert received(registry) == stored.bytes
    nothing = cache.get([9, *mine.tokens], refine=True)
    assert (nothing.n, nothing.refinement.wait(0), nothing.refinement.apply()[1]) == (0, True, 0)
    with pytest.raises(InvalidArgument, match="refine=True"):
        _ = cache.get(mine.tokens).refinement


def test_chunks_of_several_qualities(client: Client, mine: Prompt, registry: CollectorRegistry) -> None:
    """What has come whole is not asked for again, and parts the rest in two requests."""
    cache = client.namespace(mine.layout)
    stored = [
        cache.put(mine.tokens[:last], mine.kv[:, :, last - CHUNK : last], quality=quality, first_token=last - CHUNK)
        for last, quality in ((16, "high"), (32, "raw"), (48, "low"), (64, "high"))
    ]
    restored = cache.get(mine.tokens, refine=True)
    assert restored.refinement.wait(DEADLINE_S)
    restored.refinement.apply()
    assert same(restored.kv, cache.get(mine.tokens).kv)
    assert same(restored.kv[:, :, 16:32], mine.kv[:, :, 16:32])
    assert received(registry) == 2 * sum(each.bytes for each in stored), "as much as one whole get"


def test_objects_coded_with_a_profile(client: Client, mine: Prompt) -> None:
    profile = codec.learn_statistics([(mine.kv, 0)], mine.layout)
    cache = client.namespace(mine.layout, profile=profile)
    cache.put(mine.tokens, mine.kv, quality="high")
    restored = client.namespace(mine.layout).get(mine.tokens, refine=True)
    assert restored.refinement.wait(DEADLINE_S)
    restored.refinement.apply()
    assert same(restored.kv, cache.get(mine.tokens).kv)
    assert not same(restored.kv, cache.get(mine.tokens, quality="low").kv)


def test_a_planned_get_is_refined(client: Client, mine: Prompt) -> None:
    cache = client.namespace(mine.layout)
    cache.put(mine.tokens, mine.kv, quality="high")
    restored = cache.get(mine.tokens, refine=True, ttft=DEADLINE_S, prefill_tokens_per_s=0.01)
    assert restored.n == 64
    assert restored.refinement.wait(DEADLINE_S)
    restored.refinement.apply()
    assert same(restored.kv, at(mine, "high"))


def test_the_lease_is_kept_for_the_rest_and_then_given_back(client: Client, mine: Prompt) -> None:
    cache = client.namespace(mine.layout)
    cache.put(mine.tokens, mine.kv, quality="high")
    before = client.stat().leases
    restored = cache.get(mine.tokens, refine=True)
    assert restored.refinement.wait(DEADLINE_S)
    assert client.stat().leases == before
    cache.lookup(mine.tokens)
    assert client.stat().leases == before + 1


async def test_with_the_asynchronous_client(shared: NodeProcess, mine: Prompt) -> None:
    async with AsyncClient(shared.address, strict=True, deadline=DEADLINE_S, registry=CollectorRegistry()) as client:
        cache = client.namespace(mine.layout)
        await cache.put(mine.tokens, mine.kv, quality="high")
        restored = await cache.get(mine.tokens, refine=True)
        assert await restored.refinement.wait(DEADLINE_S)
        assert (await restored.refinement.apply())[1] == 64
        assert same(restored.kv, at(mine, "high"))


# Nodes that fail or lie


def coarse(held: Held, then: Fetch) -> Fetch:
    """What is asked for whole is answered as it should be; the rest of it, by `then`."""

    def answer(request: pb.FetchRequest, context: Context) -> Iterator[Answer]:
        if request.held_bytes:
            yield from then(request, context)
            return
        for index, blob in enumerate(held.blobs):
            yield from pieces(index, bytes(codec.truncate(blob, Quality(request.quality))))

    return answer


def rest(held: Held, request: pb.FetchRequest, index: int) -> bytes:
    return held.blobs[index][request.held_bytes[index] :]


@pytest.fixture
def held() -> Held:
    return Held.of(small_layout(), 3, seed=1, quality="high")


def test_a_rest_that_does_not_come_costs_nothing_but_time(held: Held, registry: CollectorRegistry) -> None:
    def one_and_no_more(request: pb.FetchRequest, context: Context) -> Iterator[Answer]:
        yield from pieces(0, rest(held, request, 0))
        hang(context)

    with (
        HostileServer(lookup=held.lookup, fetch=coarse(held, one_and_no_more)) as server,
        Client(server.address, deadline=1.0, registry=registry) as client,
    ):
        restored = client.namespace(held.layout).get(held.tokens, refine=True)
        refinement = restored.refinement
        assert restored.n == 3 * CHUNK
        wait_until(lambda: refinement.tokens == CHUNK, "the first chunk's rest is here")
        assert not refinement.wait(0)
        low = bits(restored.kv)
        refinement.apply()
        assert bits(restored.kv) != low
        assert bits(codec.token_slice(restored.kv, CHUNK, 3 * CHUNK)) == bits(decoded(held, "low", 1, 2))
        assert bits(codec.token_slice(restored.kv, 0, CHUNK)) == bits(decoded(held, "high", 0))
        assert not refinement.wait(DEADLINE_S), "its deadline is that of the get, once more"
        assert (refinement.reason, refinement.tokens) == ("deadline", CHUNK)
    assert registry.get_sample_value(
        "kvstore_client_failures_total", {"call": "refine", "reason": "deadline"}
    ) == 1  # fmt: skip


@pytest.mark.parametrize("strict", [False, True])
def test_a_rest_of_something_else_is_not_taken(held: Held, strict: bool) -> None:
    def damaged(request: pb.FetchRequest, context: Context) -> Iterator[Answer]:
        yield from pieces(0, rest(held, request, 0))
        wrong = bytearray(rest(held, request, 1))
        wrong[len(wrong) // 2] ^= 1
        yield from pieces(1, bytes(wrong))

    with (
        HostileServer(lookup=held.lookup, fetch=coarse(held, damaged)) as server,
        Client(server.address, deadline=DEADLINE_S, strict=strict, registry=CollectorRegistry()) as client,
    ):
        restored = client.namespace(held.layout).get(held.tokens, refine=True)
        refinement = restored.refinement
        if strict:
            with pytest.raises(ObjectDamaged):
                refinement.wait(DEADLINE_S)
        else:
            assert not refinement.wait(DEADLINE_S)
        assert (refinement.reason, refinement.tokens) == ("damaged", CHUNK)
        refinement.apply()
        assert bits(codec.token_slice(restored.kv, 0, CHUNK)) == bits(decoded(held, "high", 0))
        assert bits(codec.token_slice(restored.kv, CHUNK, 3 * CHUNK)) == bits(decoded(held, "low", 1, 2))


@pytest.mark.parametrize("fault", ["hangs", "lies"])
def test_a_planned_get_is_as_good_as_what_came_where_the_rest_does_not(
    held: Held, registry: CollectorRegistry, fault: str
) -> None:
    """It measures the link with the first chunk, at the coarsest, and refines that within the get."""
    asked: list[int] = []

    def bad(request: pb.FetchRequest, context: Context) -> Iterator[Answer]:
        asked.append(len(request.held_bytes))
        if fault == "hangs":
            hang(context)
        yield from pieces(0, bytes(len(rest(held, request, 0))))

    def behind(request: pb.FetchRequest, context: Context) -> Iterator[Answer]:
        if not request.held_bytes and not request.chunk_hashes.startswith(held.refs[0].hash):
            first = len(held.refs) - len(request.chunk_hashes) // 32
            for index, blob in enumerate(held.blobs[first:]):
                yield from pieces(index, bytes(codec.truncate(blob, Quality(request.quality))))
            return
        yield from coarse(held, bad)(request, context)

    ttft_s = 1.5
    with (
        HostileServer(lookup=held.lookup, fetch=behind) as server,
        Client(server.address, deadline=DEADLINE_S, strict=True, registry=registry) as client,
    ):
        began = time.monotonic()
        kv, n = client.namespace(held.layout).get(held.tokens, ttft=ttft_s, prefill_tokens_per_s=1.0)
        waited_s = time.monotonic() - began
    assert n == 3 * CHUNK
    assert asked
    assert waited_s < ttft_s + 1.0
    assert bits(codec.token_slice(kv, 0, CHUNK)) == bits(decoded(held, "low", 0))
    lies = registry.get_sample_value("kvstore_client_failures_total", {"call": "refine", "reason": "damaged"})
    assert lies == (None if fault == "hangs" else 1)


@pytest.mark.parametrize("length", ["whole", "short", "none"])
def test_a_rest_of_another_length_is_another_objects(held: Held, length: str) -> None:
    def other(request: pb.FetchRequest, context: Context) -> Iterator[Answer]:
        if length != "none":
            yield from pieces(0, held.blobs[0] if length == "whole" else rest(held, request, 0)[:-1])

    with (
        HostileServer(lookup=held.lookup, fetch=coarse(held, other)) as server,
        Client(server.address, deadline=DEADLINE_S, registry=CollectorRegistry()) as client,
    ):
        restored = client.namespace(held.layout).get(held.tokens, refine=True)
        assert not restored.refinement.wait(DEADLINE_S)
        assert restored.refinement.reason == ("absent" if length == "none" else "foreign")
        restored.refinement.apply()
        assert bits(restored.kv) == bits(decoded(held, "low", 0, 1, 2))


def test_a_header_that_promises_more_than_was_looked_up_is_not_believed(held: Held) -> None:
    """Else it would say how much memory is set aside."""
    short = [len(codec.truncate(blob, "low")) for blob in held.blobs]

    def lookup(request: pb.LookupRequest, context: Context) -> pb.LookupResponse:
        return answer_of([held.status(index, stored_bytes=size) for index, size in enumerate(short)])

    with (
        HostileServer(lookup=lookup, fetch=coarse(held, held.fetch)) as server,
        Client(server.address, deadline=DEADLINE_S, registry=CollectorRegistry()) as client,
    ):
        restored = client.namespace(held.layout).get(held.tokens, refine=True)
        assert (restored.n, restored.refinement.done) == (3 * CHUNK, True)
        assert server.calls == ["Lookup", "Fetch"]


@pytest.mark.parametrize("closes", ["refinement", "client"])
def test_closing_ends_what_is_on_its_way(held: Held, closes: str) -> None:
    """Also where the node answers nothing any more, not even that the lease is given back."""

    def never(request: pb.FetchRequest, context: Context) -> Iterator[Answer]:
        hang(context)
        yield from ()

    def lookup(request: pb.LookupRequest, context: Context) -> pb.LookupResponse:
        answer = held.lookup(request, context)
        answer.lease_id, answer.lease_ms = b"lease", request.lease_ms
        return answer

    def renew(request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        hang(context)
        return pb.RenewResponse()

    with HostileServer(lookup=lookup, renew=renew, fetch=coarse(held, never)) as server:
        client = Client(server.address, deadline=1000.0, registry=CollectorRegistry())
        refinement = client.namespace(held.layout).get(held.tokens, refine=True).refinement
        wait_until(lambda: server.calls.count("Fetch") == 2, "the rest is asked for")
        assert not refinement.done
        (refinement if closes == "refinement" else client).close()
        assert not refinement.wait(DEADLINE_S)
        assert refinement.reason == "closed"
        client.close()


def decoded(held: Held, quality: str, *indices: int) -> Any:
    out = codec.empty(held.layout, CHUNK * len(indices))
    for at, index in enumerate(indices):
        place = codec.token_slice(out, at * CHUNK, (at + 1) * CHUNK)
        codec.decode(held.blobs[index], held.layout, quality=quality, out=place)
    return out


# The node's side of it


def test_a_fetch_sends_what_is_behind_the_bytes_that_the_reader_has(shared: NodeProcess, mine: Prompt) -> None:
    import grpc

    of = small_layout("held-bytes")
    stored = chunks(of, 3, 1, "high")
    hashes = [chunk.hash for chunk in stored]
    with grpc.insecure_channel(shared.address, options=CHANNEL_OPTIONS) as channel:
        stub = FramedStoreStub(channel)
        put(stub, of, stored)
        assert fetch(stub, of, hashes) == [chunk.blob for chunk in stored]
        assert fetch(stub, of, hashes, held=[0, 100, 7]) == [
            stored[0].blob, stored[1].blob[100:], stored[2].blob[7:]
        ]  # fmt: skip
        medium = len(codec.truncate(stored[0].blob, "medium"))
        assert fetch(stub, of, hashes[:1], quality=Quality.MEDIUM, held=[100]) == [stored[0].blob[100:medium]]
        for too_much in (len(stored[1].blob), 1 << 60):
            assert fetch(stub, of, hashes, held=[1, too_much, 1]) == [stored[0].blob[1:]]
        with pytest.raises(grpc.RpcError, match="held_bytes must say of each chunk"):
            fetch(stub, of, hashes, held=[1, 2])
