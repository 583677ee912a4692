"""What is refined behind a coarse prefix: all of it, as finely as there is time for, or the beginning of it."""

from __future__ import annotations

import pytest

from kvstore_client.planner.choose import Chunk, State
from kvstore_client.planner.estimates import Speeds
from kvstore_client.planner.refine import Refine, refinement
from kvstore_codec import Quality

LOW, MEDIUM, HIGH = Quality.LOW, Quality.MEDIUM, Quality.HIGH
CHUNKS = [Chunk(256 * at, 256, 1000, {LOW: 100, MEDIUM: 150, HIGH: 210}) for at in range(4)]


def refined(held: list[Quality], until_s: float, *, now: float = 1.0, decode: float = 1e9) -> Refine | None:
    """Over a link of 100 bytes a second with a latency of 0.1 s."""
    speeds = Speeds(100.0, 0.1, dict.fromkeys(Quality, decode))
    return refinement(CHUNKS, held, State(len(held), now, None, now), speeds, until_s)


@pytest.mark.parametrize(
    ("until_s", "expected"),
    [
        (1.55, None),  # the first chunk to medium takes until 1.6, latency included
        (1.65, (1, MEDIUM)),
        (2.65, (3, MEDIUM)),
        (3.15, (4, MEDIUM)),
        (5.4, (4, MEDIUM)),
        (5.55, (4, HIGH)),  # 4.4 s from low to high
    ],
)
def test_all_of_it_as_finely_as_there_is_time_for(until_s: float, expected: tuple[int, Quality] | None) -> None:
    found = refined([LOW] * 4, until_s)
    assert found == (None if expected is None else Refine(*expected, until_s))


def test_what_is_fine_already_takes_no_time() -> None:
    assert refined([HIGH, HIGH, LOW, LOW], 3.35) == Refine(4, HIGH, 3.35)
    assert refined([HIGH] * 4, 100.0) is None
    assert refined([HIGH, MEDIUM, MEDIUM, LOW], 1.62) == Refine(4, MEDIUM, 1.62)


def test_a_slow_decoder_is_reckoned_with() -> None:
    """Each chunk takes two seconds to decode, the link half of one."""
    assert refined([LOW] * 4, 6.0, decode=500.0) == Refine(2, MEDIUM, 6.0)


def test_nothing_that_came_is_nothing_to_refine() -> None:
    assert refined([], 100.0) is None
