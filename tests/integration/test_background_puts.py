"""Puts in the background: nobody waits for them, their KV is the caller's again when they are done, and they end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
from hostile_server import Held, HostileServer, never
from kv_objects import small_layout
from node_process import NodeProcess
from polling import wait_until
from prometheus_client import CollectorRegistry
from prompts import Prompt, layout, prompt, same
from relay import Relay

from kvstore_client import (
    AsyncClient,
    Client,
    ClientClosed,
    InvalidArgument,
    LayoutError,
    LimitExceeded,
    PutResult,
    ValuesError,
)

DEADLINE_S = 30.0  # of what is not about time


@pytest.fixture
def mine(request: pytest.FixtureRequest) -> Prompt:
    return prompt(layout(request.node.name), 64)


@pytest.fixture
def relay(shared: NodeProcess) -> Iterator[Relay]:
    relay = Relay(int(shared.address.rpartition(":")[2]))
    yield relay
    relay.close()


def sample(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(f"kvstore_client_{name}", labels) or 0.0


def test_what_is_put_in_the_background_is_there_when_its_future_is_done(
    shared: NodeProcess, registry: CollectorRegistry, mine: Prompt
) -> None:
    with Client(shared.address, strict=True, deadline=DEADLINE_S, registry=registry) as client:
        cache = client.namespace(mine.layout)
        futures = [
            cache.put(mine.tokens[:last], mine.kv[:, :, :last], quality="lossless", background=True)
            for last in (32, 64)
        ]
        first, second = (future.result(DEADLINE_S) for future in futures)
        assert (first.stored, first.tokens, first.dropped) == (2, 32, False)
        assert (second.stored, second.have, second.tokens) == (2, 2, 64), "one at a time, in the order of the calls"
        assert same(cache.get(mine.tokens)[0], mine.kv)
    wait_until(lambda: sample(registry, "background_puts") == 0, "nothing is queued any more")
    assert sample(registry, "background_bytes") == 0


async def test_the_asynchronous_clients_future_is_awaited(shared: NodeProcess, mine: Prompt) -> None:
    async with AsyncClient(shared.address, deadline=DEADLINE_S, registry=CollectorRegistry()) as client:
        cache = client.namespace(mine.layout)
        future = cache.put(mine.tokens, mine.kv, quality="lossless", background=True)
        assert isinstance(future, asyncio.Future)
        assert not future.done()
        assert (await future).stored == 4
        assert same((await cache.get(mine.tokens))[0], mine.kv)


@pytest.mark.parametrize("copy", [True, False])
def test_kv_may_be_overwritten_at_once_where_it_is_copied(relay: Relay, copy: bool, mine: Prompt) -> None:
    """The node gives no answer before the caller has overwritten its pages, so nothing is encoded by then."""
    relay.swallow()
    with Client(relay.address, deadline=DEADLINE_S, registry=CollectorRegistry()) as client:
        cache = client.namespace(mine.layout)
        pages = mine.kv.copy()
        future = cache.put(mine.tokens, pages, quality="lossless", background=True, copy=copy)
        pages[...] = 0
        relay.let_pass()
        assert future.result(DEADLINE_S).stored == 4
        assert same(cache.get(mine.tokens)[0], mine.kv if copy else pages)


def test_a_full_queue_drops_a_put_and_says_so(relay: Relay, registry: CollectorRegistry, mine: Prompt) -> None:
    relay.swallow()
    with Client(
        relay.address, deadline=DEADLINE_S, registry=registry, background_bytes=2 * mine.kv.nbytes - 1
    ) as client:
        cache = client.namespace(mine.layout)
        queued = cache.put(mine.tokens, mine.kv, background=True)
        assert (sample(registry, "background_puts"), sample(registry, "background_bytes")) == (1, mine.kv.nbytes)
        other = prompt(mine.layout, 64, seed=1)
        dropped = cache.put(other.tokens, other.kv, background=True).result(DEADLINE_S)
        assert (dropped.rejected, dropped.stored, dropped.tokens, dropped.dropped) == (4, 0, 0, True)
        assert "queue of background puts is full" in dropped.reasons[0]
        assert sample(registry, "background_dropped_total", reason="limit") == 1
        assert sample(registry, "rejected_chunks_total", reason="limit") == 4
        small = cache.put(other.tokens[:16], other.kv[:, :, :16], background=True)
        assert not queued.done()
        relay.let_pass()
        assert (queued.result(DEADLINE_S).stored, small.result(DEADLINE_S).stored) == (4, 1)
        wait_until(lambda: sample(registry, "background_puts") == 0, "nothing is queued any more")
        assert cache.put(other.tokens, other.kv, background=True).result(DEADLINE_S).stored == 3


def test_a_put_larger_than_the_queue_is_taken_where_it_is_alone(shared: NodeProcess, mine: Prompt) -> None:
    with Client(shared.address, deadline=DEADLINE_S, registry=CollectorRegistry(), background_bytes=1) as client:
        assert client.namespace(mine.layout).put(mine.tokens, mine.kv, background=True).result(DEADLINE_S).stored == 4


def test_a_strict_client_raises_from_the_future(relay: Relay, mine: Prompt) -> None:
    relay.swallow()
    with Client(
        relay.address, strict=True, deadline=DEADLINE_S, registry=CollectorRegistry(), background_bytes=1
    ) as client:
        cache = client.namespace(mine.layout)
        queued = cache.put(mine.tokens, mine.kv, background=True)
        with pytest.raises(LimitExceeded):
            cache.put(mine.tokens, mine.kv, background=True).result(DEADLINE_S)
        relay.let_pass()
        assert queued.result(DEADLINE_S).stored == 4


def test_mistakes_are_raised_by_the_call_and_bad_values_by_the_future(shared: NodeProcess, mine: Prompt) -> None:
    with Client(shared.address, deadline=DEADLINE_S, registry=CollectorRegistry()) as client:
        cache = client.namespace(mine.layout)
        with pytest.raises(LayoutError):
            cache.put(mine.tokens, mine.kv[:1], background=True)
        with pytest.raises(InvalidArgument, match="from first_token on"):
            cache.put(mine.tokens, mine.kv[:, :, :-1], background=True)
        wrong = mine.kv.copy()
        wrong[1, 1, 20, 1, 3] = np.nan
        future = cache.put(mine.tokens, wrong, quality="high", background=True)
        with pytest.raises(ValuesError):
            future.result(DEADLINE_S)
        after = cache.put(mine.tokens, mine.kv, background=True)
        assert after.result(DEADLINE_S).stored == 4, "the queue goes on"


def test_the_deadline_counts_from_the_call(registry: CollectorRegistry) -> None:
    held = Held.of(small_layout(), 2, seed=1)
    with (
        HostileServer(lookup=never) as server,
        Client(server.address, deadline=DEADLINE_S, registry=registry) as client,
    ):
        cache = client.namespace(held.layout)
        futures = [cache.put(held.tokens, held.kv, background=True, deadline=seconds) for seconds in (1.0, 0.5, 0.5)]
        first, second, third = (future.result(DEADLINE_S) for future in futures)
        assert (first.rejected, first.dropped) == (2, False), "it was tried"
        assert (second.rejected, second.dropped) == (third.rejected, third.dropped) == (2, True)
        assert "before the put had its turn" in second.reasons[0]
        assert server.calls == ["Lookup"]
        assert sample(registry, "background_dropped_total", reason="deadline") == 2


def test_a_cancelled_put_ends_and_the_next_has_its_turn() -> None:
    held = Held.of(small_layout(), 2, seed=1)
    with (
        HostileServer(lookup=never) as server,
        Client(server.address, deadline=DEADLINE_S, registry=CollectorRegistry()) as client,
    ):
        cache = client.namespace(held.layout)
        running, waiting, last = (cache.put(held.tokens, held.kv, background=True) for _ in range(3))
        wait_until(lambda: server.calls == ["Lookup"], "the first is under way")
        assert waiting.cancel()
        assert running.cancel()
        wait_until(lambda: server.calls == ["Lookup"] * 2, "the last is under way")
        assert last.cancel()


def test_closing_waits_for_what_is_queued(relay: Relay, shared: NodeProcess, mine: Prompt) -> None:
    relay.slow_down(1 << 16, 0.05)
    with Client(relay.address, deadline=DEADLINE_S, registry=CollectorRegistry()) as client:
        cache = client.namespace(mine.layout)
        futures = [
            cache.put(mine.tokens[:last], mine.kv[:, :, :last], quality="raw", background=True) for last in (32, 64)
        ]
    assert [future.done() for future in futures] == [True, True]
    assert [future.result().stored for future in futures] == [2, 2]
    with Client(shared.address, deadline=DEADLINE_S, registry=CollectorRegistry()) as client:
        assert client.namespace(mine.layout).get(mine.tokens)[1] == 64


@pytest.mark.parametrize("strict", [False, True])
def test_closing_drops_what_is_not_done_within_the_deadline(strict: bool, registry: CollectorRegistry) -> None:
    held = Held.of(small_layout(), 2, seed=1)
    with HostileServer(lookup=never) as server:
        client = Client(server.address, deadline=0.2, strict=strict, registry=registry)
        cache = client.namespace(held.layout)
        futures = [cache.put(held.tokens, held.kv, background=True, deadline=1000.0) for _ in range(2)]
        wait_until(lambda: server.calls == ["Lookup"], "the first is under way")
        client.close()
        if strict:
            assert [type(future.exception(DEADLINE_S)) for future in futures] == [ClientClosed] * 2
        else:
            reason = "the client was closed before the put was done"
            assert [future.result(DEADLINE_S) for future in futures] == [
                PutResult(rejected=2, reasons=(reason,), dropped=True)
            ] * 2
        assert sample(registry, "background_dropped_total", reason="closed") == 2
        with pytest.raises(ClientClosed):
            cache.put(held.tokens, held.kv, background=True)
    wait_until(lambda: sample(registry, "background_puts") == 0, "nothing is queued any more")
