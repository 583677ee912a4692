"""The client against a real node: what is put comes back, at every quality, in every form of array, from any thread."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hostile_server import Answer, Context, Held, HostileServer, hang, holds_nothing, takes_all
from kv_objects import small_layout
from kv_strategies import bits, random_kv
from node_process import NodeProcess, clean_environment
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
    LayerSpec,
    LayoutError,
    Namespace,
    Partition,
    PutResult,
    Quality,
    Unavailable,
    ValuesError,
)
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import Framed

StartNode = Callable[..., NodeProcess]
QUALITIES = [quality.label for quality in Quality]
CHUNK = 16
DEADLINE_S = 20.0  # of calls that are not about time
names = (f"client-test-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """One node for the tests that keep to a namespace of their own."""
    folder = tmp_path_factory.mktemp("shared")
    node = NodeProcess(folder, "--host-capacity", "256MiB", "--disk-path", str(folder / "disk"))
    try:
        yield node
    finally:
        node.kill()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def client(shared: NodeProcess, registry: CollectorRegistry) -> Iterator[Client]:
    with Client(shared.address, strict=True, deadline=DEADLINE_S, registry=registry) as client:
        yield client


def new_layout(dtype: str = "float16", **changes: Any) -> KVLayout:
    """A namespace that no other test has."""
    return KVLayout.uniform(
        model=next(names), revision="r", num_layers=3, kv_heads=2, head_dim=16, dtype=dtype, chunk_tokens=CHUNK,
        rope=codec.RoPE(theta=10000.0), **changes,
    )  # fmt: skip


def mixed_layout() -> KVLayout:
    return KVLayout(
        model=next(names), revision="r", dtype="float16", chunk_tokens=CHUNK,
        layers=(
            LayerSpec(kv_heads=2, k_dim=16, v_dim=16, rope=codec.RoPE(theta=10000.0)),
            LayerSpec(kv_heads=1, k_dim=8, v_dim=4),
            LayerSpec(kv_heads=3, k_dim=6, v_dim=0),
        ),
    )  # fmt: skip


def prompt(layout: KVLayout, chunks: float, *, seed: int = 1) -> tuple[list[int], Any]:
    tokens = int(chunks * CHUNK)
    return [seed * 1000 + position for position in range(tokens)], random_kv(layout, tokens, seed)


def expected(layout: KVLayout, kv: Any, tokens: int, stored: str, read: str | None = None) -> bytes:
    """The bits that must come back: of each chunk by itself, what the codec makes of it."""
    out = codec.empty(layout, tokens)
    for first in range(0, tokens, CHUNK):
        last = min(first + CHUNK, tokens)
        blob = codec.encode(codec.token_slice(kv, first, last), layout, quality=stored, first_position=first)
        if read is not None:
            blob = bytes(codec.truncate(blob, read))
        codec.decode(blob, layout, out=codec.token_slice(out, first, last))
    return bits(out)


def counted(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(f"kvstore_client_{name}_total", labels) or 0.0


class BareDLPack:
    """An array of a library that we know nothing of but that it speaks DLPack."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **arguments: Any) -> Any:
        return self._array.__dlpack__(**arguments)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def as_torch(array: np.ndarray[Any, Any]) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def bits_of_torch(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy())


