"""Several nodes, one of which is dead, or answers too late: calls whose keys it has go to the next, and soon without
waiting; the vLLM connector loads from the others all the while."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from node_process import NodeProcess
from polling import wait_until
from prometheus_client import CollectorRegistry
from shaped_relay import ShapedRelay
from vllm_sides import HELD, LAYOUT, PROMPT, Engine, output, request

import kvstore_codec as codec
from kvstore_client.circuit import FAILURES_MAX
from kvstore_cluster.placement import rank

BLOCKS = list(range(1, 20))
LOOKUP_S = 1.0
SHARE_S = LOOKUP_S / 2  # what the first of two nodes has of it
StartNode = Callable[..., NodeProcess]


@pytest.fixture
def nodes(start_node: StartNode) -> list[NodeProcess]:
    return [start_node("--host-capacity", "64MiB") for _ in range(2)]


@pytest.fixture
def engine(nodes: list[NodeProcess]) -> Iterator[Engine]:
    engine = Engine(",".join(node.address for node in nodes), 16, lookup_s=LOOKUP_S, deadline_s=20.0)
    yield engine
    engine.close()


def salts_of(seeds: Sequence[str], seed: str) -> Iterator[str]:
    """With which PROMPT has its place at `seed`."""
    for number in range(10_000):
        salt = f"salt {number}"
        first, *_ = codec.chunk_refs(LAYOUT, PROMPT, extras=codec.Extras(None, salt, ()))
        if rank(seeds, LAYOUT.namespace_id + first.hash)[0] == seed:
            yield salt


def asked(name: str, salt: str) -> Any:
    return request(name, cache_salt=salt)


def saved(engine: Engine, salt: str) -> None:
    before = engine.count("tokens", direction="save")
    name = f"saved {salt}"
    engine.matched(asked(name, salt))
    _, saves = engine.scheduler.step(output(new=[(name, BLOCKS, 0)], scheduled=[(name, len(PROMPT))]))
    for save in saves:
        engine.worker.save(save)
    wait_until(lambda: engine.count("tokens", direction="save") == before + HELD, "it is saved", deadline_s=60)
    engine.scheduler.finished(name)


def load_s(engine: Engine, name: str, salt: str) -> float:
    """Seconds of a request's lookup and load, which bring all."""
    began_s = time.monotonic()
    wanted = asked(name, salt)
    assert engine.matched(wanted) == HELD
    engine.scheduler.allocated(wanted, BLOCKS, HELD)
    (load,), _ = engine.scheduler.step(output())
    assert engine.loaded(load) == set()
    engine.scheduler.finished(name)
    return time.monotonic() - began_s


def circuit(registry: CollectorRegistry, seed: str, state: str) -> float:
    labels = {"node": seed, "state": state}
    return registry.get_sample_value("kvstore_client_circuit_changes_total", labels) or 0.0


def test_a_node_that_was_killed_stops_no_load_from_the_other(nodes: list[NodeProcess], engine: Engine) -> None:
    alive, dead = nodes
    seeds = [node.address for node in nodes]
    ours, theirs = next(salts_of(seeds, alive.address)), salts_of(seeds, dead.address)
    saved(engine, ours)
    saved(engine, next(theirs))
    load_s(engine, "before", ours)
    dead.kill()
    for number in range(3 * FAILURES_MAX):
        assert engine.matched(asked(f"theirs {number}", next(theirs))) == 0
        load_s(engine, f"ours {number}", ours)
    assert engine.count("lookups", outcome="failed") == engine.count("lookups", outcome="skipped") == 0
    assert engine.count("loads", outcome="whole") == 1 + 3 * FAILURES_MAX
    assert circuit(engine.registry, dead.address, "open") >= 1
    assert circuit(engine.registry, alive.address, "open") == 0


def test_a_node_that_answers_too_late_costs_a_few_requests_its_share_and_the_others_nothing(
    nodes: list[NodeProcess],
) -> None:
    """gRPC itself asks nobody whose connection is lost; this one is there all the while."""
    far = ShapedRelay(int(nodes[1].address.rpartition(":")[2]), 1e9)
    seeds = [nodes[0].address, far.address]
    ours, theirs = next(salts_of(seeds, nodes[0].address)), salts_of(seeds, far.address)
    engine = Engine(",".join(seeds), 16, lookup_s=LOOKUP_S, deadline_s=20.0)
    try:
        saved(engine, ours)
        saved(engine, next(theirs))
        far.set_latency(1.4 * SHARE_S)  # within what gRPC gives a handshake
        waited = []
        for number in range(4 * FAILURES_MAX):
            began_s = time.monotonic()
            assert engine.matched(asked(f"theirs {number}", next(theirs))) == 0
            waited.append(time.monotonic() - began_s)
        assert all(each > 0.9 * SHARE_S for each in waited[:FAILURES_MAX])
        # One in a pause tries; pauses are a quarter of a second at least, and double.
        assert sum(each > 0.9 * SHARE_S for each in waited[FAILURES_MAX:]) <= 5
        load_s(engine, "ours", ours)
        far.set_latency(0.0)

        def found_again() -> bool:
            engine.matched(asked(f"back {time.monotonic_ns()}", next(theirs)))
            return circuit(engine.registry, far.address, "closed") >= 1

        wait_until(found_again, "it is asked in its turn again", deadline_s=30)
        assert engine.count("lookups", outcome="failed") == 0
    finally:
        engine.close()
        far.close()


def test_a_load_begins_at_the_node_where_its_chunks_were_found(nodes: list[NodeProcess], engine: Engine) -> None:
    """Another engine stored them at the second while the first is silent. The workers' client need not know that: it
    would wait for half of its twenty seconds."""
    seeds = [node.address for node in nodes]
    _, silent = nodes
    theirs = salts_of(seeds, silent.address)
    saved(engine, next(theirs))  # so both clients are connected to it
    other = Engine(",".join(seeds), 16, lookup_s=LOOKUP_S)
    silent.process.send_signal(signal.SIGSTOP)
    try:
        saved(other, salt := next(theirs))
        assert load_s(engine, "found", salt) < engine.config.deadline_s / 2
    finally:
        silent.process.send_signal(signal.SIGCONT)
        other.close()
