"""plan() and planned gets against a real node, over loopback and over shaped links: those by gRPC, since a bulk path
would go past them."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from kv_strategies import bits
from node_process import NodeProcess
from prometheus_client import CollectorRegistry
from shaped_relay import ShapedRelay

import kvstore_codec as codec
from kvstore_client import AsyncClient, Client, InvalidArgument, KVLayout, PrefillCost, Quality
from kvstore_client.fetching import Fetched
from kvstore_client.planned import NamespacePlanner

CHUNK, CHUNKS = 64, 12
TOKENS = CHUNK * CHUNKS
DEADLINE_S = 30.0
SLOW_ENGINE = 1.0  # tokens a second: anything is faster than recomputing
names = (f"planner-{number}" for number in itertools.count())


@pytest.fixture
def relay(node: NodeProcess) -> Iterator[Callable[..., ShapedRelay]]:
    made: list[ShapedRelay] = []

    def make(bytes_per_s: float, latency_s: float = 0.0) -> ShapedRelay:
        made.append(ShapedRelay(int(node.address.rpartition(":")[2]), bytes_per_s, latency_s))
        return made[-1]

    yield make
    for each in made:
        each.close()


def stored(node: NodeProcess, quality: str = "high") -> tuple[KVLayout, list[int], Any]:
    """A prompt of 12 chunks, of 1 MiB raw each, that the node holds at `quality`."""
    layout = KVLayout.uniform(
        model=next(names), revision="r", num_layers=16, kv_heads=8, head_dim=64, dtype="float16", chunk_tokens=CHUNK,
    )  # fmt: skip
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, 50_000, TOKENS)]
    kv = np.random.default_rng(1).standard_normal((16, 2, TOKENS, 8, 64), dtype=np.float32).astype(np.float16)
    with Client(node.address, deadline=DEADLINE_S, strict=True, registry=CollectorRegistry()) as client:
        assert client.namespace(layout).put(tokens, kv, quality=quality).tokens == TOKENS
    return layout, tokens, kv


def qualities(layout: KVLayout, kv: Any, got: Any, stored: str = "high") -> list[str]:
    """At which quality each chunk was read: every value must be that of one of them."""
    found = []
    for first in range(0, got.shape[2], CHUNK):
        blob = codec.encode(kv[:, :, first : first + CHUNK], layout, quality=stored, first_position=first)
        read = {
            quality.label: bits(codec.decode(codec.truncate(blob, quality), layout))
            for quality in Quality
            if quality >= Quality.parse(stored) and (not quality.exact or stored == quality.label)
        }
        found.append(next(label for label, value in read.items() if value == bits(got[:, :, first : first + CHUNK])))
    return found


def test_a_plan_of_what_is_not_stored_is_to_recompute(node: NodeProcess, registry: CollectorRegistry) -> None:
    layout, tokens, _ = stored(node)
    with Client(node.address, strict=True, registry=registry, deadline=DEADLINE_S) as client:
        plan = client.namespace(layout).plan([9, *tokens], ttft=1.0, prefill_tokens_per_s=1000)
    assert (plan.stored_tokens, plan.fetched_tokens) == (0, 0)
    assert plan.ttft_s == plan.recompute_s == pytest.approx((TOKENS + 1) / 1000)
    assert "stored" in plan.reason


def test_a_plan_covers_what_is_stored_and_knows_the_peer_after_a_get(
    node: NodeProcess, registry: CollectorRegistry
) -> None:
    layout, tokens, _ = stored(node)
    with Client(node.address, strict=True, registry=registry, deadline=DEADLINE_S) as client:
        cache = client.namespace(layout)
        engine = PrefillCost(SLOW_ENGINE, growth=1e-3)
        guess = cache.plan([*tokens, 1, 2, 3], ttft=5000, prefill_tokens_per_s=engine)
        assert guess.probe
        assert guess.stored_tokens == guess.fetched_tokens == TOKENS
        assert guess.ttft_s > engine(TOKENS, TOKENS + 3)
        assert guess.meets_goal
        cache.get(tokens)
        known = cache.plan([*tokens, 1, 2, 3], ttft=5000, prefill_tokens_per_s=engine)
        assert not known.probe
        assert known.quality is Quality.HIGH
        assert known.speeds.bytes_per_s != guess.speeds.bytes_per_s
        hit = cache.lookup(tokens, lease_ms=0)
        assert known.fetched_bytes == sum(chunk.stored_bytes for chunk in hit.chunks)


def test_a_get_with_time_enough_measures_and_then_reads_the_finest(
    node: NodeProcess, registry: CollectorRegistry
) -> None:
    layout, tokens, kv = stored(node)
    with Client(node.address, strict=True, registry=registry, deadline=DEADLINE_S) as client:
        cache = client.namespace(layout)
        first, n = cache.get(tokens, ttft=DEADLINE_S, prefill_tokens_per_s=SLOW_ENGINE)
        again, m = cache.get(tokens, ttft=DEADLINE_S, prefill_tokens_per_s=SLOW_ENGINE)
    assert n == m == TOKENS
    assert qualities(layout, kv, first) == ["high"] * CHUNKS, "what it measured by was made finer behind"
    assert qualities(layout, kv, again) == ["high"] * CHUNKS


def test_a_slow_link_and_a_short_deadline_bring_the_coarsest(
    node: NodeProcess, relay: Callable[..., ShapedRelay], registry: CollectorRegistry
) -> None:
    layout, tokens, kv = stored(node)
    link = relay(4e6)
    with Client(link.address, transport="grpc", strict=True, registry=registry, deadline=DEADLINE_S) as client:
        got, n = client.namespace(layout).get(tokens, ttft=0.1, prefill_tokens_per_s=SLOW_ENGINE)
    assert n == TOKENS
    assert qualities(layout, kv, got) == ["low"] * CHUNKS


def test_no_coarser_than_min_quality_and_no_finer_than_quality(
    node: NodeProcess, relay: Callable[..., ShapedRelay], registry: CollectorRegistry
) -> None:
    layout, tokens, kv = stored(node)
    with Client(relay(2e7).address, transport="grpc", strict=True, registry=registry, deadline=DEADLINE_S) as client:
        cache = client.namespace(layout)
        short, _ = cache.get(tokens, ttft=0.001, prefill_tokens_per_s=SLOW_ENGINE, min_quality="medium")
        long, _ = cache.get(tokens, ttft=DEADLINE_S, prefill_tokens_per_s=SLOW_ENGINE, quality="medium")
    assert qualities(layout, kv, short) == ["medium"] * CHUNKS
    assert qualities(layout, kv, long) == ["medium"] * CHUNKS


def test_where_recomputing_is_faster_nothing_is_fetched_and_that_is_remembered(
    node: NodeProcess, relay: Callable[..., ShapedRelay], registry: CollectorRegistry
) -> None:
    layout, tokens, _ = stored(node)
    computing_s = 5.0
    with Client(relay(2e5).address, transport="grpc", strict=True, registry=registry, deadline=DEADLINE_S) as client:
        cache = client.namespace(layout)
        gets = 0
        while gets < 20:
            gets += 1
            _, n = cache.get(tokens, ttft=computing_s, prefill_tokens_per_s=TOKENS / computing_s)
            assert n == 0
            plan = cache.plan(tokens, ttft=computing_s, prefill_tokens_per_s=TOKENS / computing_s)
            if not plan.probe and not plan.fetched_tokens:
                break  # on a busy machine one get may not have seen enough of the link
        assert not plan.probe
        assert plan.fetched_tokens == 0
        assert plan.reason.startswith("recompute")
    missed = registry.get_sample_value("kvstore_client_misses_total", {"reason": "slower"})
    assert missed == gets
    assert not registry.get_sample_value("kvstore_client_failures_total", {"call": "get", "reason": "deadline"})


def test_a_link_that_stalls_leaves_an_intact_prefix_long_before_the_deadline(
    node: NodeProcess, relay: Callable[..., ShapedRelay], registry: CollectorRegistry
) -> None:
    layout, tokens, kv = stored(node)
    link = relay(3e6)
    out = np.zeros_like(kv)
    with Client(link.address, transport="grpc", strict=True, registry=registry, deadline=120) as client:
        cache = client.namespace(layout)
        cache.get(tokens[:CHUNK])
        began = time.monotonic()
        link.set_rate(2e6)
        timer = threading.Timer(0.3, link.set_rate, [0.0])
        timer.start()
        got, n = cache.get(tokens, out=out, ttft=1.5, prefill_tokens_per_s=TOKENS / 6)
        waited_s = time.monotonic() - began
        timer.join()
    assert n < TOKENS
    assert waited_s < 60
    assert got.shape[2] == n
    assert len(qualities(layout, kv, got)) == n // CHUNK


def test_a_link_that_loses_most_of_its_rate_costs_quality_and_not_the_deadline(
    node: NodeProcess, relay: Callable[..., ShapedRelay], registry: CollectorRegistry
) -> None:
    """Coarsest, all chunks are 4.5 MB and take 1.1 s; one that is still to come when the link slows down takes 3.7 s
    more."""
    layout, tokens, kv = stored(node)
    ttft_s = 3.0
    link = relay(4e6)
    with Client(link.address, transport="grpc", strict=True, registry=registry, deadline=DEADLINE_S) as client:
        cache = client.namespace(layout)
        for _ in range(2):
            cache.get(tokens[: 2 * CHUNK])
        timer = threading.Timer(1.8, link.set_rate, [1e5])
        timer.start()
        began = time.monotonic()
        got, n = cache.get(tokens, ttft=ttft_s, prefill_tokens_per_s=SLOW_ENGINE)
        waited_s = time.monotonic() - began
        timer.join()
    assert n == TOKENS
    assert waited_s < ttft_s + 0.5
    read = qualities(layout, kv, got)
    assert read == sorted(read, key=lambda each: Quality.parse(each)), "finer from the front on"
    assert read[0] != "low"
    assert read[-1] != "high"


def test_what_is_stored_exactly_is_read_exactly(node: NodeProcess, registry: CollectorRegistry) -> None:
    layout, tokens, kv = stored(node, "lossless")
    with Client(node.address, strict=True, registry=registry, deadline=DEADLINE_S) as client:
        cache = client.namespace(layout)
        for _ in range(2):
            got, n = cache.get(tokens, ttft=0.01, prefill_tokens_per_s=SLOW_ENGINE, min_quality="lossless")
            assert n == TOKENS
            assert bits(got) == bits(kv)


async def test_the_asynchronous_client_has_the_same_calls(node: NodeProcess, registry: CollectorRegistry) -> None:
    layout, tokens, _ = stored(node)
    async with AsyncClient(node.address, strict=True, registry=registry, deadline=DEADLINE_S) as client:
        cache = client.namespace(layout)
        plan = await cache.plan(tokens, ttft=DEADLINE_S, prefill_tokens_per_s=lambda first, last: float(last - first))
        assert plan.recompute_s == TOKENS
        _, n = await cache.get(tokens, ttft=DEADLINE_S, prefill_tokens_per_s=lambda first, last: float(last - first))
        assert n == TOKENS


@pytest.mark.parametrize(
    "arguments",
    [
        {"ttft": 1.0},
        {"prefill_tokens_per_s": 1000},
        {"ttft": 0, "prefill_tokens_per_s": 1000},
        {"ttft": 1.0, "prefill_tokens_per_s": 0},
        {"ttft": 1.0, "prefill_tokens_per_s": lambda first, last: float("nan")},
    ],
)
def test_goals_that_are_none_are_refused(
    node: NodeProcess, registry: CollectorRegistry, arguments: dict[str, Any]
) -> None:
    layout, tokens, _ = stored(node)
    with (
        Client(node.address, registry=registry, deadline=DEADLINE_S) as client,
        pytest.raises(InvalidArgument),
    ):  # fmt: skip
        client.namespace(layout).get(tokens, **arguments)


def test_a_node_that_is_away_is_a_plan_to_recompute(registry: CollectorRegistry) -> None:
    layout = KVLayout.uniform(
        model=next(names), revision="r", num_layers=2, kv_heads=1, head_dim=16, dtype="float16", chunk_tokens=CHUNK
    )
    with Client("127.0.0.1:1", registry=registry, deadline=1.0) as client:
        plan = client.namespace(layout).plan(range(200), ttft=1.0, prefill_tokens_per_s=1000)
    assert plan.fetched_tokens == 0
    assert plan.ttft_s == pytest.approx(0.2)


def test_a_first_get_of_a_new_client_fetches_though_connecting_takes_longer_than_a_try_may(
    node: NodeProcess, relay: Callable[..., ShapedRelay], registry: CollectorRegistry
) -> None:
    """Each answer takes half a second: the handshake's, the lookup's, the first chunk's. A try may cost 1.3."""
    layout, tokens, _ = stored(node)
    computing_s = 32.5
    link = relay(1e9, latency_s=0.5)
    with Client(link.address, transport="grpc", strict=True, registry=registry, deadline=DEADLINE_S) as client:
        _, n = client.namespace(layout).get(tokens, ttft=computing_s, prefill_tokens_per_s=TOKENS / computing_s)
    assert n == TOKENS


