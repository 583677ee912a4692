"""Pins: what decays, what stays, and what their budgets refuse."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from kvstore.index.pins import Pins

A, B, C = 0, 1, 2


def test_a_soft_pin_runs_out_and_a_hard_one_does_not() -> None:
    pins = Pins(soft_bytes_max=100, hard_bytes_max=100)
    assert pins.pin(A, 10, until_s=5.0, now_s=0.0)
    assert pins.pin(B, 10, until_s=None, now_s=0.0)
    pins.expire(4.9)
    assert (pins.holds(A), pins.holds(B), pins.holds(C)) == (True, True, False)
    pins.expire(5.0)
    assert (pins.holds(A), pins.holds(B)) == (False, True)
    assert pins.hard_rows() == [B]
    assert pins.forget(B)
    assert not pins.forget(B)
    assert (pins.soft_bytes, pins.hard_bytes, len(pins)) == (0, 0, 0)


def test_beyond_the_soft_budget_those_with_the_least_time_left_go_first() -> None:
    pins = Pins(soft_bytes_max=25, hard_bytes_max=0)
    assert pins.pin(A, 10, until_s=5.0, now_s=0.0)
    assert pins.pin(B, 10, until_s=9.0, now_s=0.0)
    assert pins.pin(C, 10, until_s=7.0, now_s=0.0)
    assert (pins.holds(A), pins.holds(B), pins.holds(C)) == (False, True, True)
    assert not pins.pin(A, 10, until_s=1.0, now_s=0.0), "it has the least time left itself"
    assert not pins.pin(A, 26, until_s=99.0, now_s=0.0), "larger than the budget: nobody goes for it"
    assert (pins.holds(B), pins.holds(C)) == (True, True)


def test_beyond_the_hard_budget_a_pin_is_refused() -> None:
    pins = Pins(soft_bytes_max=100, hard_bytes_max=15)
    assert pins.pin(A, 10, until_s=None, now_s=0.0)
    assert pins.pin(B, 10, until_s=5.0, now_s=0.0)
    assert not pins.pin(B, 10, until_s=None, now_s=0.0)
    assert pins.holds(B), "its soft pin is still there"
    assert not pins.pin(C, 10, until_s=None, now_s=0.0)


def test_no_pin_is_shortened_or_softened() -> None:
    pins = Pins(soft_bytes_max=100, hard_bytes_max=100)
    pins.pin(A, 10, until_s=9.0, now_s=0.0)
    assert pins.pin(A, 10, until_s=5.0, now_s=0.0)
    pins.expire(8.0)
    assert pins.holds(A)
    assert pins.pin(A, 10, until_s=None, now_s=8.0)
    assert (pins.soft_bytes, pins.hard_bytes) == (0, 10)
    assert pins.pin(A, 10, until_s=20.0, now_s=8.0)
    pins.expire(30.0)
    assert pins.holds(A)


operations = st.lists(
    st.tuples(
        st.integers(0, 5),
        st.integers(1, 40),
        st.one_of(st.none(), st.integers(1, 20)),
        st.integers(0, 5),
        st.booleans(),
    )
)


@given(operations)
def test_budgets_hold_whatever_is_pinned_and_everything_soft_ends(
    todo: list[tuple[int, int, int | None, int, bool]],
) -> None:
    pins = Pins(soft_bytes_max=100, hard_bytes_max=60)
    now_s = 0.0
    for row, size, seconds, pause_s, take_back in todo:
        if take_back:
            pins.forget(row)
        else:
            pinned = pins.pin(row, size, None if seconds is None else now_s + seconds, now_s)
            assert not pinned or pins.holds(row)
        assert pins.soft_bytes <= 100
        assert pins.hard_bytes <= 60
        now_s += pause_s
    pins.expire(now_s + 30)
    assert pins.soft_bytes == 0
    assert len(pins) == len(pins.hard_rows())
    for row in pins.hard_rows():
        pins.forget(row)
    assert pins.hard_bytes == 0
