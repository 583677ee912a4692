"""What a prefill engine promises, and how a decode engine waits for it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore_client.integrations.vllm.rendezvous import promise, promised, wait_for

PATIENT_S, IMPATIENT_S = 30.0, 0.1


def request(parameters: Any) -> SimpleNamespace:
    return SimpleNamespace(kv_transfer_params=parameters)


def test_a_promise_is_for_who_asked_and_reads_as_it_was_written() -> None:
    assert promise(request(None), 256) is None
    assert promise(request({"do_remote_decode": False}), 256) is None
    told = promise(request({"do_remote_decode": True}), 256)
    assert promised(request(told)) == 256


@pytest.mark.parametrize("parameters", [None, {}, {"kvstore_tokens": "all"}, {"kvstore_tokens": -1}])
def test_what_is_no_promise_is_not_waited_for(parameters: Any) -> None:
    assert promised(request(parameters)) == 0


def test_it_waits_until_enough_is_held() -> None:
    held = iter([0, 0, 128, 128, 256, 384])
    assert wait_for(256, lambda _: next(held), PATIENT_S, threading.Event()) == 256
    assert next(held) == 384, "it is not asked again"


def test_what_nobody_promised_is_asked_for_once() -> None:
    held = iter([0, 128])
    assert wait_for(0, lambda _: next(held), PATIENT_S, threading.Event()) == 0
    assert next(held) == 128


def test_what_does_not_grow_is_given_up_and_each_question_has_the_time_that_is_left() -> None:
    given_s: list[float] = []

    def held(seconds: float) -> int:
        given_s.append(seconds)
        return 128 if len(given_s) > 2 else 0

    assert wait_for(256, held, IMPATIENT_S, threading.Event()) == 128
    assert given_s[0] == IMPATIENT_S
    assert all(0 < seconds <= IMPATIENT_S for seconds in given_s)
    assert given_s[1] < IMPATIENT_S
    # What grew gave it new patience.
    assert given_s[3] > given_s[2]


def test_an_engine_that_ends_waits_for_nothing() -> None:
    closing = threading.Event()
    closing.set()
    asked: list[float] = []

    def held(seconds: float) -> int:
        asked.append(seconds)
        return 0

    assert wait_for(256, held, PATIENT_S, closing) == 0
    assert asked == [PATIENT_S]
