"""One deadline for a whole call."""

from __future__ import annotations

import math

import pytest
from fake_clock import FakeClock

from kvstore_client import InvalidArgument
from kvstore_client.deadline import SECONDS_MAX, Deadline, checked_seconds


def test_what_is_left_and_what_an_attempt_may_take() -> None:
    clock = FakeClock()
    deadline = Deadline(2.0, clock)
    assert (deadline.seconds, deadline.remaining(), deadline.share(4)) == (2.0, 2.0, 0.5)
    clock.now_s += 1.5
    assert (deadline.remaining(), deadline.share(2)) == (0.5, 0.25)
    clock.now_s += 9
    assert (deadline.remaining(), deadline.share(1)) == (0.0, 0.0)


@pytest.mark.parametrize("good", [1, 0.25, 1e-6, 3600])
def test_good_seconds(good: float) -> None:
    assert checked_seconds(good) == good


def test_a_deadline_beyond_what_grpc_can_count_is_a_long_one() -> None:
    assert checked_seconds(1e300) == SECONDS_MAX


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, True, "2", None])
def test_bad_seconds(bad: float) -> None:
    with pytest.raises(InvalidArgument, match="positive number of seconds"):
        checked_seconds(bad)