# What is put comes back


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_round_trip(client: Client, dtype: str, quality: str) -> None:
    layout = new_layout(dtype)
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 3.5)
    stored = cache.put(tokens, kv, quality=quality)
    assert stored == PutResult(stored=3, tokens=3 * CHUNK, bytes=stored.bytes)
    assert stored.bytes > 0
    got, n = cache.get(tokens)
    assert n == 3 * CHUNK
    assert bits(got) == expected(layout, kv, n, quality)
    assert (bits(got) == bits(codec.token_slice(kv, 0, n))) == Quality.parse(quality).exact


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_torch_in_and_torch_out(client: Client, dtype: str) -> None:
    layout = new_layout(dtype)
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 2)
    engine = as_torch(kv).permute(0, 1, 3, 2, 4).contiguous().permute(0, 1, 3, 2, 4)  # strided as an engine's is
    assert not engine.is_contiguous()
    cache.put(tokens, engine, quality="lossless")
    out = torch.empty_like(engine)
    got, n = cache.get(torch.tensor(tokens), out=out)
    assert isinstance(got, torch.Tensor)
    assert (n, got.data_ptr()) == (2 * CHUNK, out.data_ptr())
    assert bits_of_torch(out) == bits(kv)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lists_of_pairs(client: Client, dtype: str) -> None:
    layout = new_layout(dtype)
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 2)
    cache.put(tokens, [(as_torch(layer[0]), layer[1]) for layer in kv], quality="raw")
    out = [(np.zeros_like(layer[0]), torch.zeros_like(as_torch(layer[1]))) for layer in kv]
    got, n = cache.get(tokens, out=out)
    assert n == 2 * CHUNK
    for (k, v), (k_out, _), layer in zip(got, out, kv, strict=True):
        assert np.shares_memory(k, k_out)
        assert (bits(k), bits_of_torch(v)) == (bits(layer[0]), bits(layer[1]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_arrays_that_only_speak_dlpack(client: Client, dtype: str) -> None:
    layout = new_layout(dtype)
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 2)
    assert cache.put(tokens, BareDLPack(as_torch(kv)), quality="raw").stored == 2
    assert bits(cache.get(tokens)[0]) == bits(kv)
    out = torch.zeros_like(as_torch(kv))
    got, n = cache.get(tokens, out=BareDLPack(out))
    assert n == 2 * CHUNK
    assert bits_of_torch(out) == bits(kv)
    assert [np.shares_memory(k, out.view(torch.int16).numpy()) for k, _ in got] == [True] * 3
    pairs = [(BareDLPack(as_torch(layer[0])), layer[1]) for layer in kv]
    other = [9, *tokens[1:]]
    assert cache.put(other, pairs, quality="raw").stored == 2
    assert bits(cache.get(other)[0]) == bits(kv)


@pytest.mark.parametrize("quality", QUALITIES)
def test_layers_of_different_shapes(client: Client, quality: str) -> None:
    layout = mixed_layout()
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 2)
    cache.put(tokens, kv, quality=quality)
    got, n = cache.get(tokens)
    assert [(k.shape, v.shape) for k, v in got] == [(k.shape, v.shape) for k, v in kv]
    assert (n, bits(got)) == (2 * CHUNK, expected(layout, kv, n, quality))
    out = codec.empty(layout, 5 * CHUNK)
    assert bits(cache.get(tokens, out=out)[0]) == bits(codec.token_slice(out, 0, n)) == bits(got)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "uint8"])
def test_dtypes_that_lossy_qualities_do_not_take_come_back_exactly(client: Client, dtype: str) -> None:
    layout = new_layout(dtype)
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 2)
    cache.put(tokens, kv, quality="low")
    got, n = cache.get(tokens, min_quality="lossless")
    assert (n, bits(got)) == (2 * CHUNK, bits(kv))


def test_parts_of_one_layout_lie_side_by_side(client: Client) -> None:
    layout = new_layout(partition=Partition(layer_groups=3, head_groups=2))
    tokens = prompt(layout, 2)[0]
    whole = [random_kv(layout.part_layout(part), 2 * CHUNK, part) for part in range(layout.partition.parts)]
    for part, kv in enumerate(whole):
        assert client.namespace(layout, part=part).put(tokens, kv, quality="raw").stored == 2
    for part, kv in enumerate(whole):
        assert bits(client.namespace(layout, part=part).get(tokens)[0]) == bits(kv)
    with pytest.raises(InvalidArgument, match="no such part"):
        client.namespace(layout, part=layout.partition.parts)


# The caller's buffer


@pytest.mark.parametrize("room", [0, CHUNK - 1, CHUNK, 2 * CHUNK + 5, 3 * CHUNK, 4 * CHUNK, 10 * CHUNK])
def test_a_buffer_smaller_or_larger_than_the_hit(client: Client, room: int, registry: CollectorRegistry) -> None:
    layout = new_layout()
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 4)
    cache.put(tokens[: 3 * CHUNK], codec.token_slice(kv, 0, 3 * CHUNK), quality="raw")
    out = np.full((3, 2, room, 2, 16), 7, np.float16)
    got, n = cache.get(tokens, out=out)
    assert n == min(3, room // CHUNK) * CHUNK
    assert got.shape[2] == n
    assert n == 0 or np.shares_memory(got, out)
    assert bits(out[:, :, :n]) == bits(codec.token_slice(kv, 0, n))
    assert (out[:, :, n:] == 7).all()
    assert counted(registry, "tokens", outcome="hit") == n
    assert counted(registry, "tokens", outcome="miss") == 4 * CHUNK - n


def test_a_buffer_with_gaps_between_its_rows(client: Client) -> None:
    layout = new_layout()
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 2)
    cache.put(tokens, kv, quality="high")
    pool = np.full((3, 2, 3, 2 * CHUNK, 40), 7, np.float16)  # heads before tokens, rows longer than head_dim
    out = pool.transpose(0, 1, 3, 2, 4)[:, :, :, 1:, 8:24]
    assert bits(cache.get(tokens, out=out)[0]) == expected(layout, kv, 2 * CHUNK, "high")
    pool.transpose(0, 1, 3, 2, 4)[:, :, :, 1:, 8:24] = 7
    assert (pool == 7).all()


