"""The second thought of a planned get: what was fetched coarsely, made finer in the time that is left.

A coarse object is the beginning of the finer one, so that a prefix fetched at the coarsest quality first and refined
behind takes the same bytes as one fetched finely at once, and is in time whatever the link does in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore_client.planner.choose import Chunk, State
from kvstore_client.planner.estimates import Speeds
from kvstore_codec import Quality


@dataclass(frozen=True)
class Refine:
    """Fetch, for each of the first `last` chunks that is worse than `quality`, what it lacks to that, in one stream;
    what is not decoded `until_s` (seconds since the get began) is of no use."""

    last: int
    quality: Quality
    until_s: float


def refinement(
    chunks: Sequence[Chunk], held: Sequence[Quality], state: State, speeds: Speeds, until_s: float
) -> Refine | None:  # fmt: skip
    """The finest quality that all of the fetched chunks reach in time, or else the next better one for as many as do;
    None where that is none. `held`: what each of the fetched chunks is here at."""
    fetched = chunks[: len(held)]
    best: Refine | None = None
    for quality in sorted({quality for chunk in fetched for quality in chunk.bytes_at}, reverse=True):
        count = _refined_in_time(fetched, held, quality, state, speeds, until_s)
        if count == len(held) and any(quality < each for each in held):
            best = Refine(len(held), quality, until_s)
        elif count and best is None:
            return Refine(count, quality, until_s)
    return best


def _refined_in_time(
    fetched: Sequence[Chunk], held: Sequence[Quality], quality: Quality, state: State, speeds: Speeds, until_s: float
) -> int:
    """How many of the first chunks are at `quality` in time; 0 where none becomes better."""
    link, decoder, better = state.now + speeds.latency_s, state.decoder_free_s, False
    for count, (chunk, have) in enumerate(zip(fetched, held, strict=True)):
        target = chunk.no_better_than(quality)
        if target >= have:
            continue
        link += (chunk.bytes_at[target] - chunk.bytes_at[have]) / speeds.bytes_per_s
        decoder = max(decoder, link) + chunk.elements / speeds.decode[target]
        if decoder > until_s:
            return count if better else 0
        better = True
    return len(held) if better else 0
