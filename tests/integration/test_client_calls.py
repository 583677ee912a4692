"""The client's calls on a real node: qualities, prompts that share a prefix, lookup, delete, stat, and mistakes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from client_prompts import CHUNK, DEADLINE_S, counted, expected, names, new_layout, prompt
from hostile_server import Answer, Context, HostileServer, holds_nothing, takes_all
from kv_objects import small_layout
from kv_strategies import bits, random_kv
from node_process import NodeProcess
from polling import wait_until
from prometheus_client import CollectorRegistry

import kvstore_codec as codec
from kvstore_client import (
    AsyncClient,
    Client,
    ClientClosed,
    Extras,
    Hit,
    InvalidArgument,
    KvClientError,
    KVLayout,
    LayoutError,
    PutResult,
    Quality,
    ValuesError,
)
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import Framed

StartNode = Callable[..., NodeProcess]


# Quality


@pytest.mark.parametrize("read", ["high", "medium", "low"])
def test_a_lower_quality_is_the_objects_prefix(client: Client, registry: CollectorRegistry, read: str) -> None:
    layout = new_layout()
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 3)
    stored = cache.put(tokens, kv, quality="high")
    got, n = cache.get(tokens, quality=read)
    assert (n, bits(got)) == (3 * CHUNK, expected(layout, kv, n, "high", read))
    received = counted(registry, "stream_bytes", direction="in")
    sizes = [
        len(codec.truncate(codec.encode(kv[:, :, at : at + CHUNK], layout, quality="high", first_position=at), read))
        for at in range(0, n, CHUNK)
    ]  # fmt: skip
    assert received == sum(sizes)
    assert (received < stored.bytes) == (read != "high")
    assert counted(registry, "stream_bytes", direction="out") == stored.bytes


@pytest.mark.parametrize(("worse", "argument"), [("low", "quality"), ("medium", "provenance")])
def test_min_quality_cuts_the_prefix(client: Client, registry: CollectorRegistry, worse: str, argument: str) -> None:
    layout = new_layout()
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 3)
    cache.put(tokens[: 2 * CHUNK], kv[:, :, : 2 * CHUNK], quality="high")
    how: dict[str, Any] = {"quality": "high", argument: worse}
    cache.put(tokens, kv[:, :, 2 * CHUNK :], first_token=2 * CHUNK, **how)
    assert cache.get(tokens)[1] == cache.get(tokens, min_quality=worse)[1] == 3 * CHUNK
    assert counted(registry, "misses", reason="quality") == 0
    got, n = cache.get(tokens, min_quality="high")
    assert (n, bits(got)) == (2 * CHUNK, expected(layout, kv, n, "high"))
    assert counted(registry, "misses", reason="quality") == 1
    assert cache.get(tokens, min_quality="lossless")[1] == 0
    assert counted(registry, "misses", reason="quality") == 2
    hit = cache.lookup(tokens)
    assert [chunk.effective_quality.label for chunk in hit.chunks] == ["high", "high", worse]


def test_a_quality_below_the_floor_asked_for_is_a_contradiction(client: Client) -> None:
    with pytest.raises(InvalidArgument, match="worse than min_quality"):
        client.namespace(new_layout()).get([1] * CHUNK, quality="low", min_quality="high")
    with pytest.raises(LayoutError, match="unknown quality 'best'"):
        client.namespace(new_layout()).get([1] * CHUNK, quality="best")


def test_a_better_quality_replaces_a_worse_one_and_not_the_other_way(client: Client) -> None:
    layout = new_layout()
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 2)
    for quality, expect in (("low", "stored"), ("low", "have"), ("lossless", "stored"), ("high", "have")):
        result = cache.put(tokens, kv, quality=quality)
        assert getattr(result, expect) == 2, (quality, result)
        assert result.tokens == 2 * CHUNK
    assert bits(cache.get(tokens, min_quality="lossless")[0]) == bits(kv)
    assert [chunk.quality for chunk in cache.lookup(tokens).chunks] == [Quality.LOSSLESS] * 2


# Prompts that share a prefix


def test_a_growing_prompt_puts_only_what_is_new(client: Client, registry: CollectorRegistry) -> None:
    layout = new_layout()
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 4)
    first = cache.put(tokens[: 2 * CHUNK + 3], kv[:, :, : 2 * CHUNK + 3], quality="raw")
    assert (first.stored, first.have, first.tokens) == (2, 0, 2 * CHUNK)
    sent = counted(registry, "stream_bytes", direction="out")
    second = cache.put(tokens, kv, quality="raw")
    assert (second.stored, second.have, second.rejected, second.tokens) == (2, 2, 0, 4 * CHUNK)
    assert counted(registry, "stream_bytes", direction="out") == sent + second.bytes
    third = cache.put(tokens, kv, quality="raw")
    assert (third.stored, third.have, third.bytes) == (0, 4, 0)
    assert counted(registry, "stream_bytes", direction="out") == sent + second.bytes
    assert bits(cache.get(tokens)[0]) == bits(kv)


def test_an_edited_prompt_shares_what_lies_before_the_edit(client: Client, registry: CollectorRegistry) -> None:
    layout = new_layout()
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 4)
    cache.put(tokens, kv, quality="raw")
    edited = [*tokens[: 2 * CHUNK], 5, *tokens[2 * CHUNK + 1 :]]
    got, n = cache.get(edited)
    assert (n, bits(got)) == (2 * CHUNK, bits(kv[:, :, : 2 * CHUNK]))
    assert counted(registry, "misses", reason="absent") == 1
    other = random_kv(layout, 4 * CHUNK, 2)
    assert (lambda put: (put.stored, put.have))(cache.put(edited, other, quality="raw")) == (2, 2)
    assert bits(cache.get(edited)[0][:, :, 2 * CHUNK :]) == bits(other[:, :, 2 * CHUNK :])
    assert bits(cache.get(tokens)[0]) == bits(kv)


@pytest.mark.parametrize("ends", [True, False])
def test_a_put_that_was_answered_is_not_cancelled_unless_it_does_not_end(ends: bool) -> None:
    """What is cancelled costs both sides memory that gRPC never gives back."""
    ended: list[bool] = []

    def slow_to_end(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
        yield from takes_all(requests, context)
        cancelled = threading.Event()
        context.add_callback(cancelled.set)
        ended.append(cancelled.wait(0.02 if ends else DEADLINE_S))

    layout = new_layout()
    tokens, kv = prompt(layout, 3)
    with HostileServer(lookup=holds_nothing, put=slow_to_end) as server, Client(server.address, strict=True) as client:
        assert client.namespace(layout).put(tokens, kv).stored == 3
        wait_until(lambda: ended == [not ends], "the call ended, or was cancelled")


async def test_memory_of_what_was_put_is_used_again(shared: NodeProcess) -> None:
    layout = new_layout()
    async with AsyncClient(shared.address, strict=True, deadline=DEADLINE_S) as client:
        free = client._session.put_buffers._free
        used = []
        for seed in (1, 2):
            tokens, kv = prompt(layout, 3, seed=seed)
            assert (await client.namespace(layout).put(tokens, kv, quality="raw")).stored == 3
            used.append({id(buffer) for buffer in free})
    assert len(used[0]) == 3
    assert used[0] == used[1]


def test_a_put_from_first_token_on(client: Client) -> None:
    """What an engine does that got a prefix and computed the rest."""
    layout = new_layout()
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 3.5)
    cache.put(tokens[:CHUNK], kv[:, :, :CHUNK], quality="raw")
    rest = cache.put(tokens, kv[:, :, CHUNK:], first_token=CHUNK, quality="raw", provenance="raw")
    assert (rest.stored, rest.have, rest.tokens) == (2, 0, 3 * CHUNK)
    assert bits(cache.get(tokens)[0]) == bits(kv[:, :, : 3 * CHUNK])
    for first_token in (-CHUNK, 1, CHUNK + 1):
        with pytest.raises(InvalidArgument, match="multiple of chunk_tokens"):
            cache.put(tokens, kv[:, :, CHUNK:], first_token=first_token)
    with pytest.raises(InvalidArgument, match="from first_token on"):
        cache.put(tokens, kv, first_token=CHUNK)
    with pytest.raises(InvalidArgument, match="from first_token on"):
        cache.put(tokens[:CHUNK], kv[:, :, :0], first_token=2 * CHUNK)


def test_a_tail_is_stored_where_it_is_asked_for(client: Client) -> None:
    layout = new_layout()
    tokens, kv = prompt(layout, 2.5)
    tail, whole = client.namespace(layout, tail=True), client.namespace(layout)
    assert (tail.put(tokens, kv, quality="raw").tokens, whole.get(tokens)[1]) == (len(tokens), 2 * CHUNK)
    got, n = tail.get(tokens)
    assert (n, bits(got)) == (len(tokens), bits(kv))
    assert tail.get([*tokens, 5])[1] == 2 * CHUNK, "a tail is of one prompt, not of its continuations"
    short = tokens[:3]
    assert tail.put(short, kv[:, :, :3], quality="lossless").tokens == 3
    assert bits(tail.get(short)[0]) == bits(kv[:, :, :3])


def test_extras_and_tenant_keys_separate(client: Client, shared: NodeProcess) -> None:
    layout = new_layout()
    tokens = prompt(layout, 1)[0]
    with Client(shared.address, tenant_key=bytes(range(32)), deadline=DEADLINE_S) as other:
        spaces = [
            client.namespace(layout), other.namespace(layout),
            *(
                client.namespace(layout, extras=extras)
                for extras in (Extras(salt="a"), Extras(salt="b"), Extras(lora="a"), Extras(lora="a", salt="a"))
            ),
        ]  # fmt: skip
        for seed, space in enumerate(spaces):
            assert space.get(tokens)[1] == 0
            assert space.put(tokens, random_kv(layout, CHUNK, seed), quality="raw").stored == 1
        for seed, space in enumerate(spaces):
            assert bits(space.get(tokens)[0]) == bits(random_kv(layout, CHUNK, seed))


def test_prompts_too_short_for_a_chunk_are_no_calls(client: Client, registry: CollectorRegistry) -> None:
    layout = new_layout()
    cache = client.namespace(layout)
    for tokens in ([], [1, 2, 3]):
        kv = random_kv(layout, len(tokens), 1)
        assert cache.lookup(tokens) == Hit()
        got, n = cache.get(tokens)
        assert (n, got.shape) == (0, (3, 2, 0, 2, 16))
        assert cache.put(tokens, kv) == PutResult()
        assert cache.delete(tokens).objects == 0
    assert [s for m in registry.collect() if m.name == "kvstore_client_misses" for s in m.samples] == []


@pytest.mark.slow
def test_a_prompt_of_more_chunks_than_one_call_takes(start_node: StartNode) -> None:
    """4,096 chunks a lookup, fetch and delete, 2,048 a put: the client makes as many calls as it needs."""
    node = start_node("--host-capacity", "64MiB")
    layout = KVLayout.uniform(
        model=next(names), revision="r", num_layers=1, kv_heads=1, head_dim=2, dtype="float16", chunk_tokens=CHUNK
    )
    tokens, kv = prompt(layout, 4096 + 3)
    with Client(node.address, strict=True, deadline=60.0, registry=CollectorRegistry()) as client:
        cache = client.namespace(layout)
        stored = cache.put(tokens, kv, quality="raw")
        assert (stored.stored, stored.tokens) == (4099, len(tokens))
        hit = cache.lookup(tokens, lease_ms=100)
        assert hit.tokens == len(tokens)
        assert hit.lease is not None
        assert len(hit.lease.ids) == 2
        got, n = cache.get(tokens)
        assert (n, bits(got)) == (len(tokens), bits(kv))
        assert cache.delete(tokens).objects == 4099
        assert cache.lookup(tokens) == Hit()


# Lookup, delete, stat


def test_lookup_tells_what_is_held(client: Client) -> None:
    layout = new_layout()
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 3)
    assert cache.lookup(tokens) == Hit()
    stored = cache.put(tokens[: 2 * CHUNK], kv[:, :, : 2 * CHUNK], quality="medium", provenance="low")
    hit = cache.lookup(tokens, lease_ms=5000)
    assert hit.tokens == 2 * CHUNK
    assert [(c.first_token, c.tokens, c.quality, c.provenance, c.tier) for c in hit.chunks] == [
        (first, CHUNK, Quality.MEDIUM, Quality.LOW, "host") for first in (0, CHUNK)
    ]  # fmt: skip
    assert sum(chunk.stored_bytes for chunk in hit.chunks) == stored.bytes
    assert hit.lease is not None
    assert hit.lease.duration_ms == 5000
    assert cache.lookup(tokens, lease_ms=0).lease is None
    for lease_ms in (-1, 1 << 32):
        with pytest.raises(InvalidArgument, match="lease_ms"):
            cache.lookup(tokens, lease_ms=lease_ms)


def test_delete_a_prompt_and_a_namespace(client: Client) -> None:
    layout, other = new_layout(), new_layout()
    cache, bystander = client.namespace(layout), client.namespace(other)
    tokens, kv = prompt(layout, 3)
    more, more_kv = prompt(layout, 2, seed=2)
    for space in (cache, bystander):
        space.put(tokens, kv, quality="raw")
    cache.put(more, more_kv, quality="raw")
    deleted = cache.delete(tokens)
    assert (deleted.objects, deleted.reasons) == (3, ())
    assert deleted.bytes > kv.nbytes
    assert (cache.get(tokens)[1], cache.get(more)[1]) == (0, 2 * CHUNK)
    assert cache.delete(tokens).objects == 0
    assert cache.delete().objects == 2
    assert (cache.get(more)[1], bystander.get(tokens)[1]) == (0, 3 * CHUNK)


def test_stat(client: Client, shared: NodeProcess) -> None:
    layout = new_layout()
    cache = client.namespace(layout)
    before = client.stat()
    assert (before.node, before.staged_objects, before.staged_bytes) == (shared.address, 0, 0)
    assert {tier.tier for tier in before.tiers} == {"host", "disk"}
    assert {tier.capacity_bytes for tier in before.tiers if tier.tier == "host"} == {256 << 20}
    tokens, kv = prompt(layout, 3)
    cache.put(tokens, kv, quality="raw", durable=True)
    after = client.stat()
    assert (after.objects - before.objects, after.namespaces - before.namespaces) == (3, 1)
    assert after.uptime_seconds >= before.uptime_seconds
    assert after.counters


def test_a_lookups_lease_keeps_its_chunks_under_pressure(start_node: StartNode) -> None:
    node = start_node("--host-capacity", "1MiB")
    layout = small_layout("pressed", layers=16, head_dim=64)  # 128 KiB a chunk: eight fill the node
    with Client(node.address, strict=True, deadline=DEADLINE_S) as client:
        cache = client.namespace(layout)
        leased, free = prompt(layout, 2, seed=1), prompt(layout, 2, seed=2)
        for tokens, kv in (leased, free):
            cache.put(tokens, kv, quality="raw")
        assert cache.lookup(leased[0], lease_ms=60_000).tokens == 2 * CHUNK
        for seed in range(3, 9):
            cache.put(*prompt(layout, 2, seed=seed), quality="raw")
        assert cache.lookup(free[0]).tokens == 0, "there was pressure"
        assert bits(cache.get(leased[0])[0]) == bits(leased[1])


# Mistakes


def test_values_and_shapes_that_cannot_be_stored(client: Client) -> None:
    layout = new_layout()
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 2)
    for bad in (kv[:2], kv[:, :1], kv[..., :8], kv.astype(np.float32), kv[0, 0], "kv", None, [(kv[0, 0], kv[0, 1])]):
        with pytest.raises(LayoutError) as raised:
            cache.put(tokens, bad)
        assert len(str(raised.value).splitlines()) == 1
    for value in (np.nan, np.inf, -np.inf):
        wrong = kv.copy()
        wrong[1, 1, 20, 1, 3] = value
        for quality in ("high", "medium", "low"):
            with pytest.raises(ValuesError, match="lossless"):
                cache.put(tokens, wrong, quality=quality)
        assert cache.get(tokens)[1] == 0
    assert cache.put(tokens, wrong, quality="lossless").stored == 2
    assert bits(cache.get(tokens)[0]) == bits(wrong)
    with pytest.raises(InvalidArgument, match="from first_token on"):
        cache.put(tokens, kv[:, :, :-1])


@pytest.mark.parametrize("tokens", [[-1] * CHUNK, [1 << 32] * CHUNK, [0.5] * CHUNK, [[1] * CHUNK], ["a"] * CHUNK])
def test_tokens_that_are_none(client: Client, tokens: Any) -> None:
    cache = client.namespace(new_layout())
    for call in (cache.lookup, cache.get, cache.delete):
        with pytest.raises(LayoutError, match="token ids must be"):
            call(tokens)


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), float("inf"), "1", True])
def test_deadlines_that_are_none(client: Client, shared: NodeProcess, deadline: Any) -> None:
    with pytest.raises(InvalidArgument, match="deadline"):
        Client(shared.address, deadline=deadline)
    with pytest.raises(InvalidArgument, match="deadline"):
        client.namespace(new_layout()).get([1] * CHUNK, deadline=deadline)


@pytest.mark.parametrize("deadline", [1e5, 1e8, 1e18, 1e300])
def test_a_deadline_of_any_length(client: Client, deadline: float) -> None:
    layout = new_layout()
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 2)
    assert cache.put(tokens, kv, quality="raw", deadline=deadline).stored == 2
    assert bits(cache.get(tokens, deadline=deadline)[0]) == bits(kv)
    assert cache.lookup(tokens, deadline=deadline).tokens == 2 * CHUNK
    assert cache.delete(tokens, deadline=deadline).objects == 2
    assert client.stat(deadline=deadline).objects >= 0


def test_a_deadline_that_is_too_short_is_a_miss(shared: NodeProcess, registry: CollectorRegistry) -> None:
    layout = new_layout()
    tokens, kv = prompt(layout, 2)
    with Client(shared.address, registry=registry) as client:
        cache = client.namespace(layout)
        cache.put(tokens, kv, deadline=DEADLINE_S)
        assert cache.get(tokens, deadline=1e-9)[1] == 0
        assert cache.put(tokens, kv, quality="raw", deadline=1e-9).rejected == 2
        assert cache.get(tokens, deadline=DEADLINE_S)[1] == 2 * CHUNK
    assert counted(registry, "misses", reason="deadline") == 1
    assert counted(registry, "rejected_chunks", reason="deadline") == 2


def test_every_error_of_the_client_has_one_root() -> None:
    assert issubclass(ClientClosed, KvClientError)
    assert issubclass(InvalidArgument, ValueError)
