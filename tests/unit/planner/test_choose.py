"""The choice: in time where anything is, never predicted slower than recomputing, monotone in link and deadline."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_client.planner.choose import Choice, Chunk, State, choose, ready_times
from kvstore_client.planner.estimates import Speeds
from kvstore_codec import Quality

RAW, LOSSLESS, HIGH, MEDIUM, LOW = Quality
DECODE = dict.fromkeys(Quality, 1e9)
SIZES = {LOW: 1e6, MEDIUM: 1.6e6, HIGH: 2.2e6}


def chunks_of(count: int) -> list[Chunk]:
    return [Chunk(256 * index, 256, 1000, {q: int(size) for q, size in SIZES.items()}) for index in range(count)]


def growing(count: int, first_s: float, growth: float) -> list[float]:
    """Seconds of recomputing from each chunk on; the last is what is not stored."""
    each = [first_s * (1 + growth * index) for index in range(count)]
    return [0.01 + sum(each[index:]) for index in range(count + 1)]


def chosen(
    count: int, rate: float, deadline_s: float, recompute_s: list[float], latency_s: float = 0.0,
    state: State | None = None,
) -> Choice:  # fmt: skip
    speeds = Speeds(rate, latency_s, DECODE)
    budget_s = min(deadline_s, recompute_s[0])
    return choose(chunks_of(count), recompute_s, state or State(), speeds, speeds, budget_s)


@given(
    count=st.integers(1, 12), rate=st.floats(1e5, 1e10), deadline_s=st.floats(0.001, 20), first_s=st.floats(1e-4, 1),
    growth=st.floats(0, 0.5), latency_s=st.floats(0, 0.1),
)  # fmt: skip
def test_never_predicted_slower_than_recomputing(
    count: int, rate: float, deadline_s: float, first_s: float, growth: float, latency_s: float
) -> None:
    recompute_s = growing(count, first_s, growth)
    choice = chosen(count, rate, deadline_s, recompute_s, latency_s)
    assert choice.finish_s <= recompute_s[0] * (1 + 1e-9)


@given(
    count=st.integers(1, 6), rate=st.floats(1e6, 1e9), deadline_s=st.floats(0.001, 3), first_s=st.floats(1e-3, 1),
    latency_s=st.floats(0, 0.05),
)  # fmt: skip
def test_in_time_wherever_any_choice_is(
    count: int, rate: float, deadline_s: float, first_s: float, latency_s: float
) -> None:
    """Against every prefix at every mixture of qualities."""
    recompute_s = growing(count, first_s, 0.1)
    budget_s = min(deadline_s, recompute_s[0])
    choice = chosen(count, rate, deadline_s, recompute_s, latency_s)
    speeds, left = Speeds(rate, latency_s, DECODE), chunks_of(count)
    fastest = recompute_s[0]
    for fetched in range(1, count + 1):
        for mixed in itertools.product(SIZES, repeat=fetched):
            ready = ready_times(left[:fetched], mixed, State(), speeds)
            fastest = min(fastest, ready[-1] + recompute_s[fetched])
    if fastest < budget_s * (1 - 1e-9):
        assert choice.finish_s <= budget_s * (1 + 1e-9)
    else:
        assert choice.finish_s == pytest.approx(fastest)


def fineness(choice: Choice) -> tuple[int, int]:
    return len(choice.qualities), -sum(choice.qualities)


@given(
    count=st.integers(1, 12), rate=st.floats(1e6, 1e9), more=st.floats(1, 10), deadline_s=st.floats(0.01, 3),
    latency_s=st.floats(0, 0.05),
)  # fmt: skip
def test_more_bandwidth_never_lowers_the_quality(
    count: int, rate: float, more: float, deadline_s: float, latency_s: float
) -> None:
    recompute_s = growing(count, 1.0, 0.1)  # so dear that all of it is fetched if anything is
    slow, fast = (chosen(count, each, deadline_s, recompute_s, latency_s) for each in (rate, more * rate))
    if slow.finish_s <= deadline_s:
        assert fineness(fast) >= fineness(slow)


@given(
    count=st.integers(1, 12), rate=st.floats(1e6, 1e9), deadline_s=st.floats(0.01, 3), more=st.floats(1, 10),
    latency_s=st.floats(0, 0.05),
)  # fmt: skip
def test_a_later_deadline_never_lowers_the_quality(
    count: int, rate: float, deadline_s: float, more: float, latency_s: float
) -> None:
    recompute_s = growing(count, 1.0, 0.1)
    early, late = (chosen(count, rate, each, recompute_s, latency_s) for each in (deadline_s, more * deadline_s))
    if early.finish_s <= deadline_s:
        assert fineness(late) >= fineness(early)


def test_the_coarse_chunks_come_first() -> None:
    recompute_s = growing(8, 1.0, 0.0)
    choice = chosen(8, 1e7, 1.0, recompute_s)  # 8 MB at low, 12.8 at medium, 17.6 at high in 0.99 s
    assert list(choice.qualities) == sorted(choice.qualities, reverse=True)
    assert {LOW, MEDIUM} == set(choice.qualities)
    assert choice.finish_s <= 1.0
    finer = [LOW] * (choice.qualities.count(LOW) - 1) + [MEDIUM] * (choice.qualities.count(MEDIUM) + 1)
    assert ready_times(chunks_of(8), finer, State(), Speeds(1e7, 0.0, DECODE))[-1] + 0.01 > 1.0


def test_an_open_stream_is_kept_where_another_request_costs_too_much() -> None:
    recompute_s = growing(4, 1.0, 0.0)
    state = State(done=2, now=0.2, flowing=HIGH, decoder_free_s=0.2)
    assert chosen(4, 1e7, 0.7, recompute_s, latency_s=0.3, state=state).qualities == (HIGH, HIGH)
    # Nothing is in time: what flows is sooner there than what is coarser but has to be asked for.
    assert chosen(4, 1e7, 0.3, recompute_s, latency_s=0.3, state=state).qualities == (HIGH, HIGH)


def test_an_exact_object_is_read_whole() -> None:
    exact = Chunk(0, 256, 1000, {LOSSLESS: 4_000_000})
    lossy = Chunk(256, 256, 1000, {LOW: 1_000_000, MEDIUM: 1_600_000})
    speeds = Speeds(1e7, 0.0, DECODE)
    choice = choose([exact, lossy], [9.0, 5.0, 0.0], State(), speeds, speeds, 0.57)
    assert choice.qualities == (LOSSLESS, MEDIUM)
    choice = choose([exact, lossy], [9.0, 5.0, 0.0], State(), speeds, speeds, 0.51)
    assert choice.qualities == (LOSSLESS, LOW)


def test_what_is_cheap_to_compute_is_not_fetched() -> None:
    """A last chunk of many bytes: fetching it is slower than computing it."""
    chunks = [*chunks_of(3), Chunk(768, 16, 1000, {RAW: 50_000_000})]
    speeds = Speeds(1e7, 0.0, DECODE)
    choice = choose(chunks, [4.0, 3.0, 2.0, 0.1, 0.0], State(), speeds, speeds, 1.0)
    assert len(choice.qualities) == 3
    assert choice.finish_s <= 1.0
