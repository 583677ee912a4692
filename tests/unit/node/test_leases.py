"""Leases, on a clock that the test moves."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

import kvstore.index.leases
from kvstore.index.entry import ObjectKey
from kvstore.index.leases import LEASE_ID_BYTES, Leases


def keys(*numbers: int) -> list[ObjectKey]:
    return [ObjectKey(bytes(32), number.to_bytes(32, "big"), 0) for number in numbers]


A, B, C = keys(1, 2, 3)


def test_a_lease_holds_its_keys_until_it_expires() -> None:
    leases = Leases()
    lease_id = leases.take([A, B], now_s=100.0, lease_s=5.0)
    assert len(lease_id) == LEASE_ID_BYTES
    leases.expire(104.999)
    assert (leases.holds(A), leases.holds(B), leases.holds(C)) == (True, True, False)
    leases.expire(105.0)
    assert not leases.holds(A)
    assert len(leases) == 0


def test_a_key_under_two_leases_is_held_until_the_later_one_ends() -> None:
    leases = Leases()
    long = leases.take([A, B], now_s=0.0, lease_s=10.0)
    short = leases.take([A], now_s=0.0, lease_s=1.0)
    assert long != short
    leases.expire(1.0)
    assert (len(leases), leases.holds(A), leases.holds(B)) == (1, True, True)
    leases.expire(10.0)
    assert not leases.holds(A)


def test_a_key_named_twice_in_one_lease_is_let_go_with_it() -> None:
    leases = Leases()
    leases.take([A, A], now_s=0.0, lease_s=1.0)
    leases.expire(1.0)
    assert not leases.holds(A)
    assert not leases._counts


@pytest.mark.parametrize(("wanted", "lease_s"), [([], 5.0), ([A], 0.0), ([A], -1.0)])
def test_nothing_to_hold_or_no_time_is_no_lease(wanted: list[ObjectKey], lease_s: float) -> None:
    leases = Leases()
    assert leases.take(wanted, now_s=0.0, lease_s=lease_s) == b""
    assert len(leases) == 0
    assert not leases.holds(A)


def test_beyond_the_limit_there_are_no_leases_until_one_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvstore.index.leases, "LEASES_MAX", 2)
    leases = Leases()
    assert leases.take([A], now_s=0.0, lease_s=1.0)
    assert leases.take([B], now_s=0.0, lease_s=9.0)
    assert leases.take([C], now_s=0.5, lease_s=1.0) == b""
    assert not leases.holds(C)
    assert leases.take([C], now_s=1.0, lease_s=1.0), "taking one lets go of what has expired"
    assert not leases.holds(A)


@given(st.lists(st.tuples(st.sets(st.integers(0, 4), min_size=1), st.integers(1, 30), st.integers(0, 10))))
def test_a_key_is_held_while_any_lease_on_it_runs(taken: list[tuple[set[int], int, int]]) -> None:
    """`taken`: (keys, seconds the lease runs, seconds until the next one is taken)."""
    leases = Leases()
    model: list[tuple[set[int], float]] = []
    now_s = 0.0
    for numbers, lease_s, pause_s in taken:
        leases.take(keys(*numbers), now_s, lease_s)
        model.append((numbers, now_s + lease_s))
        now_s += pause_s
        leases.expire(now_s)
        running = [held for held, end_s in model if end_s > now_s]
        assert len(leases) == len(running)
        for number in range(5):
            assert leases.holds(keys(number)[0]) == any(number in held for held in running)
    leases.expire(now_s + 30)
    assert (len(leases), len(leases._counts), leases._expiries) == (0, 0, [])
