"""The replay, the optimum and the format of traces."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from random import Random

import pytest
import zstandard

from kvstore.policies.belady import optimum
from kvstore.policies.choice import POLICIES
from kvstore.policies.replay import replay
from kvstore.policies.trace import Trace, TraceUnusable, load, number
from kvstore.policies.workloads import WORKLOADS


def trace_of(*requests: str) -> Trace:
    """Each block a letter."""
    return number("test", ((float(now), list(blocks), None) for now, blocks in enumerate(requests)))


def test_hits_are_counted_in_the_stored_prefix() -> None:
    outcome = replay(trace_of("abc", "abd", "abc", "x"), POLICIES["lru"](), 10)
    assert (outcome.hits, outcome.blocks, outcome.stored, outcome.evicted) == (5, 10, 5, 0)


def test_a_request_larger_than_the_tier_keeps_its_beginning() -> None:
    outcome = replay(trace_of("abcdef", "abcdef"), POLICIES["lru"](), 4)
    assert (outcome.hits, outcome.refused) == (4, 4)


def test_lru_by_hand() -> None:
    outcome = replay(trace_of("ab", "cd", "ab", "e", "cd", "ab"), POLICIES["lru"](), 4)
    # ab hits both; e takes d's place; cd hits c, and d takes b's place; ab hits a
    assert (outcome.hits, outcome.evicted) == (2 + 1 + 1, 3)


def test_degrading_makes_room_before_anything_goes() -> None:
    trace = trace_of("a", "b", "c", "a", "b", "c")
    whole = replay(trace, POLICIES["lru"](), 8, (4,))
    degraded = replay(trace, POLICIES["lru"](), 8, (4, 2))
    assert (whole.hits, whole.evicted) == (0, 4)
    assert (degraded.hits, degraded.evicted, degraded.hits_by_quality) == (3, 0, (1, 2))


def best_possible(trace: Trace, capacity: int) -> int:
    """By trying everything: after each request any subset of what was held or used, closed under parents, may stay."""
    states = {frozenset[int](): 0}
    for blocks in trace.requests:
        after: dict[frozenset[int], int] = {}
        for held, hits in states.items():
            got = len(list(itertools.takewhile(held.__contains__, blocks)))
            pool = held | set(blocks)
            for size in range(min(capacity, len(pool)) + 1):
                for kept in map(frozenset, itertools.combinations(sorted(pool), size)):
                    if all(trace.parents[block] in kept or trace.parents[block] < 0 for block in kept):
                        after[kept] = max(after.get(kept, 0), hits + got)
        states = after
    return max(states.values())


@pytest.mark.parametrize("seed", range(25))
def test_the_optimum_is_what_trying_everything_finds(seed: int) -> None:
    random = Random(seed)
    chains = ["ab", "abc", "abd", "e", "ef", "g"]
    trace = trace_of(*(random.choice(chains) for _ in range(7)))
    for capacity in (1, 2, 3):
        assert optimum(trace, capacity).hits == best_possible(trace, capacity)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_no_policy_beats_the_optimum(workload: object) -> None:
    trace = next(made for made in WORKLOADS if made is workload).trace(seed=1, requests=300)
    capacity = trace.unique_blocks // 10
    bound = optimum(trace, capacity)
    for make in POLICIES.values():
        outcome = replay(trace, make(), capacity)
        assert 0 <= outcome.hits <= bound.hits
        assert outcome.stored + outcome.refused + outcome.hits == trace.blocks


def test_workloads_come_from_their_seed_alone() -> None:
    for workload in WORKLOADS:
        assert workload.trace(3, 200).requests == workload.trace(3, 200).requests
        assert workload.trace(3, 200).requests != workload.trace(4, 200).requests
        assert not workload.trace(3, 200).renamed


def lines(*requests: object) -> bytes:
    return b"".join(json.dumps(request).encode() + b"\n" for request in requests)


def test_plain_and_compressed_traces_are_the_same(tmp_path: Path) -> None:
    text = lines(
        {"timestamp": 0, "input_length": 900, "hash_ids": [5, 7]},
        {"timestamp": 1500, "input_length": 1300, "hash_ids": [5, 7, "x"]},
    )
    (tmp_path / "plain.jsonl").write_bytes(text)
    (tmp_path / "packed.jsonl.zst").write_bytes(zstandard.compress(text))
    for name in ("plain.jsonl", "packed.jsonl.zst"):
        trace = load(tmp_path / name)
        assert trace.requests == [[0, 1], [0, 1, 2]]
        assert (trace.times_s, trace.parents, trace.tokens) == ([0.0, 1.5], [-1, 0, 1], [900, 1300])
        assert (trace.block_tokens, trace.renamed) == (512, False)


def test_every_frame_of_a_compressed_trace_is_read(tmp_path: Path) -> None:
    frames = [zstandard.compress(lines({"timestamp": time, "hash_ids": [time]})) for time in (1, 2)]
    (tmp_path / "trace.zst").write_bytes(b"".join(frames))
    assert load(tmp_path / "trace.zst").requests == [[0], [1]]


def test_ids_that_are_not_of_prefixes_are_told_apart_by_prefix() -> None:
    trace = trace_of("ax", "bx", "ax")
    assert trace.renamed
    assert trace.requests == [[0, 1], [2, 3], [0, 1]]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has no requests"),
        (b"hello\n", "line 1: not JSON"),
        (lines({"timestamp": 0}), "line 1: it needs hash_ids"),
        (lines([1, 2]), "line 1: it needs hash_ids"),
        (lines({"hash_ids": [1]}), "line 1: it needs a timestamp"),
        (lines({"timestamp": 5, "hash_ids": [1]}, {"timestamp": 4, "hash_ids": [1]}), "line 2: it needs a timestamp"),
        (zstandard.compress(b"x" * 100)[:12], "damaged"),
        (b"\xff\xfe", "damaged"),
    ],
)
def test_what_is_not_a_trace_is_refused_in_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(content)
    with pytest.raises(TraceUnusable, match=says) as caught:
        load(path)
    assert "\n" not in str(caught.value)