def test_a_buffer_that_does_not_fit_is_the_callers_mistake(client: Client) -> None:
    layout = new_layout()
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 2)
    cache.put(tokens, kv)
    read_only = np.zeros_like(kv)
    read_only.flags.writeable = False
    misfits: tuple[Any, ...] = (kv[:2], kv[..., :8], kv.astype(np.float32), "kv", 7, [], read_only)
    for out in misfits:
        with pytest.raises(LayoutError) as raised:
            cache.get(tokens, out=out)
        assert len(str(raised.value).splitlines()) == 1


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


# Durability and connections


def test_a_durable_put_survives_kill_9_and_the_client_reconnects(start_node: StartNode, tmp_path: Path) -> None:
    flags = ("--host-capacity", "64MiB", "--disk-path", str(tmp_path / "disk"), "--disk-capacity", "256MiB")
    node = start_node(*flags)
    layout = new_layout()
    tokens, kv = prompt(layout, 3)
    with Client(node.address, deadline=DEADLINE_S, registry=CollectorRegistry()) as client:
        cache = client.namespace(layout)
        result = cache.put(tokens, kv, quality="lossless", durable=True)
        assert (result.stored, result.durable) == (3, True)
        again = cache.put(tokens, kv, quality="lossless", durable=True)
        assert (again.have, again.durable) == (3, True)
        node.kill()
        start_node(*flags, listen=node.address)
        got, n = cache.get(tokens, min_quality="lossless")
        assert (n, bits(got)) == (3 * CHUNK, bits(kv))
        assert {chunk.tier for chunk in cache.lookup(tokens).chunks} <= {"host", "disk"}


def test_a_put_in_memory_does_not_claim_to_be_durable(start_node: StartNode) -> None:
    node = start_node("--host-capacity", "64MiB")
    layout = new_layout()
    with Client(node.address, strict=True, deadline=DEADLINE_S) as client:
        result = client.namespace(layout).put(*prompt(layout, 2), durable=True)
    assert not result.durable


def test_a_unix_socket(start_node: StartNode, tmp_path: Path) -> None:
    path = tmp_path / "node.sock"
    start_node(listen=f"unix:{path}")
    layout = new_layout()
    tokens, kv = prompt(layout, 2)
    for target in (f"unix://{path}", f"unix:{path}"):
        with Client(target, strict=True, deadline=DEADLINE_S) as client:
            client.namespace(layout).put(tokens, kv, quality="raw")
            assert bits(client.namespace(layout).get(tokens)[0]) == bits(kv)


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def test_one_of_several_seeds_is_dead(shared: NodeProcess) -> None:
    """Whichever seed a prompt belongs to, the one that lives serves it; also where the client is strict."""
    dead = f"127.0.0.1:{closed_port()}"
    registry = CollectorRegistry()
    layout = new_layout()
    with Client([dead, shared.address], strict=True, deadline=5.0, registry=registry) as client:
        cache = client.namespace(layout)
        for seed in range(8):
            tokens, kv = prompt(layout, 2, seed=seed)
            assert cache.put(tokens, kv, quality="raw").stored == 2
            assert bits(cache.get(tokens)[0]) == bits(kv)
        assert client.stat().node == shared.address
        with pytest.raises(Unavailable, match=dead):
            cache.delete()
    assert counted(registry, "failures", call="put", reason="unavailable") > 0
    with Client(f"{dead},{shared.address}", deadline=5.0, registry=CollectorRegistry()) as lenient:
        deleted = lenient.namespace(layout).delete()
    assert deleted.objects == 16
    (reason,) = deleted.reasons
    assert reason.startswith(f"{dead}: ")


def test_no_node_at_all(registry: CollectorRegistry, caplog: pytest.LogCaptureFixture) -> None:
    layout = new_layout()
    tokens, kv = prompt(layout, 2)
    target = f"127.0.0.1:{closed_port()}"
    with Client(target, deadline=1.0, registry=registry) as client:
        cache = client.namespace(layout)
        with caplog.at_level(logging.WARNING, "kvstore_client"):
            for _ in range(3):
                assert (cache.lookup(tokens), cache.get(tokens)[1]) == (Hit(), 0)
                assert cache.put(tokens, kv).rejected == 2
        with pytest.raises(Unavailable):
            client.stat()
    assert counted(registry, "misses", reason="unavailable") == 6
    assert counted(registry, "rejected_chunks", reason="unavailable") == 6
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["lookup", "get", "put"]
    with Client(target, deadline=1.0, strict=True) as client:
        for call in (client.namespace(layout).lookup, client.namespace(layout).get):
            with pytest.raises(Unavailable, match=target):
                call(tokens)


