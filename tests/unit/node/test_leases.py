"""Leases, on a clock that the test moves."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import kvstore.index.leases
from kvstore.index.columns import Columns
from kvstore.index.hash_table import Rows
from kvstore.index.leases import LEASE_ID_BYTES, Leases

A, B, C = 0, 1, 2


def rows(*numbers: int) -> Rows:
    return np.array(numbers, np.int64)


@pytest.fixture
def columns() -> Columns:
    made = Columns(tiers=1)
    for _ in range(5):
        made.take()
    return made


@pytest.fixture
def leases(columns: Columns) -> Leases:
    return Leases(columns)


def test_a_lease_holds_its_keys_until_it_expires(leases: Leases) -> None:
    lease_id = leases.take(rows(A, B), now_s=100.0, lease_s=5.0)
    assert len(lease_id) == LEASE_ID_BYTES
    leases.expire(104.999)
    assert (leases.holds(A), leases.holds(B), leases.holds(C)) == (True, True, False)
    leases.expire(105.0)
    assert not leases.holds(A)
    assert len(leases) == 0


def test_a_key_under_two_leases_is_held_until_the_later_one_ends(leases: Leases) -> None:
    long = leases.take(rows(A, B), now_s=0.0, lease_s=10.0)
    short = leases.take(rows(A), now_s=0.0, lease_s=1.0)
    assert long != short
    leases.expire(1.0)
    assert (len(leases), leases.holds(A), leases.holds(B)) == (1, True, True)
    leases.expire(10.0)
    assert not leases.holds(A)


def test_a_lease_that_is_renewed_in_time_holds_on_and_one_that_is_not_ends(leases: Leases) -> None:
    lease_id = leases.take(rows(A), now_s=0.0, lease_s=5.0)
    assert leases.renew(lease_id, now_s=4.0, lease_s=5.0)
    leases.expire(8.9)
    assert leases.holds(A)
    assert leases.renew(lease_id, now_s=8.9, lease_s=0.05), "a renewal never shortens"
    leases.expire(8.99)
    assert leases.holds(A)
    leases.expire(9.0)
    assert not leases.holds(A)
    assert not leases.renew(lease_id, now_s=9.0, lease_s=5.0)
    assert not leases.renew(bytes(LEASE_ID_BYTES), now_s=9.0, lease_s=5.0)
    assert not leases.holds(A)


def test_a_lease_that_is_released_lets_go_at_once(leases: Leases) -> None:
    lease_id = leases.take(rows(A, B), now_s=0.0, lease_s=5.0)
    other = leases.take(rows(B), now_s=0.0, lease_s=5.0)
    assert leases.release(lease_id)
    assert (leases.holds(A), leases.holds(B), len(leases)) == (False, True, 1)
    assert not leases.release(lease_id)
    assert leases.release(other)
    assert not leases.holds(B)


def test_an_object_that_took_the_row_of_one_that_was_leased_is_not_leased(leases: Leases, columns: Columns) -> None:
    lease_id = leases.take(rows(A, B), now_s=0.0, lease_s=5.0)
    columns.give_back(A)
    assert columns.take() == A
    assert not leases.holds(A)
    leases.take(rows(A), now_s=0.0, lease_s=9.0)
    assert leases.release(lease_id)
    assert (leases.holds(A), leases.holds(B)) == (True, False)


def test_a_chunk_that_is_named_twice_is_let_go_all_the_same(leases: Leases) -> None:
    lease_id = leases.take(rows(A, A, B), now_s=0.0, lease_s=5.0)
    assert leases.holds(A)
    assert leases.release(lease_id)
    assert not leases.holds(A)


def test_renewals_without_end_cost_no_memory(leases: Leases) -> None:
    lease_id = leases.take(rows(A), now_s=0.0, lease_s=1.0)
    for turn in range(10_000):
        assert leases.renew(lease_id, now_s=0.5 * turn, lease_s=1.0)
    assert len(leases._expiries) <= 100


@pytest.mark.parametrize(("wanted", "lease_s"), [([], 5.0), ([A], 0.0), ([A], -1.0)])
def test_nothing_to_hold_or_no_time_is_no_lease(wanted: list[int], lease_s: float, leases: Leases) -> None:
    assert leases.take(rows(*wanted), now_s=0.0, lease_s=lease_s) == b""
    assert len(leases) == 0
    assert not leases.holds(A)


def test_beyond_the_limit_there_are_no_leases_until_one_expires(
    monkeypatch: pytest.MonkeyPatch, leases: Leases
) -> None:
    monkeypatch.setattr(kvstore.index.leases, "LEASES_MAX", 2)
    assert leases.take(rows(A), now_s=0.0, lease_s=1.0)
    assert leases.take(rows(B), now_s=0.0, lease_s=9.0)
    assert leases.take(rows(C), now_s=0.5, lease_s=1.0) == b""
    assert not leases.holds(C)
    assert leases.take(rows(C), now_s=1.0, lease_s=1.0), "taking one lets go of what has expired"
    assert not leases.holds(A)


@given(st.lists(st.tuples(st.sets(st.integers(0, 4), min_size=1), st.integers(1, 30), st.integers(0, 10))))
def test_a_key_is_held_while_any_lease_on_it_runs(taken: list[tuple[set[int], int, int]]) -> None:
    """`taken`: (keys, seconds the lease runs, seconds until the next one is taken)."""
    columns = Columns(tiers=1)
    for _ in range(5):
        columns.take()
    leases = Leases(columns)
    model: list[tuple[set[int], float]] = []
    now_s = 0.0
    for numbers, lease_s, pause_s in taken:
        leases.take(rows(*numbers), now_s, lease_s)
        model.append((numbers, now_s + lease_s))
        now_s += pause_s
        leases.expire(now_s)
        running = [held for held, end_s in model if end_s > now_s]
        assert len(leases) == len(running)
        for number in range(5):
            assert leases.holds(number) == any(number in held for held in running)
    leases.expire(now_s + 30)
    assert (len(leases), int(columns["leases"].sum()), leases._expiries) == (0, 0, [])
