"""Whose turn it is: nodes that have been failing come last, and are tried after a pause."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kvstore_client import failover as module
from kvstore_client.circuit import FAILURES_MAX, PAUSE_S
from kvstore_client.errors import (
    DeadlineExceeded,
    KvClientError,
    LimitExceeded,
    ProtocolViolation,
    ServerFailed,
    Unavailable,
)
from kvstore_client.failover import Failover


@dataclass(frozen=True)
class Seed:
    address: str


A, B, C = Seed("a:1"), Seed("b:1"), Seed("c:1")
GONE = Unavailable("gone", node="a:1")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def changes() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def failover(clock: Clock, changes: list[tuple[str, str]]) -> Failover:
    return Failover(3, lambda node, state: changes.append((node, state)))


def order(failover: Failover, *nodes: Seed) -> list[tuple[Seed, int]]:
    """In which they are asked, where none answers and none is judged."""
    return list(failover.turns(nodes))  # type: ignore[arg-type]


def fail(failover: Failover, node: Seed, error: KvClientError = GONE, times: int = FAILURES_MAX) -> None:
    for _ in range(times):
        failover.failed(node, error)  # type: ignore[arg-type]


def test_all_have_their_turn_and_share_what_is_left(failover: Failover) -> None:
    assert order(failover, A, B, C) == [(A, 3), (B, 2), (C, 1)]


def test_who_has_been_failing_comes_last_and_takes_no_share_of_the_others(
    failover: Failover, changes: list[tuple[str, str]]
) -> None:
    fail(failover, A, times=FAILURES_MAX - 1)
    assert order(failover, A, B, C) == [(A, 3), (B, 2), (C, 1)]
    fail(failover, A, times=1)
    assert order(failover, A, B, C) == [(B, 2), (C, 1), (A, 1)]
    fail(failover, C)
    assert order(failover, A, B, C) == [(B, 1), (A, 2), (C, 1)]
    assert changes == [("a:1", "open"), ("c:1", "open")]


def test_after_a_pause_one_call_tries(
    failover: Failover, clock: Clock, changes: list[tuple[str, str]]
) -> None:  # fmt: skip
    fail(failover, A)
    clock.now_s += PAUSE_S
    assert order(failover, A, B) == [(A, 2), (B, 1)]
    assert order(failover, A, B) == [(B, 1), (A, 1)], "the others do not wait for it"
    failover.answered(A)  # type: ignore[arg-type]
    assert order(failover, A, B) == [(A, 2), (B, 1)]
    assert changes == [("a:1", "open"), ("a:1", "closed")]


def test_who_is_alone_is_always_asked_and_never_judged(clock: Clock, changes: list[tuple[str, str]]) -> None:
    alone = Failover(1, lambda node, state: changes.append((node, state)))
    fail(alone, A)
    assert order(alone, A) == [(A, 1)]
    assert changes == []


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (GONE, True),
        (ServerFailed("inside"), True),
        (ProtocolViolation("lies"), True),
        (DeadlineExceeded("the node did not answer in time", node="a:1"), True),
        (DeadlineExceeded("the call's deadline passed while coding", seconds=1), False),
        (LimitExceeded("full"), False),
    ],
)
def test_what_is_held_against_a_node(failover: Failover, error: KvClientError, counts: bool) -> None:
    fail(failover, A, error)
    assert (order(failover, A, B)[0][0] is B) is counts
