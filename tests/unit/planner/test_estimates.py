"""What was measured converges, fades, and is not fooled by one stall."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_client.planner.estimates import DECODE_PRIORS, LINK_PRIOR, DecodeEstimates, LatencyEstimate, RateEstimate
from kvstore_codec import Quality

MBYTE = 1e6


def seen(*rates: float, prior: float = LINK_PRIOR) -> RateEstimate:
    estimate = RateEstimate(prior)
    for number, rate in enumerate(rates):
        estimate.observe(rate, 1.0, float(number))
    return estimate


def test_nothing_seen_is_the_prior_and_not_known() -> None:
    assert seen().expected(0.0) == LINK_PRIOR
    assert seen().careful(0.0) < LINK_PRIOR
    assert not seen().known(0.0)


def test_one_piece_outweighs_the_prior() -> None:
    assert seen(MBYTE).expected(0.0) == MBYTE
    assert seen(MBYTE).known(0.0)


def test_one_stall_moves_neither_estimate_and_two_move_the_careful_one() -> None:
    steady = [10 * MBYTE] * 20
    assert seen(*steady, 1000).expected(21.0) == 10 * MBYTE
    assert seen(*steady, 1000).careful(21.0) == seen(*steady, 10 * MBYTE).careful(21.0)
    assert seen(*steady, 1000, 1000).careful(22.0) < MBYTE


@given(st.floats(1e3, 1e10), st.floats(1e3, 1e10))
def test_a_link_that_changed_is_known_after_a_few_pieces(before: float, after: float) -> None:
    estimate = seen(*[before] * 30, *[after] * 5)
    assert estimate.expected(35.0) == after


@given(st.lists(st.floats(1e3, 1e10), min_size=1, max_size=40))
def test_careful_is_no_more_than_expected_and_both_are_within_what_was_seen(rates: list[float]) -> None:
    estimate, now = seen(*rates), float(len(rates))
    assert 0 < estimate.careful(now) <= estimate.expected(now)
    assert min(*rates, LINK_PRIOR) <= estimate.expected(now) <= max(*rates, LINK_PRIOR)


def test_confidence_grows_with_pieces() -> None:
    careful = [seen(*[MBYTE] * count).careful(float(count)) for count in (1, 2, 5, 30)]
    assert careful == sorted(set(careful))
    assert careful[-1] == pytest.approx(MBYTE, rel=0.02)


def test_what_is_long_ago_is_not_known_any_more() -> None:
    estimate = seen(MBYTE, MBYTE)
    assert estimate.known(100.0)
    assert not estimate.known(1000.0)
    assert estimate.expected(10_000.0) == LINK_PRIOR


def test_work_that_was_held_up_only_raises_the_estimate() -> None:
    estimate = seen(MBYTE, MBYTE)
    estimate.observe(MBYTE / 2, 1.0, 3.0, at_least=True)
    assert estimate.expected(3.0) == MBYTE
    for _ in range(5):
        estimate.observe(4 * MBYTE, 1.0, 3.0, at_least=True)
    assert estimate.expected(3.0) == 4 * MBYTE


def test_work_that_took_no_time_says_nothing() -> None:
    estimate = seen()
    estimate.observe(1000, 0.0, 0.0)
    estimate.observe(0, 1.0, 0.0)
    assert not estimate.known(0.0)


def test_latency_is_the_median_of_the_last_ones() -> None:
    latency = LatencyEstimate()
    for seconds in (9.0, 0.002, 0.001, 0.003):
        latency.observe(seconds)
    assert latency.expected == 0.003
    for _ in range(9):
        latency.observe(0.02)
    assert latency.expected == 0.02


def test_decoding_is_learnt_by_quality_for_all_threads() -> None:
    decode = DecodeEstimates(threads=2)
    decode.observe(Quality.LOW, 1000, 1e-3, 0.0)
    decode.observe(Quality.HIGH, 3000, 1e-3, 0.0)
    assert decode.expected(0.0)[Quality.LOW] == pytest.approx(2e6)
    assert decode.expected(0.0)[Quality.HIGH] == pytest.approx(6e6)


def test_a_slow_machine_is_slow_at_qualities_that_were_not_measured_too() -> None:
    decode = DecodeEstimates(threads=2)
    before = decode.expected(0.0)
    for _ in range(3):
        decode.observe(Quality.MEDIUM, 1000, 10 * 1000 / DECODE_PRIORS[Quality.MEDIUM], 0.0)
    after = decode.expected(0.0)
    for quality in Quality:
        assert after[quality] == pytest.approx(before[quality] / 10)