# Loops and threads


async def test_twenty_concurrent_gets(shared: NodeProcess) -> None:
    layout = new_layout()
    async with AsyncClient(shared.address, strict=True, deadline=DEADLINE_S) as client:
        cache = client.namespace(layout)
        prompts = [prompt(layout, 1 + seed % 4, seed=seed) for seed in range(20)]
        await asyncio.gather(*(cache.put(tokens, kv, quality="lossless") for tokens, kv in prompts))
        for got, (_, kv) in zip(await asyncio.gather(*(cache.get(t) for t, _ in prompts)), prompts, strict=True):
            assert bits(got[0]) == bits(kv)


def round_trips(cache: Namespace, layout: KVLayout, seed: int) -> bool:
    tokens, kv = prompt(layout, 2, seed=seed)
    cache.put(tokens, kv, quality="lossless")
    return bits(cache.get(tokens)[0]) == bits(kv)


def test_one_client_in_eight_threads(client: Client) -> None:
    layout = new_layout()
    cache = client.namespace(layout)
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(lambda seed: round_trips(cache, layout, seed), range(40)))


async def test_the_synchronous_client_inside_a_running_loop(client: Client) -> None:
    assert asyncio.get_running_loop().is_running()
    layout = new_layout()
    assert round_trips(client.namespace(layout), layout, 1)


def test_two_clients_at_once(shared: NodeProcess, start_node: StartNode) -> None:
    other_node = start_node("--host-capacity", "64MiB")
    layout = new_layout()
    tokens, kv = prompt(layout, 2)
    with (
        Client(shared.address, strict=True, deadline=DEADLINE_S) as one,
        Client(shared.address, strict=True, deadline=DEADLINE_S) as two,
        Client(other_node.address, strict=True, deadline=DEADLINE_S) as elsewhere,
    ):
        one.namespace(layout).put(tokens, kv, quality="raw")
        assert two.namespace(layout).get(tokens)[1] == 2 * CHUNK
        assert elsewhere.namespace(layout).get(tokens)[1] == 0
        one.close()
        assert bits(two.namespace(layout).get(tokens)[0]) == bits(kv)


async def test_closed_is_closed(shared: NodeProcess) -> None:
    layout = new_layout()
    tokens, kv = prompt(layout, 1)
    client = Client(shared.address)
    cache = client.namespace(layout)
    cache.put(tokens, kv)
    for _ in range(2):
        client.close()
    calls: list[Callable[[], Any]] = [
        lambda: cache.lookup(tokens), lambda: cache.get(tokens), lambda: cache.put(tokens, kv), cache.delete,
        client.stat, lambda: client.namespace(layout).get(tokens),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ClientClosed):
            call()
    unused = AsyncClient(shared.address)
    await unused.aclose()
    with pytest.raises(ClientClosed):
        await unused.stat()


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


# The process around it


def run_script(text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(text), *arguments],
        capture_output=True, text=True, timeout=60, env=clean_environment(), check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "client.close()", "client.close(); client.close()", "del cache, client"])
def test_a_process_ends_cleanly(shared: NodeProcess, end: str) -> None:
    script = """
        import sys
        import numpy as np
        from kvstore_client import Client, KVLayout
        layout = KVLayout.uniform(model=sys.argv[2], revision="r", num_layers=2, kv_heads=2, head_dim=16,
                                  dtype="float16", chunk_tokens=16)
        client = Client(sys.argv[1], strict=True, deadline=20.0)
        cache = client.namespace(layout)
        kv = np.ones((2, 2, 64, 2, 16), np.float16)
        cache.put(list(range(64)), kv)
        out, n = cache.get(list(range(64)))
        print(n)
        """
    done = run_script(textwrap.dedent(script) + end, shared.address, next(names))
    assert (done.returncode, done.stdout, done.stderr) == (0, "64\n", "")


