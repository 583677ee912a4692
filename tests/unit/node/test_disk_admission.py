"""The admission filter: second sight, within what it remembers."""

from __future__ import annotations

import pytest

from kvstore.index.entry import ObjectKey
from kvstore.tiers.disk_admission import RejectFirst


def key(number: int) -> ObjectKey:
    return ObjectKey(bytes(32), number.to_bytes(32, "big"), 0)


def test_an_object_is_admitted_when_it_is_seen_again() -> None:
    admission = RejectFirst()
    assert [admission.admit(key(1)) for _ in range(3)] == [False, True, True]
    assert not admission.admit(key(1)._replace(part=1))
    assert not admission.admit(key(1)._replace(namespace_id=bytes(31) + b"x"))


@pytest.mark.parametrize("seen", [100, 150, 199, 1000, 1050])
def test_it_remembers_as_many_as_it_says_and_at_most_twice_as_many(seen: int) -> None:
    for back, remembered in ((1, True), (100, True), (200, False)):
        admission = RejectFirst(remembered=100)
        for number in range(seen):
            assert not admission.admit(key(number))
        if back <= seen:
            assert admission.admit(key(seen - back)) == remembered, back


def test_a_scan_of_what_never_comes_again_writes_nothing() -> None:
    admission = RejectFirst(remembered=1000)
    hot = [key(number) for number in range(50)]
    written = {"hot": 0, "scan": 0}
    for number in range(10_000):
        written["scan"] += admission.admit(key(1000 + number))
        written["hot"] += admission.admit(hot[number % 50])
    assert written == {"hot": 10_000 - 50, "scan": 0}
