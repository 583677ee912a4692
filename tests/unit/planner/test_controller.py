"""The controller: it measures, thinks again, gives up in time, and says why."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_client.planner.choose import Chunk
from kvstore_client.planner.controller import SLOWER_MAX, Controller, Stop, Task
from kvstore_client.planner.estimates import DOUBT_S, DecodeEstimates, PeerEstimates
from kvstore_codec import Quality

LOW, MEDIUM, HIGH = Quality.LOW, Quality.MEDIUM, Quality.HIGH
CHUNKS = 16
MBYTE = 1_000_000
Link = Callable[[float], float]  # bytes a second at a time


def task(ttft_s: float, recompute_s: float, chunks: int = CHUNKS) -> Task:
    stored = [Chunk(256 * i, 256, 1000, {LOW: MBYTE, MEDIUM: 1_600_000, HIGH: 2_200_000}) for i in range(chunks)]
    each = recompute_s / chunks
    return Task(stored, [each * (chunks - i) for i in range(chunks + 1)], 256 * chunks, ttft_s)


def peer(rate: float | None) -> PeerEstimates:
    known = PeerEstimates()
    known.latency.observe(0.001)
    for _ in range(20 if rate is not None else 0):
        known.link.observe(rate or 0.0, 1.0, 0.0)
    return known


def controller(ttft_s: float, recompute_s: float, rate: float | None) -> Controller:
    return Controller(task(ttft_s, recompute_s), peer(rate), DecodeEstimates(1), 0.0)


def drive(
    control: Controller, of: Task, link: Link, tick_s: float = 1e-3, message_bytes: int = 1, begin_s: float = 0.0
) -> tuple[float, list[Quality]]:
    """(when all is there, what was fetched) over a link whose rate is looked at every tick. `message_bytes`: what is
    seen of a chunk before it is whole is a multiple of that."""
    now = begin_s
    fetched: list[Quality] = []
    while (step := control.step(now)) is not None:
        for index in range(step.first, step.last):
            quality, begin, came = of.chunks[index].no_better_than(step.quality), now, 0.0
            while came < of.chunks[index].bytes_at[quality]:
                if now >= control.give_up_at and not control.late(
                    int(came // message_bytes) * message_bytes, now - begin, now
                ):
                    return now + of.recompute_s[len(fetched)], fetched
                came += tick_s * link(now)
                now += tick_s
            fetched.append(quality)
            if not control.arrived(int(came), now - begin, now):
                break
    now = _refined(control, of, link, tick_s, now, fetched)
    return now + of.recompute_s[len(fetched)], fetched


def _refined(
    control: Controller, of: Task, link: Link, tick_s: float, now: float, fetched: list[Quality]
) -> float:  # fmt: skip
    while (refine := control.refine(now)) is not None:
        for index in range(refine.last):
            chunk = of.chunks[index]
            target, begin, came = chunk.no_better_than(refine.quality), now, 0.0
            while target < fetched[index] and came < chunk.bytes_at[target] - chunk.bytes_at[fetched[index]]:
                if now - control.began >= refine.until_s:
                    return now
                came += tick_s * link(now)
                now += tick_s
            if target < fetched[index]:
                fetched[index] = target
                control.refined(index, refine.quality, int(came), now - begin, now)
    return now


def test_a_known_fast_link_brings_the_finest() -> None:
    step = controller(1.0, 10.0, 1e9).step(0.0)
    assert step is not None
    assert (step.first, step.last, step.quality) == (0, CHUNKS, HIGH)


def test_a_known_slow_link_is_not_asked() -> None:
    assert controller(1.0, 1.0, 1e6).step(0.0) is None


def test_an_unknown_peer_is_measured_by_the_coarsest_quality() -> None:
    of = task(0.6, 10.0)
    control = Controller(of, peer(None), DecodeEstimates(1), 0.0)
    ttft_s, fetched = drive(control, of, lambda _: 6e7)  # 16 MB at low: 0.27 s; 25.6 at medium: 0.43; 35.2: 0.59
    assert LOW not in fetched, "and made finer behind"
    assert HIGH in fetched
    assert len(fetched) == CHUNKS
    assert ttft_s <= 0.6


def test_slack_that_was_lost_makes_the_rest_coarser() -> None:
    of = task(0.6, 10.0)
    control = Controller(of, peer(5e7), DecodeEstimates(1), 0.0)  # medium all along: 0.51 s
    ttft_s, fetched = drive(control, of, lambda now: 5e7 if now < 0.1 else 3.5e7)
    assert fetched[0] is MEDIUM
    assert fetched[-1] is LOW
    assert len(fetched) == CHUNKS
    assert ttft_s <= 0.6


def test_slack_that_was_won_makes_the_rest_finer() -> None:
    of = task(0.6, 10.0)
    control = Controller(of, peer(3e7), DecodeEstimates(1), 0.0)
    ttft_s, fetched = drive(control, of, lambda now: 3e7 if now < 0.1 else 3e8)
    assert set(fetched) == {HIGH}
    assert ttft_s <= 0.6


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7])
def test_a_link_that_slows_down_to_a_tenth_costs_quality_and_not_the_deadline(share: float) -> None:
    """At 1e8 bytes a second the finest takes 0.35 s of 0.6; at 1e7 the coarsest takes 1.6."""
    of = task(0.6, 10.0)
    control = Controller(of, peer(1e8), DecodeEstimates(1), 0.0)
    step_s = max(0.2, share * 0.6)  # by then the coarsest may be there
    ttft_s, fetched = drive(control, of, lambda now: 1e8 if now < step_s else 1e7)
    assert ttft_s <= 0.6
    assert len(fetched) == CHUNKS


def test_what_is_refined_is_asked_for_in_the_time_that_is_left_alone() -> None:
    of = task(0.6, 10.0)
    control = Controller(of, peer(5e7), DecodeEstimates(1), 0.0)
    step = control.step(0.0)
    assert step is not None
    assert (step.quality, step.last) == (LOW, CHUNKS)
    assert control.refine(0.0) is None, "nothing has come"
    for at in range(CHUNKS):
        control.arrived(MBYTE, 0.02, 0.02 * (at + 1))
    refine = control.refine(0.32)
    assert refine is not None
    assert (refine.last, refine.quality) == (CHUNKS, MEDIUM)  # takes 0.19 s; to high 0.38
    assert 0.5 < refine.until_s < 0.6
    assert control.refine(0.57) is None


def test_what_began_coarsely_goes_on_so_in_one_stream() -> None:
    """Also where so little is left that the finest would do."""
    control = controller(0.6, 10.0, 5e7)
    step = control.step(0.0)
    assert step is not None
    assert step.quality is LOW
    assert all(control.arrived(MBYTE, 0.02, 0.02 * (at + 1)) for at in range(CHUNKS - 1))


def test_refining_leaves_the_time_that_the_rest_takes_to_compute_and_tells_of_the_link() -> None:
    control = controller(1.0, 1.6, 1e8)  # each chunk takes 0.1 s to compute
    step = control.step(0.0)
    assert step is not None
    assert step.quality is LOW
    for at in range(12):
        control.arrived(MBYTE, 0.01, 0.01 * (at + 1))
    refine = control.refine(0.12)
    assert refine is not None
    assert 0.5 < refine.until_s < 0.6
    before = control.plan(0.12).speeds.bytes_per_s
    for at in range(12):
        control.refined(at, refine.quality, MBYTE, 0.1, 0.12 + 0.1 * (at + 1))
    assert control.plan(1.32).speeds.bytes_per_s < before / 2


def test_a_link_that_dies_costs_little_more_than_recomputing() -> None:
    of = task(0.5, 4.0)
    control = Controller(of, peer(1e8), DecodeEstimates(1), 0.0)
    ttft_s, fetched = drive(control, of, lambda now: 1e8 if now < 0.1 else 0.0)
    assert 0 < len(fetched) < CHUNKS
    assert ttft_s <= 4.0 * (1 + SLOWER_MAX) + 0.01
    assert control.step(10.0) is None


@pytest.mark.parametrize("chunks", [2, 4, 8, 16])
@pytest.mark.parametrize("share", [0.9, 1.0, 1.5])
def test_a_link_too_slow_to_show_a_byte_is_soon_not_asked_any_more(share: float, chunks: int) -> None:
    """All that a get that gave up knows then is a bound, which is no speed to plan the next one with."""
    of, seen, decode = task(share, 1.0, chunks), peer(None), DecodeEstimates(1)
    asked = 0
    for get in range(20):
        control = Controller(of, seen, decode, 2.0 * get)
        if control.step(2.0 * get) is None:
            break
        asked += 1
        control = Controller(of, seen, decode, 2.0 * get)
        _, fetched = drive(control, of, lambda _: 1e5, message_bytes=MBYTE, begin_s=2.0 * get)
        assert not fetched
    assert asked <= 6


def asked(of: Task, seen: PeerEstimates, at: float, rate: float, message_bytes: int) -> Controller | None:
    """A get at a time; None where it asks for nothing."""
    control = Controller(of, seen, DecodeEstimates(1), at)
    if control.step(at) is None:
        return None
    control = Controller(of, seen, DecodeEstimates(1), at)
    drive(control, of, lambda _: rate, message_bytes=message_bytes, begin_s=at)
    return control


def test_who_is_silent_is_asked_again_in_a_second_and_not_often_in_ten_minutes() -> None:
    """A get every quarter of a second. The worst that each try costs is a twenty-fifth of one get."""
    of, seen = task(1.0, 1.0), peer(None)
    tries = [at / 4 for at in range(2400) if asked(of, seen, at / 4, 1e5, message_bytes=MBYTE) is not None]
    assert tries[0] == 0
    assert DOUBT_S < tries[1] < DOUBT_S + 0.5
    assert len(tries) < 30


def test_a_node_that_was_gone_for_a_moment_is_used_when_it_is_back() -> None:
    of, seen = task(1.0, 1.0), peer(None)
    first = asked(of, seen, 0.0, 0.0, message_bytes=1)
    assert first is not None
    assert first.stopped is Stop.SILENT
    skipped = Controller(of, seen, DecodeEstimates(1), 0.5)
    assert skipped.step(0.5) is None
    assert skipped.stopped is Stop.DOUBTED
    back = asked(of, seen, 0.1 + DOUBT_S, 1e9, message_bytes=1)
    assert back is not None
    assert (back.done, back.stopped) == (CHUNKS, None)


def test_bytes_that_come_too_slowly_are_a_measurement() -> None:
    of, seen = task(1.0, 1.0), peer(None)
    slow = asked(of, seen, 0.0, 1e5, message_bytes=1)
    assert slow is not None
    assert slow.stopped is Stop.LATE
    assert seen.link.expected(60.0) == pytest.approx(1e5, rel=0.1)
    assert seen.link.doubted_s(0.2) == 0
    again = Controller(of, seen, DecodeEstimates(1), 60.0)
    assert again.step(60.0) is None
    assert again.stopped is Stop.SLOW


def late(seen: PeerEstimates, size_bytes: int, silent_s: float) -> Controller:
    """A get that is given up 0.04 seconds after it has begun."""
    control = Controller(task(1.0, 1.0), seen, DecodeEstimates(1), 0.0)
    assert control.step(0.0) is not None
    assert not control.late(size_bytes, 0.04, 0.04, silent_s)
    return control


def test_who_falls_silent_in_the_middle_of_a_chunk_is_a_doubt() -> None:
    """10 kB at once and then nothing; against the same evenly, seen by the message."""
    gone, slow = peer(None), peer(None)
    assert late(gone, 10_000, silent_s=0.03).stopped is Stop.SILENT
    assert gone.link.known(0.1)
    assert not gone.link.known(0.1 + DOUBT_S)
    assert late(slow, 10_000, silent_s=0.019).stopped is Stop.LATE
    assert slow.link.known(0.1 + DOUBT_S)


@pytest.mark.parametrize("rate", [None, 1e8])
def test_a_fault_is_no_measurement(rate: float | None) -> None:
    """It breaks a chunk off of which little had come for a while."""
    of, seen, untouched = task(1.0, 10.0), peer(rate), peer(rate)
    control = Controller(of, seen, DecodeEstimates(1), 0.0)
    assert control.step(0.0) is not None
    assert control.late(MBYTE // 4, 0.1, 0.1)
    assert seen.link.expected(0.1) != untouched.link.expected(0.1) or rate
    control.broken()
    assert seen.link.known(0.2) == untouched.link.known(0.2)
    assert seen.link.careful(0.2) == untouched.link.careful(0.2)


def test_a_deadline_that_passes_while_bytes_come_is_a_measurement_and_in_silence_a_doubt() -> None:
    for size_bytes, measured in ((10_000, True), (0, False)):
        seen = peer(None)
        control = Controller(task(1.0, 10.0), seen, DecodeEstimates(1), 0.0)
        assert control.step(0.0) is not None
        control.overdue(size_bytes, 0.1, 0.1)
        assert seen.link.known(0.2)
        assert seen.link.known(0.2 + DOUBT_S) is measured


def test_what_was_spent_before_is_not_counted_against_a_first_try() -> None:
    """Connecting and the lookup took 0.1 s, and a twenty-fifth of computing it is 0.04."""
    of = task(1.0, 1.0)
    control = Controller(of, peer(None), DecodeEstimates(1), 0.0)
    assert control.step(0.1) is None
    assert control.stopped is Stop.UNMEASURED
    control = Controller(of, peer(None), DecodeEstimates(1), 0.0, spent_s=0.1)
    assert control.step(0.1) is not None
    assert control.give_up_at == pytest.approx(0.1 + SLOWER_MAX)


@settings(max_examples=60, deadline=None)  # a busy machine
@given(
    rate=st.floats(1e5, 1e10), recompute_s=st.floats(0.05, 5), share=st.floats(0.05, 2),
    known=st.one_of(st.none(), st.just(1.0)),
)  # fmt: skip
def test_never_slower_than_recomputing_on_a_steady_link(
    rate: float, recompute_s: float, share: float, known: float | None
) -> None:
    of = task(share * recompute_s, recompute_s)
    control = Controller(of, peer(rate if known else None), DecodeEstimates(1), 0.0)
    ttft_s, _ = drive(control, of, lambda _: rate, tick_s=recompute_s / 1000)
    assert ttft_s <= recompute_s * 1.05


def test_the_plan_explains_itself() -> None:
    plan = controller(0.6, 10.0, 5e7).plan(0.0)
    assert plan.meets_goal
    assert plan.fetched_tokens == 256 * CHUNKS
    assert plan.quality is MEDIUM
    assert "medium" in plan.reason
    assert "0–" in str(plan)
    assert str(plan).splitlines()[0] == plan.reason
    back = json.loads(json.dumps(plan.to_dict()))
    assert back["chunks"][0]["quality"] == "medium"
    assert back["ttft_s"] == plan.ttft_s
    assert back["fetched_bytes"] == sum(chunk.bytes for chunk in plan.chunks)


@pytest.mark.parametrize(
    ("ttft_s", "recompute_s", "rate", "said"),
    [
        (1.0, 0.1, 1e6, "recompute"),
        (0.1, 10.0, 1e7, "fastest"),
        (1.0, 10.0, None, "not been measured"),
    ],
)
def test_the_reason_is_the_one_that_decided(ttft_s: float, recompute_s: float, rate: float | None, said: str) -> None:
    assert said in controller(ttft_s, recompute_s, rate).plan(0.0).reason


def test_recomputed_chunks_are_planned_after_each_other() -> None:
    plan = controller(1.0, 0.1, 1e6).plan(0.0)
    assert plan.quality is None
    assert plan.fetched_bytes == 0
    assert plan.ttft_s == pytest.approx(0.1)
    ready = [chunk.ready_s for chunk in plan.chunks]
    assert ready == sorted(ready)
    assert ready[-1] == pytest.approx(plan.ttft_s)