@pytest.mark.slow
def test_a_process_ends_while_a_call_hangs() -> None:
    """In a thread that nobody joins; the deadline would be far away."""
    with HostileServer(lookup=never) as server:
        done = run_script(
            """
            import sys, threading
            import numpy as np
            from kvstore_client import Client, KVLayout
            layout = KVLayout.uniform(model="m", revision="r", num_layers=2, kv_heads=2, head_dim=16,
                                      dtype="float16", chunk_tokens=16)
            cache = Client(sys.argv[1], deadline=1000.0).namespace(layout)
            call = threading.Thread(target=cache.get, args=(list(range(64)),), daemon=True)
            call.start()
            call.join(0.5)
            print(call.is_alive())
            """,
            server.address,
        )
    assert server.calls == ["Lookup"]
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


@pytest.mark.slow
def test_a_forked_child_is_told_so_and_does_not_hang(shared: NodeProcess) -> None:
    done = run_script(
        """
        import os, sys
        from kvstore_client import Client, InvalidArgument, KVLayout
        layout = KVLayout.uniform(model="m", revision="r", num_layers=2, kv_heads=2, head_dim=16,
                                  dtype="float16", chunk_tokens=16)
        client = Client(sys.argv[1], strict=True, deadline=20.0)
        client.stat()
        child = os.fork()
        if child == 0:
            for each in (client, Client(sys.argv[1])):
                try:
                    each.namespace(layout).get(list(range(64)))
                except InvalidArgument as error:
                    print(error, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        client.stat()
        """,
        shared.address,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "a client was used before this process was forked"
    ] * 2


@pytest.mark.slow
def test_clients_made_in_many_threads_at_once_share_one_loop(shared: NodeProcess) -> None:
    done = run_script(
        """
        import sys, threading
        import numpy as np
        from kvstore_client import Client, KVLayout
        sys.setswitchinterval(1e-6)
        layout = KVLayout.uniform(model=sys.argv[2], revision="r", num_layers=2, kv_heads=2, head_dim=16,
                                  dtype="float16", chunk_tokens=16)
        kv = np.ones((2, 2, 64, 2, 16), np.float16)
        together, found = threading.Barrier(8), []
        def work(seed):
            together.wait()
            with Client(sys.argv[1], strict=True, deadline=20.0) as client:
                tokens = [seed] * 64
                client.namespace(layout).put(tokens, kv)
                found.append(client.namespace(layout).get(tokens)[1])
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(found, [thread.name for thread in threading.enumerate()].count("kvstore-client"))
        """,
        shared.address, next(names),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{[64] * 8} 1\n"


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("where", ["Lookup", "Fetch", "Put"])
def test_closing_ends_the_calls_of_other_threads(where: str, strict: bool) -> None:
    """As if the node had gone away, wherever they are; nothing is raised that is not ours."""
    held = Held.of(small_layout(), 2, seed=1)
    lookup = {"Lookup": never, "Fetch": held.lookup, "Put": holds_nothing}[where]
    with HostileServer(lookup=lookup, fetch=never_an_object, put=never_an_object) as server:
        client = Client(server.address, deadline=1000.0, strict=strict, registry=CollectorRegistry())
        cache = client.namespace(held.layout)
        calls: dict[str, list[Callable[[], Any]]] = {
            "Lookup": [lambda: cache.lookup(held.tokens).tokens, lambda: cache.get(held.tokens)[1]],
            "Fetch": [lambda: cache.get(held.tokens)[1]],
            "Put": [lambda: cache.put(held.tokens, held.kv).tokens],
        }
        with ThreadPoolExecutor(2) as threads:
            ends = [threads.submit(call) for call in calls[where]]
            wait_until(lambda: server.calls.count(where) == len(ends), "the calls are under way")
            client.close()
            if strict:
                assert [type(end.exception(5)) for end in ends] == [Unavailable] * len(ends)
            else:
                assert [end.result(5) for end in ends] == [0] * len(ends)


async def test_a_cancelled_call_is_cancelled_also_where_its_client_is_closed_at_once() -> None:
    held = Held.of(small_layout(), 2, seed=1)
    with HostileServer(lookup=never) as server:
        client = AsyncClient(server.address, deadline=1000.0, registry=CollectorRegistry())
        call = asyncio.ensure_future(client.namespace(held.layout).get(held.tokens))
        await asyncio.to_thread(wait_until, lambda: server.calls == ["Lookup"], "the call is under way")
        call.cancel()
        await client.aclose()
        with pytest.raises(asyncio.CancelledError):
            await call


def never(request: Any, context: Context) -> pb.LookupResponse:
    hang(context)
    return pb.LookupResponse()


def never_an_object(request: Any, context: Context) -> Iterator[Answer]:
    hang(context)
    yield from ()


def test_every_error_of_the_client_has_one_root() -> None:
    assert issubclass(ClientClosed, KvClientError)
    assert issubclass(InvalidArgument, ValueError)
