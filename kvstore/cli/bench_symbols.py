"""The symbols that the codec codes, one byte each: what `kvstore bench codec` gives to other entropy coders.

A coder of segments (`segments.SegmentCoder`) that takes notes instead of coding. So planes, rotations, steps, profiles
and token classes are those that `kvstore_codec.encode` hands to the real one; quantising is the NumPy reference's.
Only a profile's transform is done by BLAS, whose sums round in another order, which now and then moves a value by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

import kvstore_codec as codec
from kvstore_codec import arrays, tables
from kvstore_codec.reference import lossless, lossy, statistics
from kvstore_codec.reference.numerics import Float32s, rotate, to_float32
from kvstore_codec.reference.value_streams import Plan, TokenClasses, third
from kvstore_codec.segments import LossySegment

SymbolBytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[Any]
#: models of `Symbols.models` from here on are rows of DIGITS, below it rows of VALUES
DIGIT_MODELS = tables.SCALES


@dataclass(frozen=True)
class Symbols:
    """One chunk's. `data` uint8: component by component, a component's tokens together, in the order of the codec's
    segments and blocks. `models` uint8 of the same shape: which table of the codec each is coded by (lossy), or which
    segment it is of, modulo 256 (exponents)."""

    data: SymbolBytes
    models: SymbolBytes


@dataclass
class SymbolReader:
    """See the module. `levels[q]`: quality layer q's symbols so far; lossless segments' are in `exponents`."""

    levels: list[list[Symbols]] = field(default_factory=lambda: [[] for _ in range(3)])
    exponents: list[Symbols] = field(default_factory=list)

    def drain_tokens(
        self, groups: Sequence[Sequence[tuple[arrays.Plane, arrays.Plane]]], sinks: int, dtype: str, threads: int
    ) -> list[npt.NDArray[np.uint16]]:
        return [lossy.drain_tokens(layers, sinks, dtype) for layers in groups]

    def encode_lossy(
        self, segments: Sequence[LossySegment], sinks: int, dtype: str, levels: int, threads: int
    ) -> list[list[bytes]]:
        for segment in segments:
            flat, grid, classes = _components(segment, sinks, dtype)
            value = lossy._quantise(flat, grid, classes, levels - 1)
            for level in reversed(range(levels)):
                coarse = third(value)
                plan = Plan.of(grid.scales, level, classes)
                self.levels[level].append(_coded(value, coarse, plan, level))
                value = coarse
        return [[b""] * levels for _ in segments]

    def encode_lossless(self, segments: Sequence[Sequence[arrays.Plane]], dtype: str, threads: int) -> list[bytes]:
        for planes in segments:
            for plane in planes:
                exponents, _ = lossless.FLOATS[dtype].split(arrays.read(plane).reshape(plane.shape[0], -1))
                data = exponents.T.astype(np.uint8).ravel()
                self.exponents.append(Symbols(data, np.full_like(data, len(self.exponents) % 256)))
        return [b""] * len(segments)

    def decode_lossy(
        self,
        segments: Sequence[LossySegment],
        payloads: Sequence[Sequence[memoryview]],
        sinks: int,
        dtype: str,
        threads: int,
    ) -> None:
        raise NotImplementedError("notes are not decoded")

    def decode_lossless(
        self, segments: Sequence[Sequence[arrays.Plane]], payloads: Sequence[memoryview], dtype: str, threads: int
    ) -> None:
        raise NotImplementedError("notes are not decoded")


def symbols_by_quality(
    chunk: codec.KVArray,
    layout: codec.KVLayout,
    qualities: Sequence[codec.Quality],
    first_position: int,
    profile: codec.Profile | None,
) -> dict[codec.Quality, Symbols]:
    """Of one chunk at each of `qualities` that has any ("raw" has not). Those of a lossy quality begin with those of
    the next coarser one, and share memory with them. Raises CodecError as `encode` does."""
    found = {}
    lossy_ones = [quality for quality in qualities if not quality.exact]
    if lossy_ones:
        reader = SymbolReader()
        finest = min(lossy_ones)
        codec.encode(chunk, layout, quality=finest, first_position=first_position, profile=profile, coder=reader)
        whole = _joined([part for level in reader.levels for part in level])
        sizes = np.cumsum([sum(len(part.data) for part in level) for level in reader.levels])
        for quality in lossy_ones:
            size = sizes[quality.lossy_layers - 1]
            found[quality] = Symbols(whole.data[:size], whole.models[:size])
    if codec.Quality.LOSSLESS in qualities:
        reader = SymbolReader()
        codec.encode(chunk, layout, quality="lossless", coder=reader)
        found[codec.Quality.LOSSLESS] = _joined(reader.exponents)
    return found


def _joined(parts: Sequence[Symbols]) -> Symbols:
    return Symbols(np.concatenate([part.data for part in parts]), np.concatenate([part.models for part in parts]))


def _components(segment: LossySegment, sinks: int, dtype: str) -> tuple[Float32s, lossy.Grid, TokenClasses]:
    """The numbers that are quantised, [tokens, components], as `lossy.encode_lossy` forms them."""
    planes, tokens = segment.planes, segment.planes[0].bits.shape[0]
    drains = segment.drains
    if drains is None:
        sides = [plane.bits for plane in planes]
        drains = lossy.drain_tokens(list(zip(sides[0::2], sides[1::2], strict=True)), sinks, dtype)
    classes = TokenClasses.of(tokens, sinks, drains)
    flats = []
    for plane in planes:
        values = to_float32(arrays.read(plane.bits), dtype)
        values[:sinks] = 0
        flats.append(rotate(values, plane.rotation, inverse=True).reshape(tokens, -1))
    flat = np.concatenate(flats, axis=1)
    if not (np.abs(flat) < lossy.MAGNITUDE_MAX).all():
        raise codec.ValuesError('kv holds NaN, infinite or huge values: store it with quality="lossless"')
    profile = segment.profile
    if profile is None:
        measured = [
            statistics.measure(x[classes.plain], x[classes.drains], plane.step_factor)
            for x, plane in zip(flats, planes, strict=True)
        ]
        return flat, lossy._measured_grid(measured), classes
    if profile.basis is not None:
        weighted: Float32s = (flat - profile.mean) * profile.weight
        flat = weighted @ profile.basis.astype(np.float32).T
    return flat, lossy._profile_grid(segment), classes


def _coded(values: Ints, coarse: Ints, plan: Plan, level: int) -> Symbols:
    """What quality layer `level` codes: values where a component enters, digits where it is refined."""
    data, models = [np.zeros(0, np.uint8)], [np.zeros(0, np.uint8)]
    for blocks, tokens in ((plan.drain, plan.classes.drains), (plan.plain, plan.classes.plain)):
        for block in blocks:
            lanes = np.ix_(tokens, block.components)
            value, parent = values[lanes].T, coarse[lanes].T
            if block.level == level:
                symbol = np.clip(value + tables.VALUE_MAX, 0, tables.ESCAPE)
                rows = np.broadcast_to(block.value_rows()[:, None], symbol.shape)
            else:
                symbol = (value - 3 * parent) * np.where(parent < 0, -1, 1) + 1
                rows = DIGIT_MODELS + block.digit_rows(level)[:, None] + np.minimum(np.abs(parent), 2)
            data.append(symbol.astype(np.uint8).ravel())
            models.append(rows.astype(np.uint8).ravel())
    return Symbols(np.concatenate(data), np.concatenate(models))
