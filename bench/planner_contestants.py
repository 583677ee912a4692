"""Who takes part in `bench.planner`: the planner, and what it must beat. Each plays a case in virtual time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.planner_cases import DECODE_THREADS, Case
from kvstore_client.planner.choose import UTILITY
from kvstore_client.planner.controller import Controller
from kvstore_client.planner.estimates import DecodeEstimates, PeerEstimates
from kvstore_codec import Quality

LOSSY = (Quality.LOW, Quality.MEDIUM, Quality.HIGH)  # coarsest first


@dataclass(frozen=True)
class Outcome:
    """`qualities` of the chunks, None for a recomputed one; `ttft_s` from the lookup's answer on."""

    qualities: tuple[Quality | None, ...]
    ttft_s: float

    @property
    def fetched(self) -> list[Quality]:
        return [quality for quality in self.qualities if quality is not None]

    @property
    def utility(self) -> float:
        """Mean of the fetched chunks' (choose.UTILITY)."""
        return sum(UTILITY[quality] for quality in self.fetched) / len(self.fetched)


def played(case: Case, qualities: Sequence[Quality]) -> Outcome:
    """The first chunks fetched as given, the rest recomputed. Streams of one quality, one after the other."""
    link = decoder = 0.0
    flowing = None
    for index, quality in enumerate(qualities):
        link += case.link.latency_s if quality is not flowing else 0.0
        flowing = quality
        link = case.link.arrival(link, case.size_bytes[index][quality])
        decoder = max(decoder, link) + case.decode_s(index, quality)
    rest = (None,) * (len(case.task.chunks) - len(qualities))
    return Outcome((*qualities, *rest), decoder + case.task.recompute_s[len(qualities)])


def recompute(case: Case) -> Outcome:
    return played(case, ())


def fixed(quality: Quality) -> Callable[[Case], Outcome]:
    return lambda case: played(case, [quality] * len(case.task.chunks))


def cachegen(case: Case) -> Outcome:
    """CacheGen's released rule: each chunk gets an equal share of the deadline; the finest level whose bytes fit into
    it at the bandwidth of this moment (which it is told), else text if a chunk's recomputation fits, at the same price
    wherever the chunk is, else the coarsest level. Nothing is carried over. Text waits for all chunks before it."""
    chunks = len(case.task.chunks)
    share_s = case.deadline_s / chunks
    text_s = case.recompute_s / chunks
    link, ready = case.link.latency_s, 0.0
    qualities: list[Quality | None] = []
    for index, sizes in enumerate(case.size_bytes):
        rate = 1e6 / (case.link.arrival(link, 1e6) - link)
        fitting = [quality for quality in reversed(LOSSY) if sizes[quality] / rate <= share_s]
        quality = fitting[0] if fitting else (None if text_s <= share_s else Quality.LOW)
        qualities.append(quality)
        if quality is None:
            ready += case.task.recompute_s[index] - case.task.recompute_s[index + 1]
        else:
            link = case.link.arrival(link, sizes[quality])
            ready = max(ready, link) + case.decode_s(index, quality)
    return Outcome(tuple(qualities), ready + case.task.recompute_s[-1])


def oracle(case: Case) -> Outcome:
    """Knows the link's future and all sizes: the finest that keeps the deadline and is not slower than recomputing,
    among two neighbouring qualities with one change; where nothing is in time, the fastest."""
    chunks = len(case.task.chunks)
    budget_s = min(case.deadline_s, case.recompute_s)
    coarse = [played(case, [Quality.LOW] * count) for count in range(chunks + 1)]
    in_time = [outcome for outcome in coarse if outcome.ttft_s <= budget_s]
    if not in_time:
        return min(coarse, key=lambda outcome: outcome.ttft_s)
    best = in_time[-1]
    count = len(best.fetched)
    for one, other in itertools.pairwise(LOSSY):
        for before, after in ((one, other), (other, one)):
            best = max([best, *_splits(case, count, before, after, budget_s)], key=lambda outcome: outcome.utility
                       if outcome.fetched else 0.0)  # fmt: skip
    return best


