"""The circuit breaker: when it lets calls through, by a clock of our own."""

from __future__ import annotations

import random
import threading

import pytest
from fake_clock import FakeClock

from kvstore_client.circuit import FAILURES_MAX, PAUSE_S, PAUSE_S_MAX, Circuit


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def circuit(clock: FakeClock) -> Circuit:
    return Circuit(clock, random.Random(1))


def open_it(circuit: Circuit) -> None:
    for number in range(FAILURES_MAX):
        assert circuit.allow()
        assert circuit.fail() == (number == FAILURES_MAX - 1), "told once, when it opens"


def test_only_failures_in_a_row_open_it(circuit: Circuit) -> None:
    for _ in range(10):
        for _ in range(FAILURES_MAX - 1):
            assert circuit.allow()
            assert not circuit.fail()
        assert circuit.allow()
        assert not circuit.succeed()
    open_it(circuit)
    assert circuit.state == "open"
    assert not circuit.allow()


def test_after_a_pause_one_call_may_try(circuit: Circuit, clock: FakeClock) -> None:
    open_it(circuit)
    clock.now_s += PAUSE_S
    assert [circuit.allow() for _ in range(5)] == [True, False, False, False, False]
    assert circuit.state == "half-open"
    assert circuit.succeed(), "told when it closes"
    assert [circuit.allow() for _ in range(5)] == [True] * 5


def pauses(circuit: Circuit, clock: FakeClock, count: int) -> list[float]:
    """How long nothing is let through, before each of `count` tries that fail."""
    found = []
    for _ in range(count):
        start_s = clock.now_s
        while not circuit.allow():
            clock.now_s += 0.001
        found.append(clock.now_s - start_s)
        assert not circuit.fail(), "it opened long ago"
    return found


def test_pauses_double_up_to_a_limit_and_differ(clock: FakeClock) -> None:
    fleet = []
    for seed in range(20):
        circuit = Circuit(clock, random.Random(seed))
        open_it(circuit)
        fleet.append(pauses(circuit, clock, 8))
    for number, together in enumerate(zip(*fleet, strict=True)):
        longest = min(PAUSE_S * 2**number, PAUSE_S_MAX)
        assert longest / 2 - 0.01 <= min(together) <= max(together) <= longest + 0.01
        assert len({round(pause, 2) for pause in together}) > 10, "not all nodes come back at once"


def test_a_success_starts_the_pauses_anew(circuit: Circuit, clock: FakeClock) -> None:
    open_it(circuit)
    pauses(circuit, clock, 6)
    clock.now_s += PAUSE_S_MAX
    assert circuit.allow()
    circuit.succeed()
    open_it(circuit)
    assert pauses(circuit, clock, 1)[0] <= PAUSE_S + 0.01


def test_calls_from_before_it_opened_do_not_prolong_it(circuit: Circuit, clock: FakeClock) -> None:
    open_it(circuit)
    for _ in range(50):
        assert not circuit.fail()
    assert pauses(circuit, clock, 1)[0] <= PAUSE_S + 0.01


def test_a_try_that_never_ends_stands_in_the_way_for_one_pause(circuit: Circuit, clock: FakeClock) -> None:
    open_it(circuit)
    clock.now_s += PAUSE_S
    assert circuit.allow()
    assert not circuit.allow()
    clock.now_s += PAUSE_S
    assert circuit.allow()


def test_many_threads_get_one_try(circuit: Circuit, clock: FakeClock) -> None:
    open_it(circuit)
    clock.now_s += PAUSE_S
    start = threading.Barrier(16)
    allowed = []

    def ask() -> None:
        start.wait()
        allowed.append(circuit.allow())

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(allowed) == [False] * 15 + [True]
