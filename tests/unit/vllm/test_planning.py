"""When a load pays, by figures of our own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvstore_client import KVLayout, Quality
from kvstore_client.integrations.vllm.planning import Decision, Found, LoadPlanner
from kvstore_client.integrations.vllm.prefill import PrefillSpeed
from kvstore_client.planner.estimates import Speeds
from kvstore_client.results import ChunkHit

LAYOUT = KVLayout.uniform(model="m", revision="r", num_layers=4, kv_heads=2, head_dim=64, chunk_tokens=256)
CHUNK_BYTES = 1 << 20
FAST_DECODE = dict.fromkeys(Quality, 1e12)
NODE = "n:1"


class Case:
    """`tokens_per_s`: of the engine's prefill; 0: it has computed nothing yet."""

    def __init__(self, tokens_per_s: float) -> None:
        self.now_s = 100.0
        prefill = PrefillSpeed(0.0, lambda: self.now_s)
        if tokens_per_s:
            prefill.scheduled([(0, 1000)], 1000)
            self.now_s += 1000 / tokens_per_s
            prefill.ended()
        self.planner = LoadPlanner(LAYOUT, Quality.LOSSLESS, prefill, lambda: self.now_s, deadline_s=10.0)

    def measured(self, bytes_per_s: float, latency_s: float = 0.001, decode: float = 1e12) -> Case:
        for _ in range(3):
            self.planner.learn({NODE: Speeds(bytes_per_s, latency_s, dict.fromkeys(Quality, decode))})
        return self

    def decide(self, computed: int = 0, chunks: int = 8, node: str = NODE) -> Decision:
        return self.planner.decide(found(chunks, node), computed, 8 * 256 + 40)


def found(chunks: int, node: str = NODE) -> Found:
    hits = [
        ChunkHit(bytes(32), first, 256, Quality.LOSSLESS, Quality.RAW, CHUNK_BYTES, "host")
        for first in range(0, chunks * 256, 256)
    ]
    return Found(hits, node)


def test_what_is_not_measured_is_tried() -> None:
    assert Case(0).measured(1e9).decide() == Decision(2048, "probe")
    assert Case(1000).decide() == Decision(2048, "probe")
    assert Case(1000).measured(1e9).decide(node="other:1") == Decision(2048, "probe")


@pytest.mark.parametrize(
    ("lookup_s", "choice", "reason"),
    [(0.0001, "probe", ""), (0.0006, "compute", "unmeasured"), (0.01, "compute", "unmeasured")],
)
def test_what_costs_more_to_try_than_there_is_to_lose_is_not_tried(lookup_s: float, choice: str, reason: str) -> None:
    """A try may cost a twenty-fifth of a prefill of 21 ms, and takes a lookup and a request."""
    found_so = Found(found(8).chunks, NODE, lookup_s)
    decision = Case(100_000).planner.decide(found_so, 0, 2088)
    assert (decision.choice, decision.reason) == (choice, reason)


def test_the_faster_way_is_taken() -> None:
    # 8 MiB in 0.08 s, or 2,048 tokens in 2 s; and the other way round.
    assert Case(1000).measured(1e8).decide() == Decision(2048, "load")
    assert Case(100_000).measured(1e7).decide() == Decision(0, "compute", "slow")


def test_slow_decoding_counts_as_well() -> None:
    elements = 256 * LAYOUT.elements_per_token
    assert Case(1000).measured(1e9, decode=elements).decide() == Decision(0, "compute", "slow")  # a second a chunk


def test_what_the_engine_has_is_not_counted_for_the_load() -> None:
    """With 1,920 of 2,048 tokens there, a chunk of 1 MiB has to pay for the 128 that it brings."""
    case = Case(1000).measured(1e7)  # 0.1 s a chunk
    assert case.decide(computed=0) == Decision(2048, "load")
    assert case.decide(computed=1792) == Decision(2048, "load")
    assert case.decide(computed=1920) == Decision(0, "compute", "slow")


def test_what_was_measured_long_ago_is_tried_again() -> None:
    case = Case(1000).measured(1e6)
    assert case.decide() == Decision(0, "compute", "slow")
    case.now_s += 600
    assert case.decide() == Decision(2048, "probe")


def test_what_a_worker_only_doubts_counts_for_as_long_as_it_does_there() -> None:
    case = Case(1000)
    case.planner.learn({NODE: Speeds(1e6, 0.001, FAST_DECODE, doubt_s=2.0)})
    assert case.decide() == Decision(0, "compute", "doubted")
    case.now_s += 2.1
    assert case.decide() == Decision(2048, "probe")
    case.measured(1e9).planner.learn({NODE: Speeds(1e6, 0.001, FAST_DECODE, doubt_s=2.0)})
    case.now_s += 2.1
    assert case.decide() == Decision(2048, "load")


@pytest.mark.parametrize(("lookup_s", "choice"), [(0.1, "probe"), (0.4, "probe"), (1.5, "compute")])
def test_a_lookup_that_took_as_long_as_the_doubt_does_not_outwait_it(lookup_s: float, choice: str) -> None:
    """Both end 2.1 s after the doubt, of 2 s, began."""
    case = Case(1000)
    case.planner.learn({NODE: Speeds(1e6, 0.001, FAST_DECODE, doubt_s=2.0)})
    case.now_s += 2.1
    asked = replace(found(8), seconds=lookup_s)
    assert case.planner.decide(asked, 0, 8 * 256 + 40).choice == choice


@pytest.mark.parametrize(("chunks", "tokens"), [(0, 0), (3, 768)])
def test_found(chunks: int, tokens: int) -> None:
    assert found(chunks).tokens == tokens
