"""The vLLM connector loads what is there sooner than it is computed, and no more than is lacking: both its sides
against a real node, over loopback and over shaped links."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from node_process import NodeProcess
from polling import wait_until
from prometheus_client import CollectorRegistry
from shaped_relay import ShapedRelay
from vllm_sides import HELD, LAYOUT, PROMPT, Engine, output, request, saved

from kvstore_client import Client
from kvstore_client.integrations.vllm.planning import Decision, LoadPlanner
from kvstore_client.planner import estimates

PAGE = 16
BLOCKS = list(range(1, 20))
NIMBLE = 1000.0  # tokens a second of an engine
SLOW = 50.0


@pytest.fixture
def start_engine(node: NodeProcess) -> Iterator[Callable[..., Engine]]:
    started: list[Engine] = []

    def start(address: str = node.address, **extra: Any) -> Engine:
        started.append(Engine(address, PAGE, **extra))
        return started[-1]

    yield start
    for engine in started:
        engine.close()


@pytest.fixture
def slow_link(node: NodeProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShapedRelay]:
    """Which brings a prompt in about two seconds. A load that is given up on it is remembered for longer than a test
    takes: else a busy machine asks again."""
    monkeypatch.setattr(estimates, "DOUBT_S", 300.0)
    monkeypatch.setattr(estimates, "DOUBT_S_MAX", 300.0)
    link = ShapedRelay(int(node.address.rpartition(":")[2]), 5e4)
    yield link
    link.close()


def asked(engine: Engine, name: str, computed: int = 0) -> tuple[int, set[int]]:
    """(tokens that were loaded or tried, blocks that were not) of a request for PROMPT; its workers report."""
    wanted = request(name)
    tokens, failed = engine.matched(wanted, computed), set[int]()
    if tokens:
        engine.scheduler.allocated(wanted, BLOCKS, tokens)
        (load,), _ = engine.scheduler.step(output())
        engine.scheduler.ended()
        failed = engine.loaded(load)
        engine.scheduler.loaded([name], failed)
        if (report := engine.worker.report()) is not None:
            engine.scheduler.reported(report)
    engine.scheduler.finished(name)
    return tokens, failed


def test_a_fast_link_is_used_and_known_after_the_first_load(start_engine: Callable[..., Engine]) -> None:
    saved(start_engine(), BLOCKS)
    engine = start_engine()
    assert asked(engine, "first") == (HELD, set())
    engine.compute(128, SLOW)
    assert asked(engine, "second") == (HELD, set())
    assert asked(engine, "third", computed=80) == (HELD - 80, set())
    assert engine.count("plans", choice="probe") == 1
    assert engine.count("plans", choice="load") == 2


def test_where_computing_is_faster_it_is_computed_and_counted(
    start_engine: Callable[..., Engine], slow_link: ShapedRelay
) -> None:
    saved(start_engine(), BLOCKS)
    engine = start_engine(slow_link.address, lookup_s=5.0)
    engine.compute(200, NIMBLE)
    tries = 0
    while not engine.count("plans", choice="compute") and tries < 20:  # a busy machine may see too little of a link
        tries += 1
        tokens, failed = asked(engine, f"try-{tries}")
        # What a try did not bring before it was broken off is computed.
        assert failed == set(BLOCKS[: tokens // PAGE])
    assert engine.count("plans", choice="compute") == 1
    assert sum(engine.count("plans", choice=choice) for choice in ("probe", "load", "part")) == tries - 1
    if not engine.count("computes", reason="unmeasured"):  # where a busy machine's lookups leave no time to ask
        assert asked(engine, "again") == (0, set())

    # An engine for which that is fast, and that knows it from a load before it had computed anything.
    patient = start_engine(slow_link.address, lookup_s=5.0)
    assert asked(patient, "first") == (HELD, set())
    patient.compute(128, SLOW)
    assert asked(patient, "second") == (HELD, set())
    assert patient.count("plans", choice="load") == 1


def test_the_planner_can_be_switched_off(start_engine: Callable[..., Engine], slow_link: ShapedRelay) -> None:
    saved(start_engine(), BLOCKS)
    engine = start_engine(slow_link.address, lookup_s=5.0, planner=False)
    engine.compute(200, NIMBLE)
    for name in ("first", "second"):
        assert asked(engine, name) == (HELD, set())
    assert engine.count("plans", choice="load") == 2


def test_a_load_starts_at_the_chunk_in_which_the_engines_own_cache_ends(
    node: NodeProcess, start_engine: Callable[..., Engine]
) -> None:
    writer, reader = start_engine(), start_engine()
    saved(writer, BLOCKS)
    wanted = writer.kv(BLOCKS)
    with Client(node.address, registry=CollectorRegistry()) as client:
        bytes_of = [chunk.stored_bytes for chunk in client.namespace(LAYOUT).lookup(PROMPT, lease_ms=0).chunks]
    before = reader.kv(BLOCKS)
    assert asked(reader, "r", computed=144) == (HELD - 144, set())  # 16 tokens into the third of four chunks
    received = reader.registry.get_sample_value("kvstore_client_stream_bytes_total", {"direction": "in"})
    assert received == sum(bytes_of[2:])
    after = reader.kv(BLOCKS)
    assert np.array_equal(after[:, :, :144], before[:, :, :144])
    assert np.array_equal(after[:, :, 144:HELD], wanted[:, :, 144:HELD])


def test_what_is_computed_although_the_node_has_it_is_not_saved_again(
    start_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(start_engine(), BLOCKS)
    engine = start_engine()
    monkeypatch.setattr(LoadPlanner, "decide", lambda *_: Decision(0, "compute", "slow"))
    longer = request("longer", prompt_token_ids=[*PROMPT, *range(40)], all_token_ids=[*PROMPT, *range(40)])
    assert engine.matched(longer) == 0
    _, (save,) = engine.scheduler.step(output(new=[("longer", [*BLOCKS, 20, 21, 22], 0)], scheduled=[("longer", 340)]))
    assert (save.first_token, len(save.tokens)) == (HELD, 320)
    assert engine.count("computes", reason="slow") == 1


def test_who_fails_requests_for_a_load_that_falls_short_breaks_none_off(start_engine: Callable[..., Engine]) -> None:
    saved(start_engine(), BLOCKS)
    for recomputes in (True, False):
        engine = start_engine(recomputes=recomputes)
        engine.compute(128, SLOW)
        wanted = request()
        tokens = engine.matched(wanted)
        engine.scheduler.allocated(wanted, BLOCKS, tokens)
        (load,), _ = engine.scheduler.step(output())
        assert (load.prefill is not None) is recomputes


def test_blocks_are_told_of_when_the_node_has_them(start_engine: Callable[..., Engine]) -> None:
    engine = start_engine()
    hashes = [bytes([number]) * 32 for number in range(18)]
    whole = request("saved", block_hashes=hashes)
    assert engine.matched(whole) == 0
    _, (save,) = engine.scheduler.step(output(new=[("saved", BLOCKS, 0)], scheduled=[("saved", len(PROMPT))]))
    engine.worker.save(save)
    wait_until(lambda: engine.count("saves", outcome="stored") == 1, "it is saved", deadline_s=30)
    report = engine.worker.report()
    assert report is not None
    engine.scheduler.reported(report)
    (told,) = engine.scheduler.stored_blocks()
    assert (told.hashes, told.parent, told.tokens) == (hashes[:16], None, PROMPT[:HELD])
    assert engine.worker.report() is None
