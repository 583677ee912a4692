"""Namespaces that learn a profile from what is put."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kv_objects
import numpy as np
import pytest
from hostile_server import HostileServer, holds_nothing
from kv_strategies import random_kv
from node_process import NodeProcess
from polling import wait_until
from profile_callers import CHUNK, Caller, logged, names, refuses_profiles

import kvstore_codec as codec
from kvstore_client import KVLayout, Namespace, Profile, RequestRefused
from kvstore_codec import Quality

StartNode = Callable[..., NodeProcess]


def pages(layout: KVLayout, count: int, seed: int) -> tuple[list[int], Any]:
    """KV whose channels have one and the same mean and scale in every prompt."""
    rng = np.random.default_rng(0)
    shape = (layout.num_layers, 2, 1, layout.layers[0].kv_heads, 16)
    mean, scale = rng.standard_normal(shape), np.exp2(rng.uniform(-3, 1, shape))
    kv = codec.empty(layout, count * CHUNK)
    values = np.random.default_rng(seed).standard_normal(kv.shape)
    kv[...] = (mean + scale * values).astype(kv.dtype)
    return [seed * 100_000 + position for position in range(count * CHUNK)], kv


def learning(caller: Caller, layout: KVLayout, chunks: int = 64) -> Namespace:
    """A namespace that has learned from puts of four prompts."""
    cache = caller.client.namespace(layout, learn_statistics=True)
    for seed in range(4):
        assert caller.events("learned") == 0
        assert cache.put(*pages(layout, chunks // 4, seed)).stored == chunks // 4
    return cache


def learned(caller: Caller) -> None:
    wait_until(lambda: caller.events("learned") == 1, "the profile is learned")


def test_a_namespace_learns_from_its_first_puts(
    shared: NodeProcess, caller: Callable[..., Caller], layout: KVLayout
) -> None:
    writer, reader = caller(shared.address, strict=True), caller(shared.address, strict=True)
    cache = learning(writer, layout)
    learned(writer)
    assert writer.events("stored") == 0, "nobody needs it yet"
    sizes = []
    for seed in (0, 4, 5):
        tokens, kv = pages(layout, 16, seed)
        put = cache.put(tokens, kv)
        assert put.have == (16 if seed == 0 else 0)
        hit = cache.lookup(tokens)
        assert {chunk.quality for chunk in hit.chunks} == {Quality.HIGH}
        sizes.append(sum(chunk.stored_bytes for chunk in hit.chunks))
        got, n = reader.client.namespace(layout).get(tokens)
        assert n == len(tokens)
        error = np.abs(got.astype(np.float32) - kv.astype(np.float32)).max()
        assert error < 0.5 * np.abs(kv.astype(np.float32)).max() / 9
    assert max(sizes[1:]) < 0.95 * sizes[0]
    assert (writer.events("stored"), reader.events("loaded")) == (1, 1)
    found = [codec.parse_header(blob) for blob in kv_objects.fetch(
        shared.store, layout, [ref.hash for ref in codec.chunk_refs(layout, pages(layout, 16, 5)[0])]
    )]  # fmt: skip
    (profile_id,) = {header.profile_id for header in found}
    profile = reader.client.namespace(layout).load_profile(profile_id)
    assert profile is not None
    assert (profile.kind, profile.metadata["tokens"]) == (codec.ProfileKind.STATISTICS, 1024)
    seen = [pages(layout, 16, seed)[1] for seed in range(4)]
    same = codec.learn_statistics(
        [(kv[:, :, at : at + CHUNK], at) for kv in seen for at in range(0, 16 * CHUNK, CHUNK)], layout
    )
    assert same.profile_id == profile_id


def test_it_learns_of_lossy_puts_that_are_new_and_copies_what_it_learns_of(
    shared: NodeProcess, caller: Callable[..., Caller], layout: KVLayout
) -> None:
    writer = caller(shared.address, strict=True)
    cache = writer.client.namespace(layout, learn_statistics=True)
    cache.put(*pages(layout, 70, 10), quality="lossless")
    for _ in range(3):
        cache.put(*pages(layout, 30, 11))  # the same: 480 tokens
    tokens, kv = pages(layout, 40, 12)
    engine = kv.copy()
    assert writer.events("learned") == 0
    cache.put(tokens, engine, first_token=0)
    engine[...] = 0
    learned(writer)
    cache.put(*pages(layout, 1, 13))
    (blob,) = kv_objects.fetch(
        shared.store, layout, [ref.hash for ref in codec.chunk_refs(layout, pages(layout, 1, 13)[0])]
    )
    sample = [(pages(layout, 30, 11)[1], 30), (kv, 34)]
    chunks = [(made[:, :, i : i + CHUNK], i) for made, n in sample for i in range(0, n * CHUNK, CHUNK)]
    assert codec.parse_header(blob).profile_id == codec.learn_statistics(chunks, layout).profile_id


def test_what_teaches_nothing_is_counted_and_done_without(
    shared: NodeProcess, caller: Callable[..., Caller], layout: KVLayout, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def learn_nothing(chunks: Any, layout: KVLayout) -> Profile:
        raise codec.ProfileError("no token to learn from")

    monkeypatch.setattr(codec, "learn_statistics", learn_nothing)
    writer = caller(shared.address, strict=True)
    cache = learning(writer, layout)
    wait_until(lambda: writer.counted("failures", call="learn", reason="structure") == 1, "it gave up")
    assert cache.put(*pages(layout, 64, 9)).stored == 64
    assert writer.events("learned") == 0
    assert [line.split(": ")[:2] for line in logged(caplog)] == [["learn", "structure"]]


def test_learned_statistics_that_are_refused_are_done_without(
    caller: Callable[..., Caller], layout: KVLayout, caplog: pytest.LogCaptureFixture
) -> None:
    with HostileServer(lookup=holds_nothing, put=refuses_profiles) as server:
        lenient = caller(server.address)
        cache = learning(lenient, layout)
        learned(lenient)
        for _ in range(2):
            assert cache.put(*pages(layout, 4, 9)).stored == 4
        assert [line.split(": ")[:2] for line in logged(caplog)] == [["put", "refused"]]
        strict = caller(server.address, strict=True)
        cache = learning(strict, layout)
        learned(strict)
        with pytest.raises(RequestRefused, match="does not store the profile"):
            cache.put(*pages(layout, 4, 9))


def test_large_objects_wait_while_their_profile_is_loaded(start_node: StartNode, caller: Callable[..., Caller]) -> None:
    """Both travel on one connection: what has been sent of the objects must not keep the profile from coming."""
    node = start_node("--host-capacity", "256MiB")
    layout = KVLayout.uniform(
        model=next(names), revision="r", num_layers=8, kv_heads=8, head_dim=128, dtype="float16", chunk_tokens=64
    )
    tokens, kv = [*range(40 * 64)], random_kv(layout, 40 * 64, 1)
    writer, reader = caller(node.address, strict=True), caller(node.address, strict=True)
    cache = writer.client.namespace(layout, learn_statistics=True)
    cache.put(tokens[: 16 * 64], kv[:, :, : 16 * 64])
    learned(writer)
    put = cache.put([5, *tokens[1:]], kv)
    assert (put.stored, put.bytes > 8 << 20) == (40, True)
    assert reader.client.namespace(layout).get([5, *tokens[1:]])[1] == len(tokens)
    assert reader.events("loaded") == 1
