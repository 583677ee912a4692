"""Contestants of `kvstore bench codec` take turns, and what their seconds say.

Machines are noisy, so each round runs every contestant once, in rotating order; rates are medians over rounds, and a
ratio is the median of the ratios within each round. Every decode of every round is compared with what was encoded: a
codec that gives wrong bytes has no speed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from kvstore.cli.outcome import CommandFailed

BF16 = np.dtype(ml_dtypes.bfloat16)
MEMCPY, ZSTD, LZ4, CONSTRICTION, KVSTORE = "memcpy", "zstd-1", "lz4", "constriction", "kvstore"
POISON = 0xA5
#: A lossy decode off by this much, in units of the values' rms, has not decoded: doing nothing is off by 1.
ERROR_MAX = 0.9

Bits = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Contestant:
    """A coder, and what it codes: `of` names the quality whose symbols these are ("" for the KV's bytes as they are).

    `encode(i)` makes chunk i's bytes, `decode(encoded, i)` gives back what they were made of; both are what is timed.
    `as_given(decoded)` (not timed) is an array to be compared with `given[i]`: bf16 bits where `exact` is false.
    `elements`: values of KV in each of the chunks it codes, which may be the first few only.
    """

    coder: str
    of: str
    exact: bool
    given: Sequence[npt.NDArray[Any]]
    elements: Sequence[int]
    encode: Callable[[int], Any]
    decode: Callable[[Any, int], Any]
    as_given: Callable[[Any], npt.NDArray[Any]] = np.asarray
    threads: int = 1

    @property
    def name(self) -> str:
        """Unique in a run: "low", "low, 2 threads", "zstd-1 of low", "memcpy"."""
        if self.coder != KVSTORE:
            return f"{self.coder} of {self.of}" if self.of else self.coder
        return self.of if self.threads == 1 else f"{self.of}, {self.threads} threads"


@dataclass(frozen=True)
class Timing:
    """Wall-clock and CPU seconds of each round, and rates from the former. CPU seconds are the calling thread's, so
    only given where there is no other. Ratios are of rates (2.0: twice as fast as the other); None where it did not
    run.

    `to_zstd`: zstd on the same symbols. `to_zstd_by_cpu`: the same from CPU seconds, which other load disturbs least.
    """

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...] | None
    elements_per_second: float
    bytes_per_second: float
    to_memcpy: float
    to_zstd: float | None
    to_zstd_by_cpu: float | None
    to_one_thread: float | None


@dataclass(frozen=True)
class Result:
    """`elements`: of KV, also where symbols are coded. `error`: rms of the difference over rms of the values."""

    name: str
    coder: str
    of: str
    threads: int
    elements: int
    encoded_bytes: int
    bits_per_element: float
    ratio: float
    error: float
    encode: Timing
    decode: Timing


@dataclass(frozen=True)
class Spent:
    wall: float
    cpu: float

    @classmethod
    def on(cls, work: Callable[[], Any]) -> tuple[Any, Spent]:
        cpu, wall = time.thread_time(), time.perf_counter()
        done = work()
        return done, cls(time.perf_counter() - wall, time.thread_time() - cpu)


class Turns:
    """One contestant's times, sizes and errors so far."""

    def __init__(self, rival: Contestant) -> None:
        self.rival = rival
        self.encode: list[Spent] = []
        self.decode: list[Spent] = []
        self.encoded_bytes = 0
        self.error = 0.0

    def take(self) -> None:
        """Raises CommandFailed when what comes back is not what was given."""
        rival, indices = self.rival, range(len(self.rival.elements))
        encoded, spent = Spent.on(lambda: [rival.encode(index) for index in indices])
        self.encode.append(spent)
        decoded, spent = Spent.on(lambda: [rival.decode(encoded[index], index) for index in indices])
        self.decode.append(spent)
        self.encoded_bytes = sum(memoryview(one).nbytes for one in encoded)
        self.error = self._checked([rival.as_given(one) for one in decoded])

    def _checked(self, decoded: Sequence[npt.NDArray[Any]]) -> float:
        name, given = self.rival.name, self.rival.given[: len(decoded)]
        if self.rival.exact:
            for index, (one, back) in enumerate(zip(given, decoded, strict=True)):
                if not np.array_equal(one, back):
                    raise CommandFailed(f"{name}: chunk {index} decodes to other values than were encoded")
            error = 0.0
        else:
            error = relative_error(given, decoded)
            if not error < ERROR_MAX:
                raise CommandFailed(f"{name}: decoded values are off by {error:.2f} of their rms")
        for back in decoded:  # so that the next round cannot pass on this round's values
            if back.flags.writeable:
                back.view(np.uint8).fill(POISON)
        return error


def run(rivals: Sequence[Contestant], rounds: int) -> tuple[Result, ...]:
    """`rivals` must hold memcpy. Raises CommandFailed when one does not give back what it was given."""
    turns = {rival.name: Turns(rival) for rival in rivals}
    for rival in rivals:  # warm up
        Turns(rival).take()
    for number in range(rounds):
        shift = number % len(rivals)
        for rival in [*rivals[shift:], *rivals[:shift]]:
            turns[rival.name].take()
    return tuple(_result(done, turns) for done in turns.values())


def _result(done: Turns, turns: dict[str, Turns]) -> Result:
    rival = done.rival
    elements = sum(rival.elements)
    one_thread = turns.get(rival.of) if rival.coder == KVSTORE and rival.threads > 1 else None
    zstd = turns.get(f"{ZSTD} of {rival.of}")

    def timing(select: Callable[[Turns], list[Spent]]) -> Timing:
        def ratio(other: Turns | None, measure: Callable[[Spent], float]) -> float | None:
            if other is None:
                return None
            scale = elements / sum(other.rival.elements)
            pairs = zip(select(other), select(done), strict=True)
            return statistics.median(scale * measure(theirs) / measure(ours) for theirs, ours in pairs)

        seconds = tuple(one.wall for one in select(done))
        median = statistics.median(seconds)
        to_memcpy = ratio(turns[MEMCPY], lambda one: one.wall)
        assert to_memcpy is not None
        single = rival.threads == 1
        return Timing(
            seconds=seconds,
            cpu_seconds=tuple(one.cpu for one in select(done)) if single else None,
            elements_per_second=elements / median,
            bytes_per_second=elements * BF16.itemsize / median,
            to_memcpy=to_memcpy,
            to_zstd=ratio(zstd, lambda one: one.wall),
            to_zstd_by_cpu=ratio(zstd, lambda one: one.cpu) if single else None,
            to_one_thread=ratio(one_thread, lambda one: one.wall),
        )

    return Result(
        name=rival.name, coder=rival.coder, of=rival.of, threads=rival.threads, elements=elements,
        encoded_bytes=done.encoded_bytes, bits_per_element=8 * done.encoded_bytes / elements,
        ratio=elements * BF16.itemsize / done.encoded_bytes, error=done.error,
        encode=timing(lambda one: one.encode), decode=timing(lambda one: one.decode),
    )  # fmt: skip


def relative_error(given: Sequence[npt.NDArray[Any]], decoded: Sequence[npt.NDArray[Any]]) -> float:
    """Of bf16 bits: rms of the difference over rms of what was given."""
    wrong = total = 0.0
    for one, back in zip(given, decoded, strict=True):
        values = one.view(BF16).astype(np.float32)
        off = back.view(BF16).astype(np.float32) - values
        wrong += float(np.vdot(off, off))
        total += float(np.vdot(values, values))
    return math.sqrt(wrong / total) if total else float(wrong > 0)