def test_a_node_that_fell_silent_is_fetched_from_soon_after_it_is_back(
    node: NodeProcess, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped after the lookups of a few gets in a row, which are given up without a byte. That says less of the
    link than what came before and comes after."""
    layout, tokens, _ = stored(node)
    computing_s = 4.0
    fetch = NamespacePlanner.fetch

    async def fetch_of_a_stopped_node(*arguments: Any) -> Fetched:
        node.process.send_signal(signal.SIGSTOP)
        try:
            return await fetch(*arguments)
        finally:
            node.process.send_signal(signal.SIGCONT)

    with Client(node.address, strict=True, registry=registry, deadline=DEADLINE_S) as client:
        cache = client.namespace(layout)

        def get() -> tuple[int, str]:
            restored = cache.get(tokens, ttft=computing_s, prefill_tokens_per_s=TOKENS / computing_s)
            return restored.n, restored.reason

        assert get() == (TOKENS, "")
        with monkeypatch.context() as patched:
            patched.setattr(NamespacePlanner, "fetch", fetch_of_a_stopped_node)
            given_up = [get() for _ in range(4)]
        assert given_up[:2] == [(0, "silent")] * 2
        assert set(given_up) <= {(0, "silent"), (0, "doubted")}
        began = time.monotonic()
        while (got := get()) != (TOKENS, ""):
            assert got == (0, "doubted")
            assert time.monotonic() - began < 10
    stops = registry.get_sample_value("kvstore_client_planner_stops_total", {"reason": "silent"})
    assert stops == given_up.count((0, "silent"))


def test_a_get_says_why_it_is_short(
    node: NodeProcess, relay: Callable[..., ShapedRelay], registry: CollectorRegistry
) -> None:
    layout, tokens, _ = stored(node)
    with Client(relay(4e6).address, transport="grpc", registry=registry, deadline=DEADLINE_S) as client:
        cache = client.namespace(layout)
        assert cache.get(tokens[: 2 * CHUNK]).reason == ""
        assert cache.get([*tokens, *range(CHUNK)]).reason == "absent"
        assert cache.get(tokens, min_quality="lossless").reason == "quality"
        planned = cache.get(tokens, ttft=0.1, prefill_tokens_per_s=TOKENS / 0.1)
        assert (planned.n, planned.reason) == (0, "slow")
        patient = cache.get([*tokens, *range(CHUNK)], ttft=DEADLINE_S, prefill_tokens_per_s=SLOW_ENGINE)
        assert (patient.n, patient.reason) == (TOKENS, "absent"), "the planner has left nothing of it"
    assert registry.get_sample_value("kvstore_client_misses_total", {"reason": "slower"}) == 1
    assert registry.get_sample_value("kvstore_client_planner_stops_total", {"reason": "slow"}) == 1
