"""Gets that start behind what the caller has: the same values, from there on, and nothing else travels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kv_objects import small_layout
from kv_strategies import bits, random_kv
from node_process import NodeProcess
from prometheus_client import CollectorRegistry

from kvstore_client import Client, InvalidArgument, KVLayout
from kvstore_client.transports.bulk_path import Transport
from kvstore_cluster.placement import rank
from kvstore_codec import PagedKV, chunk_refs

DEADLINE_S = 20.0
CHUNKS = 6
names = (f"later-{number}" for number in itertools.count())
PLANNED: dict[str, Any] = {"ttft": DEADLINE_S, "prefill_tokens_per_s": 1.0}


def stored(shared: NodeProcess) -> tuple[KVLayout, list[int], Any]:
    layout = small_layout(next(names))
    tokens = list(range(CHUNKS * layout.chunk_tokens + 5))
    kv = random_kv(layout, len(tokens), 1)
    with Client(shared.address, strict=True, deadline=DEADLINE_S, registry=CollectorRegistry()) as client:
        assert client.namespace(layout).put(tokens, kv, quality="lossless").stored == CHUNKS
    return layout, tokens, kv


@pytest.mark.parametrize("arguments", [{}, PLANNED], ids=["whole", "planned"])
@pytest.mark.parametrize("transport", ["grpc", "tcp", "shm"])
def test_the_tokens_from_there_on(shared: NodeProcess, transport: Transport, arguments: dict[str, Any]) -> None:
    layout, tokens, kv = stored(shared)
    size, registry = layout.chunk_tokens, CollectorRegistry()
    with Client(shared.address, transport=transport, strict=True, deadline=DEADLINE_S, registry=registry) as client:
        cache = client.namespace(layout)
        objects = [chunk.stored_bytes for chunk in cache.lookup(tokens, lease_ms=0).chunks]
        got, n = cache.get(tokens, first_token=2 * size, **arguments)
        assert n == 4 * size
        assert not registry.get_sample_value("kvstore_client_tokens_total", {"outcome": "miss"})
        assert bits(got) == bits(kv[:, :, 2 * size : CHUNKS * size])
        assert registry.get_sample_value("kvstore_client_stream_bytes_total", {"direction": "in"}) == sum(objects[2:])
        room = np.zeros_like(kv[:, :, : 3 * size])
        got, n = cache.get(tokens, first_token=size, out=room, **arguments)
        assert n == 3 * size
        assert bits(room) == bits(kv[:, :, size : 4 * size])
        assert cache.get(tokens, first_token=CHUNKS * size, **arguments)[1] == 0


def test_what_is_before_need_not_be_stored(shared: NodeProcess) -> None:
    layout, tokens, kv = stored(shared)
    size = layout.chunk_tokens
    other = small_layout(next(names))
    with Client(shared.address, strict=True, deadline=DEADLINE_S, registry=CollectorRegistry()) as client:
        cache = client.namespace(other)
        assert cache.put(tokens, kv[:, :, 2 * size :], first_token=2 * size, quality="raw").stored == CHUNKS - 2
        assert cache.get(tokens)[1] == 0
        got, n = cache.get(tokens, first_token=2 * size)
    assert n == (CHUNKS - 2) * size
    assert bits(got) == bits(kv[:, :, 2 * size : CHUNKS * size])


def test_into_the_pages_of_an_engine(shared: NodeProcess) -> None:
    layout, tokens, kv = stored(shared)
    size = layout.chunk_tokens
    pages = [(np.zeros((9, 8, 2, 16), np.float16), np.zeros((9, 8, 2, 16), np.float16)) for _ in range(2)]
    with Client(shared.address, strict=True, deadline=DEADLINE_S, registry=CollectorRegistry()) as client:
        _, n = client.namespace(layout).get(
            tokens, first_token=4 * size, out=PagedKV(pages, [7, 3, 5, 1], 2 * size), min_quality="lossless"
        )  # fmt: skip
    assert n == 2 * size
    found = np.stack([np.stack([np.concatenate([plane[b] for b in (7, 3, 5, 1)]) for plane in kv]) for kv in pages])
    assert bits(found) == bits(kv[:, :, 4 * size : 6 * size])


def test_through_a_sidecar_from_where_the_whole_prompt_is_placed(
    start_node: Callable[..., NodeProcess], shared: NodeProcess
) -> None:
    """By the hash of its first chunk, though that is not read: of two nodes upstream, the other one has nothing."""
    both = [shared.address, start_node("--host-capacity", "16MiB").address]
    tokens = list(range(CHUNKS * small_layout().chunk_tokens))

    def places(layout: KVLayout) -> list[str]:
        refs = chunk_refs(layout, tokens)
        return [next(iter(rank(both, layout.namespace_id + ref.hash))) for ref in (refs[0], refs[3])]

    layout = next(each for each in map(small_layout, names) if len(set(places(each))) == 2)
    size, kv = layout.chunk_tokens, random_kv(layout, len(tokens), 1)
    sidecar = start_node("--upstream", ",".join(both), "--host-capacity", "16MiB", role="sidecar")
    with Client(both, strict=True, deadline=DEADLINE_S, registry=CollectorRegistry()) as client:
        assert client.namespace(layout).put(tokens, kv, quality="lossless").stored == CHUNKS
    with Client(sidecar.address, strict=True, deadline=DEADLINE_S, registry=CollectorRegistry()) as client:
        cache = client.namespace(layout)
        assert cache.lookup(tokens, first_token=3 * size, lease_ms=0).tokens == len(tokens)
        got, n = cache.get(tokens, first_token=3 * size)
    assert n == 3 * size
    assert bits(got) == bits(kv[:, :, 3 * size :])


@pytest.mark.parametrize("arguments", [{"first_token": 7}, {"first_token": -16}, {"first_token": 16, "refine": True}])
def test_nonsense_is_refused(shared: NodeProcess, arguments: dict[str, Any]) -> None:
    with (
        Client(shared.address, strict=True, registry=CollectorRegistry()) as client,
        pytest.raises(InvalidArgument, match=r"first token|first_token"),
    ):  # fmt: skip
        client.namespace(small_layout(next(names))).get([1] * 64, **arguments)
