"""What was measured converges, fades, and is not fooled by one stall."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_client.planner.estimates import (
    DECODE_PRIORS,
    DOUBT_S,
    LATENCY_PRIOR_S,
    LINK_PRIOR,
    DecodeEstimates,
    LatencyEstimate,
    LinkEstimate,
    RateEstimate,
)
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
    for seconds in (9.0, 0.002, 0.001, 0.003, 0.004):
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


def link(*rates: float, began: float = 0.0) -> LinkEstimate:
    """One piece a second."""
    estimate = LinkEstimate()
    for number, rate in enumerate(rates):
        estimate.observe(rate, 1.0, began + number)
    return estimate


def test_a_doubt_counts_like_a_piece_and_not_for_long() -> None:
    estimate = link()
    estimate.doubt(MBYTE, 1.0, 10.0)
    assert estimate.known(10.5)
    assert estimate.expected(10.5) == MBYTE
    assert estimate.doubted_s(10.25) == DOUBT_S - 0.25
    assert not estimate.known(10.0 + DOUBT_S)
    assert estimate.expected(10.0 + DOUBT_S) == LINK_PRIOR
    assert estimate.doubted_s(10.0 + DOUBT_S) == 0


def test_after_a_doubt_what_was_measured_before_holds_again() -> None:
    estimate, untouched = link(*[50 * MBYTE] * 3), link(*[50 * MBYTE] * 3)
    for _ in range(3):
        estimate.doubt(MBYTE, 1.0, 2.5)
    assert estimate.careful(3.0) < MBYTE < untouched.careful(3.0)
    assert estimate.careful(2.5 + DOUBT_S) == untouched.careful(2.5 + DOUBT_S)


def test_doubts_that_follow_each_other_hold_longer_and_longer() -> None:
    estimate, now, held = link(), 0.0, []
    for _ in range(8):
        estimate.doubt(MBYTE, 1.0, now)
        held.append(estimate.doubted_s(now))
        now += held[-1] + 5.0
    assert held == [1, 2, 4, 8, 16, 30, 30, 30]
    estimate.observe(MBYTE, 1.0, now)
    assert estimate.doubted_s(now + 0.1) == 0
    estimate.doubt(MBYTE, 1.0, now + 0.1)
    assert estimate.doubted_s(now + 0.1) == pytest.approx(DOUBT_S), "something was measured between them"


def test_gets_side_by_side_that_meet_one_trouble_have_one_doubt() -> None:
    estimate = link()
    for at in (0.0, 0.2, 0.4, 0.6):
        estimate.doubt(MBYTE, 1.0, at)
    assert estimate.doubted_s(0.6) == pytest.approx(DOUBT_S)


def test_what_is_measured_ends_a_doubt() -> None:
    estimate = link()
    estimate.doubt(MBYTE, 1.0, 0.0)
    estimate.observe(9 * MBYTE, 1.0, 0.1)
    assert estimate.expected(0.2) == 9 * MBYTE
    assert estimate.doubted_s(0.2) == 0


def test_a_peer_that_was_seen_to_fail_has_explained_its_doubts() -> None:
    estimate = link()
    for at in (0.0, 2.0, 6.0):
        estimate.doubt(MBYTE, 1.0, at)
    estimate.trust()
    assert not estimate.known(6.1)
    estimate.doubt(MBYTE, 1.0, 6.2)
    assert estimate.doubted_s(6.2) == pytest.approx(DOUBT_S), "and they are not counted any more"


def test_what_was_supposed_counts_until_it_is_settled() -> None:
    estimate, untouched = link(9 * MBYTE), link(9 * MBYTE)
    ours, others = estimate.suppose(MBYTE, 1.0, 1.0), estimate.suppose(2 * MBYTE, 1.0, 1.1)
    assert estimate.expected(1.2) == 2 * MBYTE
    estimate.settle([ours], measured=False)
    assert estimate.expected(1.2) == 2 * MBYTE
    estimate.settle([others], measured=False)
    assert (estimate.expected(1.2), estimate.careful(1.2)) == (untouched.expected(1.2), untouched.careful(1.2))
    estimate.settle([estimate.suppose(MBYTE, 1.0, 1.3)], measured=True)
    untouched.observe(MBYTE, 1.0, 1.3)
    assert (estimate.expected(1.4), estimate.careful(1.4)) == (untouched.expected(1.4), untouched.careful(1.4))


def test_a_first_answer_on_a_new_connection_stands_in_for_the_latency() -> None:
    latency = LatencyEstimate()
    assert latency.expected == pytest.approx(LATENCY_PRIOR_S)
    latency.observe(0.06, connected=False)
    assert latency.expected == pytest.approx(0.02)
    latency.observe(0.015)
    latency.observe(9.0, connected=False)
    assert latency.expected == 0.015


def test_of_two_latencies_the_shorter_is_expected() -> None:
    latency = LatencyEstimate()
    latency.observe(0.7)
    latency.observe(0.001)
    assert latency.expected == 0.001


def test_an_answer_that_took_as_long_as_a_doubt_does_not_end_it() -> None:
    estimate = link()
    estimate.doubt(MBYTE, 1.0, 10.0)
    estimate.answered(0.01, 10.9)
    assert not estimate.known(10.0 + DOUBT_S)
    estimate.answered(5.0, 15.5)
    assert estimate.doubted_s(15.6) == pytest.approx(DOUBT_S - 0.1)
    assert not estimate.known(15.5 + DOUBT_S)
    estimate.answered(5.0, 25.0)
    assert not estimate.known(25.0), "it was over before that was asked"
