"""Three questions about the codec's own structure: what nesting, small pages and repeated turns cost."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

import kvstore_codec as codec
from kvstore.evaluate.engine import Engine
from kvstore.evaluate.fidelity import Reference, fidelity, with_tail_recomputed
from kvstore.evaluate.rows import CodecRow, RowName

#: Each quality layer divides the quantiser's step by this (codec/FORMAT.md).
STEP_RATIO = 3.0


@dataclass(frozen=True)
class PrefixReading:
    """One object stored at `high` and read at `quality`, beside one of a single quality layer with that quality's step
    (the one with a profile is rounded to 2^(k/4)), which nothing can refine. Means over documents; the tail is
    recomputed."""

    profile: str | None
    quality: str
    read_bits_per_element: float
    read_kl: float
    alone_bits_per_element: float
    alone_kl: float


@dataclass(frozen=True)
class Generation:
    """A prefix built in turns, each computed on the decoded chunks of those before it, beside one pass (`once_kl`).

    Means over documents; the tail is recomputed."""

    row: RowName
    turns: int
    turns_kl: float
    once_kl: float


@dataclass(frozen=True)
class PageSize:
    """At the KL of `row`'s large chunks: bits that small ones need, interpolated between their qualities (bits against
    log KL)."""

    profile: str | None
    kl: float
    large_tokens: int
    large_bits_per_element: float
    small_tokens: int
    small_bits_per_element: float


def prefix_reading(
    engine: Engine, references: Sequence[Reference], row: CodecRow, known_kls: Mapping[str, Sequence[float]]
) -> list[PrefixReading]:
    """`row` gives layout and profile; its own quality does not matter. `known_kls`: the documents' KLs by the quality
    at which they were stored; what is read is not measured again where it is equal to that, bit for bit."""
    found = []
    stored = dataclasses.replace(row, quality=codec.Quality.HIGH)
    blobs = [stored.encode(one.kv) for one in references]
    for quality in (codec.Quality.LOW, codec.Quality.MEDIUM, codec.Quality.HIGH):
        same = dataclasses.replace(row, quality=quality)
        alone = dataclasses.replace(row, quality=codec.Quality.LOW, step=STEP_RATIO ** (1 - quality.lossy_layers))
        known = known_kls.get(quality.label, ())
        figures = []
        for index, (one, objects) in enumerate(zip(references, blobs, strict=True)):
            read = stored.restored(one.kv, [codec.truncate(blob, quality) for blob in objects])
            is_known = bool(known) and torch.equal(read.kv, same.restored(one.kv, same.encode(one.kv)).kv)
            read_kl = known[index] if is_known else _kl(engine, one, read.kv)
            own = alone.restored(one.kv, alone.encode(one.kv))
            own_kl = read_kl if torch.equal(read.kv, own.kv) else _kl(engine, one, own.kv)
            figures.append((read.bits_per_element, read_kl, own.bits_per_element, own_kl))
        found.append(PrefixReading(row.choice.name, quality.label, *map(statistics.fmean, zip(*figures, strict=True))))
    return found


def generation(
    engine: Engine, references: Sequence[Reference], row: CodecRow, turns: int, once_kl: float
) -> Generation:
    """`once_kl`: of the same row when the prefix is computed in one pass."""
    return Generation(
        row.name, turns, statistics.fmean(_turns_kl(engine, one, row, turns) for one in references), once_kl
    )


def _turns_kl(engine: Engine, reference: Reference, row: CodecRow, turns: int) -> float:
    prefix = reference.document.prefix
    chunks = len(prefix) // row.layout.chunk_tokens
    ends = sorted({round(chunks * turn / turns) * row.layout.chunk_tokens for turn in range(1, turns + 1)} - {0})
    kv: torch.Tensor | None = None
    first = 0
    for end in ends:
        computed = engine.extend(kv, prefix[first:end])[:, :, first:]
        decoded = row.decode(row.encode(computed, first), computed)
        kv = decoded if kv is None else torch.cat([kv, decoded], 2)
        first = end
    assert kv is not None
    return _kl(engine, reference, kv)


def _kl(engine: Engine, reference: Reference, kv: torch.Tensor) -> float:
    tail_new = with_tail_recomputed(engine, reference.document.prefix, reference.tail, kv)
    return fidelity(engine, reference, tail_new).kl


def page_sizes(points: Sequence[tuple[RowName, float, float]]) -> list[PageSize]:
    """`points`: (row, bits, KL) of lossy codec rows. Compares the largest chunk size with each smaller one, wherever
    the smaller one's KLs enclose the larger one's."""
    found = []
    series: dict[tuple[str | None, int], list[tuple[float, float]]] = {}
    for name, bits, kl in points:
        if kl > 0 and name.chunk_tokens is not None:
            series.setdefault((name.profile, name.chunk_tokens), []).append((math.log(kl), bits))
    for (profile, small), curve in series.items():
        large = max(tokens for other, tokens in series if other == profile)
        for log_kl, bits in series[profile, large] if small < large else ():
            interpolated = _interpolate(sorted(curve), log_kl)
            if interpolated is not None:
                found.append(PageSize(profile, math.exp(log_kl), large, bits, small, interpolated))
    return found


def _interpolate(curve: Sequence[tuple[float, float]], x: float) -> float | None:
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 <= x <= x1 and x0 < x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None
