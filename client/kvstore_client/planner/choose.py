"""The choice itself: how much of a stored prefix to fetch, at which qualities, and what to recompute.

An engine takes a prefix, so what is recomputed is a suffix. The bytes of chunks come one after the other; each is
decoded while the next arrives; then the engine computes the rest (docs/design/0018).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore_client.planner.estimates import Speeds
from kvstore_codec import Quality

#: Decades of KL against the exact cache that a quality is clear of, −log10 of the KL in docs/codec-evaluation.md (CF,
#: tail recomputed: low 0.0053, medium 4.9e-4, high 6.2e-5). Exact KV would be infinitely far: 5, which is far below the
#: 1e-3 that bfloat16 arithmetic itself differs by.
UTILITY = {Quality.RAW: 5.0, Quality.LOSSLESS: 5.0, Quality.HIGH: 4.2, Quality.MEDIUM: 3.3, Quality.LOW: 2.3}


@dataclass(frozen=True)
class Chunk:
    """A stored chunk that may be fetched: `bytes_at` by quality, coarsest first, never empty."""

    first_token: int
    tokens: int
    elements: int
    bytes_at: dict[Quality, int]

    def no_better_than(self, cap: Quality) -> Quality:
        """The finest quality that can be read under `cap`, or the coarsest there is."""
        return min((quality for quality in self.bytes_at if quality >= cap), default=next(iter(self.bytes_at)))


@dataclass(frozen=True)
class State:
    """Where a get stands: `done` chunks are there `now` (seconds since it began), and the stream that is open brings
    `flowing` (None: a request costs its latency first). `decoder_free_s`: when what has come is decoded."""

    done: int = 0
    now: float = 0.0
    flowing: Quality | None = None
    decoder_free_s: float = 0.0


@dataclass(frozen=True)
class Choice:
    """Qualities of the chunks from `state.done` on that are fetched; what follows is recomputed.

    `ready_s`: when each is decoded; `finish_s`: when all of the prompt is there, seconds since the get began."""

    qualities: tuple[Quality, ...]
    ready_s: tuple[float, ...]
    finish_s: float


def ready_times(chunks: Sequence[Chunk], qualities: Sequence[Quality], state: State, speeds: Speeds) -> list[float]:
    """When each of `chunks` is decoded: a pipeline of two stages, link and decoder. A stream has one quality, so that
    another quality costs another request."""
    link, decoder, flowing = state.now, state.decoder_free_s, state.flowing
    ready = []
    for chunk, quality in zip(chunks, qualities, strict=True):
        if quality is not flowing:
            link += speeds.latency_s
            flowing = quality
        link += chunk.bytes_at[quality] / speeds.bytes_per_s
        decoder = max(decoder, link) + chunk.elements / speeds.decode[quality]
        ready.append(decoder)
    return ready


def choose(
    chunks: Sequence[Chunk], recompute_s: Sequence[float], state: State, careful: Speeds, expected: Speeds,
    budget_s: float,
) -> Choice:  # fmt: skip
    """The finest qualities that are ready within `budget_s`; where nothing is, the fastest way there is.

    `chunks`: the whole stored prefix; `recompute_s[i]`: seconds to compute all of the prompt from chunk i on, so one
    more than chunks. `careful` speeds keep the budget, `expected` ones say what is fastest.
    """
    left = chunks[state.done :]
    caps = sorted({quality for chunk in left for quality in chunk.bytes_at})
    uniform = {cap: [chunk.no_better_than(cap) for chunk in left] for cap in caps}
    in_time = {
        cap: _in_time(_finishes(ready_times(left, uniform[cap], state, careful), recompute_s, state), budget_s)
        for cap in caps
    }
    count = max(in_time.values(), default=-1)
    if count <= 0:
        # Nothing of it, or nothing at all, is in time: the fastest, in which recomputing it all has its chance.
        finishes = {
            cap: _finishes(ready_times(left, uniform[cap], state, expected), recompute_s, state) for cap in caps
        }
        _, fewer, cap = min(
            ((at, -count, cap) for cap in caps for count, at in enumerate(finishes[cap])), default=(0.0, 0, None)
        )
        qualities = uniform[cap][:-fewer] if cap is not None else []
        return _choice(left[:-fewer], qualities, recompute_s, state, expected)
    finest = next(index for index, cap in enumerate(caps) if in_time[cap] == count)
    left, qualities = left[:count], uniform[caps[finest]][:count]
    if finest > 0:
        rest_s = recompute_s[state.done + count]
        qualities = _finer_tail(
            qualities, uniform[caps[finest - 1]],
            lambda mixed: ready_times(left, mixed, state, careful)[-1] + rest_s <= budget_s,
        )  # fmt: skip
    return _choice(left, qualities, recompute_s, state, careful)


def _in_time(finishes: Sequence[float], budget_s: float) -> int:
    """Most chunks to fetch such that all of the prompt is ready in time, −1 where no number is. The most, since what a
    cache is there to save is the engine's time."""
    return max((count for count, at in enumerate(finishes) if at <= budget_s), default=-1)


def _finishes(ready: Sequence[float], recompute_s: Sequence[float], state: State) -> list[float]:
    """When the prompt is there, by the number of chunks that are fetched."""
    start = max(state.now, state.decoder_free_s)
    return [at + recompute_s[state.done + count] for count, at in enumerate([start, *ready])]


def _finer_tail(
    qualities: Sequence[Quality], finer: Sequence[Quality], in_time: Callable[[Sequence[Quality]], bool]
) -> list[Quality]:
    """`finer` for as many of the last chunks as fit. The last: should the link slow down before, they are not begun."""
    low, high, count = 0, len(qualities), len(qualities)  # the first finer chunk lies in (low, high]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if in_time([*qualities[:middle], *finer[middle:count]]) else (middle, high)
    return [*qualities[:high], *finer[high:count]]


def _choice(
    chunks: Sequence[Chunk], qualities: Sequence[Quality], recompute_s: Sequence[float], state: State, speeds: Speeds
) -> Choice:  # fmt: skip
    ready = ready_times(chunks, qualities, state, speeds)
    end = ready[-1] if ready else max(state.now, state.decoder_free_s)
    return Choice(tuple(qualities), tuple(ready), end + recompute_s[state.done + len(chunks)])
