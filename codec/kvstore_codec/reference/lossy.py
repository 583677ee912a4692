"""The nested lossy codec, in NumPy. FORMAT.md §4 is the same in prose.

Keys are un-rotated, a mean is subtracted, and every component is quantised uniformly on a grid of its own *unit*. Each
refinement divides the step by 3: s₁ = 3·s₀ + r with r in {−1, 0, 1}. Without a profile ("CF") components are channels,
the unit is the plane's step D, and means and scales travel in the object; a profile brings them, and may turn the
channels by a basis first. Tokens before position 4 (*sinks*) are stored as they are; *drain* tokens, of far smaller
norm than the median, are quantised at step/8.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_codec import arrays, tables
from kvstore_codec.arrays import Plane
from kvstore_codec.errors import DamagedObject, ErrorCode, ValuesError
from kvstore_codec.reference import statistics, transform
from kvstore_codec.reference.numerics import Float32s, from_float32, rotate, sum_rows, to_float32
from kvstore_codec.reference.value_streams import (
    VALUE_LIMIT,
    CodedScales,
    Plan,
    TokenClasses,
    decode_streams,
    encode_streams,
    third,
)
from kvstore_codec.segments import LossySegment

DRAIN_K_NORM = 0.5  # of the median norm
DRAIN_V_NORM = 0.25
DRAIN_SCALE = np.float32(0.125)
#: At most one token in so many is a drain token (about 1 % are, in real caches); the step of the others would else be
#: measured on too little.
DRAIN_TOKENS_DIVISOR = 2
MAGNITUDE_MAX, MAGNITUDE_MAX_PROFILE = np.float32(2.0**100), np.float32(2.0**60)
_SIDE = struct.Struct("<BbH")  # profile used, step exponent, drain tokens
#: 2^(k/4), k = 0…3, in float32
QUARTER_OCTAVES = tuple(np.float32(float.fromhex(h)) for h in ("0x1p0", "0x1.306fe0p0", "0x1.6a09e6p0", "0x1.ae89fap0"))

Ints = npt.NDArray[Any]


@dataclass(frozen=True)
class Grid:
    """What turns a component into integers and back: `mean` and `unit` (the base step) float32 [components]."""

    mean: Float32s
    unit: Float32s
    scales: CodedScales

    def step(self, level: int, drain: bool) -> Float32s:
        step = self.unit / np.float32(3**level)
        return step * DRAIN_SCALE if drain else step


def drain_tokens(layers: Sequence[tuple[Plane, Plane]], sinks: int, dtype: str) -> npt.NDArray[np.uint16]:
    """See SegmentCoder."""
    tokens = layers[0][0].shape[0]
    drain = np.zeros(tokens, bool)
    for k, v in layers:
        found = np.zeros(tokens, bool)
        for plane, limit in ((k, DRAIN_K_NORM), (v, DRAIN_V_NORM)):
            values = to_float32(arrays.read(plane), dtype).reshape(tokens, -1).astype(np.float64)
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused later
                energy = sum_rows(values * values)[sinks:]
            if energy.size:
                median = np.sort(energy)[(energy.size - 1) // 2]
                found[sinks:] |= energy < median * (limit * limit)
        if not found[sinks:].all():
            drain |= found
    if int(drain.sum()) * DRAIN_TOKENS_DIVISOR > tokens - sinks:
        drain[:] = False
    return np.flatnonzero(drain).astype(np.uint16)


def encode_lossy(segment: LossySegment, sinks: int, dtype: str, levels: int) -> list[bytes]:
    planes, tokens = segment.planes, segment.planes[0].bits.shape[0]
    drains = segment.drains
    if drains is None:
        sides = [plane.bits for plane in planes]
        drains = drain_tokens(list(zip(sides[0::2], sides[1::2], strict=True)), sinks, dtype)
    classes = TokenClasses.of(tokens, sinks, drains)
    flats = []
    for plane in planes:
        values = to_float32(arrays.read(plane.bits), dtype)
        values[:sinks] = 0
        with np.errstate(over="ignore", invalid="ignore"):
            flats.append(rotate(values, plane.rotation, inverse=True).reshape(tokens, -1))
    side = _SIDE.pack(segment.profile is not None, segment.step_quarters, len(drains)) + drains.astype("<u2").tobytes()
    flat = np.concatenate(flats, axis=1)
    if not (np.abs(flat) < (MAGNITUDE_MAX if segment.profile is None else MAGNITUDE_MAX_PROFILE)).all():
        raise ValuesError('kv holds NaN, infinite or huge values: store it with quality="lossless"')
    if segment.profile is None:
        measured = [
            statistics.measure(x[classes.plain], x[classes.drains], plane.step_factor, levels)
            for x, plane in zip(flats, planes, strict=True)
        ]
        side += b"".join(map(statistics.write, measured))
        grid = _measured_grid(measured)
    else:
        grid = _profile_grid(segment)
        if segment.profile.basis is not None:
            weighted = (flat - segment.profile.mean) * segment.profile.weight
            flat = transform.forward(weighted, segment.profile.basis, segment.profile.components)
    side += b"".join(arrays.read(plane.bits)[:sinks].tobytes() for plane in planes)
    finest = _quantise(flat, grid, classes, levels - 1)
    payloads = []
    for level in range(levels):
        value = finest
        for _ in range(levels - 1 - level):
            value = third(value)
        payloads.append(encode_streams(value, Plan.of(grid.scales, level, classes), level))
    return [side + payloads[0], *payloads[1:]]


def decode_lossy(segment: LossySegment, payloads: Sequence[memoryview], sinks: int, dtype: str) -> None:
    planes, tokens = segment.planes, segment.planes[0].bits.shape[0]
    drains, grid, at = _read_side(payloads[0], segment, sinks)
    classes = TokenClasses.of(tokens, sinks, drains)
    values = np.zeros((tokens, len(grid.unit)), np.int16)
    for level, payload in enumerate(payloads):
        decode_streams(payload[at if level == 0 else 0 :], values, Plan.of(grid.scales, level, classes), level)
    flat = _reconstruct(values, grid, classes, len(payloads) - 1)
    profile = segment.profile
    if profile is not None and profile.basis is not None:
        flat = transform.inverse(flat, profile.basis)
        flat = flat * (np.float32(1) / profile.weight) + profile.mean
    first = 0
    raw = payloads[0][at - sinks * sum(plane.channels * plane.bits.itemsize for plane in planes) : at]
    for plane in planes:
        part = flat[:, first : first + plane.channels].reshape(plane.bits.shape)
        first += plane.channels
        bits = from_float32(rotate(part, plane.rotation, inverse=False), dtype)
        size = sinks * plane.channels * plane.bits.itemsize
        bits[:sinks] = np.frombuffer(raw[:size], bits.dtype).reshape(sinks, *bits.shape[1:])
        raw = raw[size:]
        arrays.write(plane.bits, bits)


def _measured_grid(measured: Sequence[statistics.Statistics]) -> Grid:
    return Grid(
        np.concatenate([s.means for s in measured]),
        np.concatenate([np.full(len(s.scale_ids), s.step) for s in measured]),
        CodedScales(
            np.concatenate([s.plain_scales for s in measured]), np.concatenate([s.drain_scales for s in measured])
        ),
    )


def _profile_grid(segment: LossySegment, quarters: int | None = None) -> Grid:
    profile = segment.profile
    assert profile is not None
    quarters = segment.step_quarters if quarters is None else quarters
    step = QUARTER_OCTAVES[quarters % 4] * np.float32(2.0 ** (quarters // 4))
    plain = profile.scale_ids.astype(np.int64) - tables.SCALE_ID_OFFSET - quarters
    scales = CodedScales(plain, plain + tables.DRAIN_SHIFT)
    if profile.basis is None:
        return Grid(profile.mean, step * (np.float32(1) / profile.weight), scales)
    return Grid(np.zeros(profile.components, np.float32), np.full(profile.components, step), scales)


def _quantise(flat: Float32s, grid: Grid, classes: TokenClasses, level: int) -> Ints:
    """Integers on the grid of `level`, [tokens, components]; coarser levels follow by exact division."""
    values = np.zeros(flat.shape, np.int64)
    for drain, tokens in ((False, classes.plain), (True, classes.drains)):
        inverse = np.float32(1) / grid.step(level, drain)
        scaled = np.clip((flat[tokens] - grid.mean) * inverse, -VALUE_LIMIT, VALUE_LIMIT)
        values[tokens] = np.rint(scaled).astype(np.int64)
    return values


def _reconstruct(values: Ints, grid: Grid, classes: TokenClasses, level: int) -> Float32s:
    """(value less its shrinkage) · step + mean: float32 [tokens, components]."""
    flat = np.zeros(values.shape, np.float32)
    for drain, tokens in ((False, classes.plain), (True, classes.drains)):
        scale = (grid.scales.drain if drain else grid.scales.plain) + tables.LEVEL_SHIFT[level]
        shrinkage = tables.SHRINKAGE[np.clip(scale, 0, tables.SCALES - 1)]
        value = values[tokens].astype(np.float32)
        less = shrinkage[np.arange(len(scale)), np.minimum(np.abs(value), 3).astype(np.int64)]
        flat[tokens] = (value - np.copysign(less, value)) * grid.step(level, drain) + grid.mean
    return flat


def _read_side(payload: memoryview, segment: LossySegment, sinks: int) -> tuple[Ints, Grid, int]:
    """(drain tokens, grid, bytes read, the sinks' included)."""
    planes, tokens = segment.planes, segment.planes[0].bits.shape[0]
    if len(payload) < _SIDE.size:
        raise DamagedObject("a segment is too short", code=ErrorCode.STRUCTURE)
    by_profile, quarters, count = _SIDE.unpack_from(payload)
    at = _SIDE.size + 2 * count
    if by_profile != (segment.profile is not None) or (quarters and not by_profile) or len(payload) < at:
        raise DamagedObject("a segment's side information is wrong", code=ErrorCode.STRUCTURE)
    drains = np.frombuffer(payload[_SIDE.size : at], "<u2").astype(np.int64)
    if (np.diff(drains) <= 0).any():
        raise DamagedObject("a segment's side information is wrong", code=ErrorCode.STRUCTURE)
    if count and (drains[0] < sinks or drains[-1] >= tokens):
        raise DamagedObject("a segment's token classes are wrong", code=ErrorCode.STRUCTURE)
    if segment.profile is None:
        measured = []
        for plane in planes:
            read, size = statistics.read(payload[at:], plane.channels)
            measured.append(read)
            at += size
        grid = _measured_grid(measured)
    else:
        grid = _profile_grid(segment, quarters)
    at += sinks * sum(plane.channels * plane.bits.itemsize for plane in planes)
    if len(payload) < at:
        raise DamagedObject("a segment is too short", code=ErrorCode.STRUCTURE)
    return drains, grid, at
