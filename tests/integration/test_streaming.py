"""Layer streaming against a real node: who follows a writer gets what a get returns later, as it is written."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import live_writer
import numpy as np
import pytest
import torch
from kv_objects import small_layout
from kv_strategies import bits, random_kv
from node_process import NodeProcess, clean_environment
from polling import wait_until
from prometheus_client import CollectorRegistry

from kvstore_client import (
    AsyncClient,
    Client,
    InvalidArgument,
    KVLayout,
    LayerSpec,
    LayoutError,
    Partition,
    Quality,
    RoPE,
    Stream,
    Unavailable,
    ValuesError,
)

StartNode = Callable[..., NodeProcess]
LAYERS, CHUNK = 6, 16
DEADLINE_S = 30.0  # of what is not about time
SOON_S = 10.0  # far below DEADLINE_S, far above what a busy machine needs
QUALITIES = [quality.label for quality in Quality]
names = iter(range(1000))


class Prompt:
    """Some tokens and their KV, in a namespace of their own."""

    def __init__(self, tokens: int = 3 * CHUNK + 5, *, layout: KVLayout | None = None) -> None:
        number = next(names)
        self.layout = layout or small_layout(f"stream-{number}", layers=LAYERS)
        self.tokens = [number + position for position in range(tokens)]
        self.kv = random_kv(self.layout, tokens, seed=number)

    def write(self, layers: range, writer: Any) -> None:
        for layer in layers:
            writer.write(layer, self.kv[layer][0], self.kv[layer][1])


def taken(stream: Stream) -> dict[int, tuple[Any, Any]]:
    """Copies of the layers, as they came."""
    layers: dict[int, tuple[Any, Any]] = {}
    for layer, k, v in stream:
        assert layer == len(layers)
        assert len(k) == len(v) == stream.tokens
        layers[layer] = np.array(k), np.array(v)
    assert stream.layers == len(layers)
    return layers


def same(layers: dict[int, tuple[Any, Any]], kv: Any, tokens: int) -> bool:
    return all(bits([pair]) == bits([(kv[layer][0][:tokens], kv[layer][1][:tokens])]) for layer, pair in layers.items())


@pytest.mark.parametrize("quality", QUALITIES)
def test_a_reader_that_was_first_gets_each_layer_before_the_next_is_written(client: Client, quality: str) -> None:
    prompt = Prompt()
    cache = client.namespace(prompt.layout)
    stream = cache.stream(prompt.tokens, wait=DEADLINE_S)
    layers = []
    with ThreadPoolExecutor(1) as threads, cache.writer(prompt.tokens, quality=quality) as writer:
        first = threads.submit(next, stream)
        for layer in range(LAYERS):
            prompt.write(range(layer, layer + 1), writer)
            layers.append(first.result() if layer == 0 else next(stream))  # the next one is not written yet
    assert [layer for layer, _, _ in layers] == list(range(LAYERS))
    assert next(stream, None) is None
    assert (stream.tokens, stream.complete, stream.reason) == (3 * CHUNK, True, "")
    assert writer.result is not None
    assert (writer.result.stored, writer.result.tokens) == (3, 3 * CHUNK)
    kv, tokens = cache.get(prompt.tokens)
    assert tokens == 3 * CHUNK
    assert same({layer: (k, v) for layer, k, v in layers}, kv, tokens)
    if Quality.parse(quality).exact:
        assert same({layer: (k, v) for layer, k, v in layers}, prompt.kv, tokens)
    hit = cache.lookup(prompt.tokens)
    assert {chunk.quality.label for chunk in hit.chunks} == {quality}


def test_who_joins_late_and_who_comes_after_get_everything(client: Client) -> None:
    prompt = Prompt()
    cache = client.namespace(prompt.layout)
    with cache.writer(prompt.tokens) as writer:
        prompt.write(range(4), writer)
        with ThreadPoolExecutor(2) as threads:
            late = [threads.submit(taken, cache.stream(prompt.tokens, wait=DEADLINE_S)) for _ in range(2)]
            prompt.write(range(4, LAYERS), writer)
            came = [each.result() for each in late]
    kv, tokens = cache.get(prompt.tokens)
    after = cache.stream(prompt.tokens)
    came.append(taken(after))
    assert after.complete
    for layers in came:
        assert len(layers) == LAYERS
        assert same(layers, kv, tokens)
    lower = taken(cache.stream(prompt.tokens, quality="low"))
    assert same(lower, cache.get(prompt.tokens, quality="low")[0], tokens)


def test_a_growing_prompt_streams_what_is_stored_and_what_is_new(client: Client) -> None:
    prompt = Prompt(5 * CHUNK)
    cache = client.namespace(prompt.layout)
    cache.put(prompt.tokens[: 2 * CHUNK], prompt.kv[:, :, : 2 * CHUNK], quality="lossless")
    whole, longer, other = (cache.stream(tokens, wait=DEADLINE_S) for tokens in (
        prompt.tokens, [*prompt.tokens, *range(1000, 1000 + CHUNK)], [*prompt.tokens[: 4 * CHUNK], *[9] * CHUNK],
    ))  # fmt: skip
    with ThreadPoolExecutor(3) as threads:
        readers = [threads.submit(taken, stream) for stream in (whole, longer, other)]
        with cache.writer(prompt.tokens, quality="lossless", first_token=CHUNK) as writer:
            for layer in range(LAYERS):
                k, v = prompt.kv[layer, :, CHUNK:]
                writer.write(layer, torch.from_numpy(k), torch.from_numpy(v))
        came = [reader.result() for reader in readers]
    assert [stream.tokens for stream in (whole, longer, other)] == [5 * CHUNK, 5 * CHUNK, 4 * CHUNK]
    assert [stream.reason for stream in (whole, longer, other)] == ["", "absent", "absent"]
    assert all(stream.complete for stream in (whole, longer, other))
    for layers, tokens in zip(came, (5 * CHUNK, 5 * CHUNK, 4 * CHUNK), strict=True):
        assert same(layers, prompt.kv, tokens)
    assert writer.result is not None
    assert (writer.result.have, writer.result.stored, writer.result.tokens) == (1, 3, 5 * CHUNK)


def test_what_an_aborted_writer_wrote_ends_its_readers_at_once(client: Client) -> None:
    prompt = Prompt()
    cache = client.namespace(prompt.layout)
    stream = cache.stream(prompt.tokens, wait=DEADLINE_S)
    writer = cache.writer(prompt.tokens, quality="raw")

    def give_up() -> None:
        with writer:
            prompt.write(range(2), writer)
            wait_until(lambda: stream.layers == 2, "the reader has what was written")
            raise KeyError("the engine gave up")

    with ThreadPoolExecutor(1) as threads:
        reader = threads.submit(taken, stream)
        with pytest.raises(KeyError):
            give_up()
        layers = reader.result(SOON_S)
    assert (len(layers), stream.complete, stream.reason) == (2, False, "aborted")
    assert same(layers, prompt.kv, stream.tokens)
    assert writer.result is None
    assert cache.get(prompt.tokens)[1] == 0
    assert client.stat().staged_bytes == 0


def test_a_writer_that_dies_before_its_first_layer_leaves_what_is_stored(client: Client) -> None:
    prompt = Prompt()
    cache = client.namespace(prompt.layout)
    cache.put(prompt.tokens[:CHUNK], prompt.kv[:, :, :CHUNK], quality="raw")
    stream = cache.stream(prompt.tokens, wait=DEADLINE_S)
    with ThreadPoolExecutor(1) as threads:
        reader = threads.submit(taken, stream)
        with pytest.raises(InvalidArgument, match="before its last layer"), cache.writer(prompt.tokens):
            wait_until(lambda: client.stat().counters.get("live_follows.found", 0) > 0, "the reader follows")
        layers = reader.result(SOON_S)
    assert (stream.tokens, stream.complete) == (CHUNK, True)
    assert same(layers, prompt.kv, CHUNK)


def test_a_killed_writer_ends_its_readers_at_once(start_node: StartNode) -> None:
    node = start_node()
    layout, tokens = live_writer.LAYOUT, live_writer.TOKENS
    with Client(node.address, deadline=DEADLINE_S, registry=CollectorRegistry()) as client:
        cache = client.namespace(layout)
        stream = cache.stream(tokens, wait=DEADLINE_S)
        writer = subprocess.Popen(
            [sys.executable, live_writer.__file__, node.address, "3"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=clean_environment(),
        )  # fmt: skip
        try:
            layers = {layer: (np.array(k), np.array(v)) for layer, k, v in (next(stream) for _ in range(3))}
            began = time.monotonic()
            writer.kill()
            assert next(stream, None) is None
            assert time.monotonic() - began < SOON_S
        finally:
            writer.kill()
            writer.communicate()
        assert (stream.layers, stream.complete, stream.reason) == (3, False, "aborted")
        wait_until(lambda: client.stat().staged_bytes == 0, "what the dead writer held is free")
        again = cache.stream(tokens)
        assert taken(again) == {}
        assert again.reason == "absent"
        with cache.writer(tokens) as second:
            for layer in range(layout.num_layers):
                second.write(layer, live_writer.KV[layer, 0], live_writer.KV[layer, 1])
        assert same(layers, cache.get(tokens)[0], len(tokens))


@pytest.mark.parametrize("strict", [False, True])
def test_a_killed_node_ends_its_readers_and_rejects_the_writers_chunks(start_node: StartNode, strict: bool) -> None:
    node = start_node()
    prompt = Prompt()
    with (
        Client(node.address, deadline=DEADLINE_S, strict=strict, registry=CollectorRegistry()) as reading,
        Client(node.address, deadline=5.0, registry=CollectorRegistry()) as writing,
    ):
        stream = reading.namespace(prompt.layout).stream(prompt.tokens, wait=DEADLINE_S)
        cache = writing.namespace(prompt.layout)
        with cache.writer(prompt.tokens) as writer, ThreadPoolExecutor(1) as threads:
            first = threads.submit(next, stream)
            prompt.write(range(1), writer)
            first.result()
            node.kill()
            if strict:
                with pytest.raises(Unavailable):
                    next(stream)
            else:
                assert next(stream, None) is None
            assert (stream.complete, stream.reason) == (False, "unavailable")
            prompt.write(range(1, LAYERS), writer)
    assert writer.result is not None
    assert (writer.result.rejected, writer.result.stored) == (3, 0)


def test_nobody_waits_beyond_the_wait(client: Client) -> None:
    prompt = Prompt()
    cache = client.namespace(prompt.layout)
    for wait, tokens in ((0.0, prompt.tokens), (0.2, prompt.tokens), (DEADLINE_S, prompt.tokens[: CHUNK - 1])):
        began = time.monotonic()
        stream = cache.stream(tokens, wait=wait)
        assert taken(stream) == {}
        assert time.monotonic() - began < SOON_S
        assert not stream.complete
    assert client.stat().staged_bytes == 0


def test_a_put_ends_the_wait_too(client: Client) -> None:
    prompt = Prompt()
    cache = client.namespace(prompt.layout)
    stream = cache.stream(prompt.tokens, wait=DEADLINE_S, min_quality="lossless")
    with ThreadPoolExecutor(1) as threads:
        reader = threads.submit(taken, stream)
        cache.put(prompt.tokens, prompt.kv, quality="high")  # not good enough
        cache.put(prompt.tokens, prompt.kv, quality="lossless")
        assert same(reader.result(SOON_S), prompt.kv, 3 * CHUNK)
    assert stream.complete


def test_a_writer_of_too_low_a_quality_is_not_followed(client: Client) -> None:
    prompt = Prompt()
    cache = client.namespace(prompt.layout)
    with cache.writer(prompt.tokens, quality="high", provenance="medium") as writer:
        prompt.write(range(LAYERS), writer)
        assert taken(cache.stream(prompt.tokens, min_quality="high")) == {}
        followed = cache.stream(prompt.tokens, min_quality="medium")
        assert len(taken(followed)) == LAYERS
    stream = cache.stream(prompt.tokens, min_quality="high")
    assert taken(stream) == {}
    assert stream.reason == "quality"


def test_a_slow_reader_holds_up_nobody_and_gets_everything(start_node: StartNode) -> None:
    """Layers of 4 MiB: far more than the transport buffers."""
    node = start_node("--host-capacity", "256MiB")
    layout = KVLayout.uniform(model="slow", revision="1", num_layers=8, kv_heads=8, head_dim=256, chunk_tokens=512)
    kv = random_kv(layout, 512, seed=1)
    tokens = list(range(512))
    with Client(node.address, deadline=DEADLINE_S, strict=True, registry=CollectorRegistry()) as client:
        cache = client.namespace(layout)
        stream = cache.stream(tokens, wait=DEADLINE_S)
        with ThreadPoolExecutor(1) as threads, cache.writer(tokens, quality="raw") as writer:
            first = threads.submit(next, stream)
            for layer in range(8):
                writer.write(layer, kv[layer, 0], kv[layer, 1])
            assert first.result()[0] == 0
        assert writer.result is not None  # it has long ended
        assert writer.result.stored == 1
        rest = {layer: (k, v) for layer, k, v in stream}
        assert list(rest) == list(range(1, 8))
        assert same(rest, kv, 512)
        assert stream.complete
        wait_until(lambda: client.stat().staged_bytes == 0, "nothing is held for nobody")


def test_a_reader_that_is_dropped_lets_go(client: Client) -> None:
    prompt = Prompt()
    cache = client.namespace(prompt.layout)
    held = client.stat().staged_bytes
    assert held == 0
    with cache.writer(prompt.tokens) as writer:
        prompt.write(range(LAYERS), writer)
        for _ in cache.stream(prompt.tokens):
            break
        closed = cache.stream(prompt.tokens)
        next(closed)
        closed.close()
        closed.close()
        assert next(closed, None) is None
    wait_until(lambda: client.stat().staged_bytes == 0, "the node holds nothing for a reader that is gone")


def test_parts_tails_and_layers_of_different_shapes(client: Client) -> None:
    layers = tuple(LayerSpec(2 * (1 + layer % 2), 16, 8, rope=RoPE(10000.0)) for layer in range(4))
    number = next(names)
    layout = KVLayout(f"stream-{number}", "r", "float32", CHUNK, layers, Partition(2, 2))
    tokens = list(range(2 * CHUNK + 3))
    for part in range(4):
        kv = random_kv(layout.part_layout(part), len(tokens), seed=part)
        cache = client.namespace(layout, part=part, tail=True)
        with cache.writer(tokens, quality="medium") as writer:
            for layer, (k, v) in enumerate(kv):
                writer.write(layer, k, v)
            streamed = taken(cache.stream(tokens))
        got, n = cache.get(tokens)
        assert (len(streamed), n) == (2, len(tokens))
        assert same(streamed, got, n)


def test_with_a_profile_what_is_stored_is_coded_with_it(client: Client) -> None:
    """What is streamed meanwhile has the quality, not the very values: a profile may code several layers as one."""
    prompt = Prompt(64 * CHUNK)
    cache = client.namespace(prompt.layout, learn_statistics=True)
    cache.put(prompt.tokens, prompt.kv)
    wait_until(lambda: cache._async._profiles._own is not None, "a profile is learned")
    other = [token + 1 for token in prompt.tokens[: 2 * CHUNK]]
    kv = prompt.kv[:, :, : 2 * CHUNK]
    with cache.writer(other) as writer:
        for layer in range(LAYERS):
            writer.write(layer, kv[layer, 0], kv[layer, 1])
        streamed = taken(cache.stream(other))
    assert writer.result is not None
    assert writer.result.stored == 2
    got, n = cache.get(other)
    assert n == 2 * CHUNK
    for layer, (k, v) in streamed.items():
        for mine, stored, exact in ((k, got[layer, 0], kv[layer, 0]), (v, got[layer, 1], kv[layer, 1])):
            scale = np.abs(exact.astype(np.float64)).max() + 1e-3
            assert np.abs(mine.astype(np.float64) - exact).max() < 0.2 * scale
            assert np.abs(stored.astype(np.float64) - exact).max() < 0.2 * scale


def test_a_node_without_room_stores_what_it_cannot_hand_on(start_node: StartNode) -> None:
    """Live writes take at most half of the room in flight, so that the put at their end has the other."""
    node = start_node("--staged-bytes-max", "44KiB")
    prompt = Prompt()
    assert 22 << 10 < prompt.kv[:, :, : 3 * CHUNK].nbytes < 44 << 10
    registry = CollectorRegistry()
    with Client(node.address, deadline=DEADLINE_S, registry=registry) as client:
        cache = client.namespace(prompt.layout)
        with cache.writer(prompt.tokens, quality="raw") as writer:
            prompt.write(range(LAYERS), writer)
        assert writer.result is not None
        assert writer.result.stored == 3
        assert registry.get_sample_value("kvstore_client_failures_total", {"call": "writer", "reason": "limit"}) == 1
        assert client.stat().staged_bytes == 0
        assert same(taken(cache.stream(prompt.tokens)), prompt.kv, 3 * CHUNK)


def test_mistakes_of_a_writer_are_raised_and_abort_it(client: Client) -> None:
    prompt = Prompt()
    cache = client.namespace(prompt.layout)
    k, v = prompt.kv[0]
    with pytest.raises(InvalidArgument, match="first_token"):
        cache.writer(prompt.tokens, first_token=1)
    with pytest.raises(InvalidArgument, match="inside"):
        cache.writer(prompt.tokens).write(0, k, v)
    for wrong, error in (
        ((1, k, v), InvalidArgument),
        ((0, k[1:], v[1:]), InvalidArgument),
        ((0, k, v[:, :1]), LayoutError),
    ):
        with pytest.raises(error), cache.writer(prompt.tokens) as writer:
            writer.write(*wrong)
    bad = Prompt(layout=prompt.layout)
    bad.kv[2, 0] = np.nan
    with pytest.raises(ValuesError), cache.writer(prompt.tokens) as writer:
        bad.write(range(LAYERS), writer)
    with pytest.raises(InvalidArgument):
        cache.stream(prompt.tokens, wait=-1.0)
    with pytest.raises(InvalidArgument):
        cache.stream(prompt.tokens, quality="low", min_quality="high")
    assert cache.get(prompt.tokens)[1] == 0
    wait_until(lambda: client.stat().staged_bytes == 0, "aborted writers hold nothing")


def test_a_writer_of_what_is_stored_writes_nothing(client: Client) -> None:
    prompt = Prompt()
    cache = client.namespace(prompt.layout)
    cache.put(prompt.tokens, prompt.kv, quality="lossless")
    with cache.writer(prompt.tokens) as writer:
        prompt.write(range(LAYERS), writer)
    assert writer.result is not None
    assert (writer.result.have, writer.result.tokens, writer.result.stored) == (3, 3 * CHUNK, 0)
    with cache.writer(prompt.tokens[: CHUNK - 1]) as nothing:
        for layer in range(LAYERS):
            nothing.write(layer, *prompt.kv[layer, :, : CHUNK - 1])
    assert nothing.result is not None
    assert nothing.result.tokens == 0


async def test_the_asynchronous_twins(shared: NodeProcess) -> None:
    prompt = Prompt()
    async with AsyncClient(shared.address, deadline=DEADLINE_S, strict=True, registry=CollectorRegistry()) as client:
        cache = client.namespace(prompt.layout)

        async def read() -> dict[int, tuple[Any, Any]]:
            return {layer: (k, v) async for layer, k, v in cache.stream(prompt.tokens, wait=DEADLINE_S)}

        reading = asyncio.create_task(read())
        async with cache.writer(prompt.tokens, quality="raw") as writer:
            for layer in range(LAYERS):
                await writer.write(layer, *prompt.kv[layer])
        layers = await asyncio.wait_for(reading, SOON_S)
        assert writer.result is not None
    assert len(layers) == LAYERS
    assert same(layers, prompt.kv, 3 * CHUNK)


def test_a_node_that_stops_does_not_wait_for_those_who_wait(start_node: StartNode) -> None:
    node = start_node("--shutdown-grace-s", "60", "--metrics-listen", "127.0.0.1:0")
    prompt = Prompt()
    with Client(node.address, deadline=DEADLINE_S, registry=CollectorRegistry()) as client:
        stream = client.namespace(prompt.layout).stream(prompt.tokens, wait=60)
        with ThreadPoolExecutor(1) as threads:
            reader = threads.submit(taken, stream)
            wait_until(lambda: "kvstore_rpcs_in_flight 1.0" in node.metrics(), "the reader waits")
            assert node.stop() == 0
            assert reader.result(SOON_S) == {}