def _splits(case: Case, count: int, before: Quality, after: Quality, budget_s: float) -> list[Outcome]:
    """The finest mixture in time of `count` chunks, by bisection over where the quality changes."""
    finer_first = before < after
    low, high = 0, count  # number of the finer ones
    found = []
    while low <= high:
        finer = (low + high) // 2
        split = finer if finer_first else count - finer
        outcome = played(case, [before] * split + [after] * (count - split))
        if outcome.ttft_s <= budget_s:
            found.append(outcome)
            low = finer + 1
        else:
            high = finer - 1
    return found


def planner(case: Case) -> Outcome:
    """The client's controller, which has never met this peer."""
    return _controlled(case, PeerEstimates())


def warm_planner(case: Case) -> Outcome:
    """The same after a get that ended half a minute ago, at the rate that the link began with."""
    peer = PeerEstimates()
    for _ in range(8):
        peer.link.observe(case.link.rates[0], 1.0, -30.0)
    return _controlled(case, peer)


def _controlled(case: Case, peer: PeerEstimates) -> Outcome:
    peer.latency.observe(case.link.latency_s)  # the lookup's
    decode = DecodeEstimates(DECODE_THREADS)
    controller = Controller(case.task, peer, decode, 0.0)
    now = decoder = 0.0
    qualities: list[Quality] = []
    while (step := controller.step(now)) is not None:
        begin = now + case.link.latency_s
        for index in range(step.first, step.last):
            quality = case.task.chunks[index].no_better_than(step.quality)
            size = case.size_bytes[index][quality]
            arrival = case.link.arrival(begin, size)
            waited = True
            while waited and arrival > controller.give_up_at:
                now = max(now, controller.give_up_at)
                came = max(0.0, case.link.sent_by(now) - case.link.sent_by(begin)) if now > begin else 0.0
                waited = controller.late(int(came), now - begin, now)
            if not waited:
                break
            now = arrival
            decoder = max(decoder, now) + case.decode_s(index, quality)
            qualities.append(quality)
            decode.observe(quality, case.task.chunks[index].elements,
                           case.decode_s(index, quality) * DECODE_THREADS, now)  # fmt: skip
            if not controller.arrived(int(size), now - begin, now):
                break
            begin = now
    now, decoder = _refined(case, controller, qualities, now, decoder)
    rest = (None,) * (len(case.task.chunks) - len(qualities))
    return Outcome((*qualities, *rest), max(now, decoder) + case.task.recompute_s[len(qualities)])


def _refined(
    case: Case, controller: Controller, qualities: list[Quality], now: float, decoder: float
) -> tuple[float, float]:
    """(when the last of it came that is used, when it is decoded)"""
    while (refine := controller.refine(now)) is not None:
        begin = now + case.link.latency_s
        for index in range(refine.last):
            target, have = case.task.chunks[index].no_better_than(refine.quality), qualities[index]
            if target >= have:
                continue
            size = case.size_bytes[index][target] - case.size_bytes[index][have]
            arrival = case.link.arrival(begin, size)
            ready = max(decoder, arrival) + case.decode_s(index, target)
            if ready > refine.until_s:
                return refine.until_s if arrival > refine.until_s else now, decoder
            controller.refined(index, target, int(size), arrival - begin, arrival)
            qualities[index], now, begin, decoder = target, arrival, arrival, ready
    return now, decoder


CONTESTANTS: dict[str, Callable[[Case], Outcome]] = {
    "recompute": recompute,
    "lossless": fixed(Quality.LOSSLESS),
    "high": fixed(Quality.HIGH),
    "medium": fixed(Quality.MEDIUM),
    "low": fixed(Quality.LOW),
    "CacheGen's rule": cachegen,
    "oracle": oracle,
    "planner": planner,
    "planner, warm": warm_planner,
}
FIXED = ("recompute", "lossless", "high", "medium", "low")
