"""The calibration-free nested codec ("CF"), in NumPy. FORMAT.md §4 is the same in prose.

Per plane: keys un-rotated, the channel's mean subtracted, uniform quantiser of step D = step_factor · rms. Each
refinement divides the step by 3: s₁ = 3·s₀ + r with r in {−1, 0, 1}. A channel enters at the first quality layer at
which its σ/step reaches a coded scale; later layers hold its digits. Tokens before position 4 (*sinks*) are stored
as they are; *drain* tokens, of far smaller norm than the median, are quantised at step/8.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_codec import tables
from kvstore_codec.arrays import Plane
from kvstore_codec.errors import DamagedObject, ErrorCode, ValuesError
from kvstore_codec.reference.numerics import (
    Float32s,
    from_float32,
    rotate,
    sum_columns,
    sum_rows,
    to_float32,
)  # fmt: skip
from kvstore_codec.reference.rans import (
    LANES,
    NO_RAW,
    StreamDecoder,
    StreamEncoder,
    join_streams,
    split_streams,
)  # fmt: skip
from kvstore_codec.segments import CodedPlane

DRAIN_K_NORM = 0.6  # of the median norm
DRAIN_V_NORM = 0.5
DRAIN_SCALE = np.float32(0.125)
MEAN_MAX = 2047  # 12 bits, in units of D/4 · 2^shift
MEAN_SHIFT_MAX = 31  # the encoder needs at most 14
RAW_MAX = 32767  # escaped values have 16 bits
RMS_MIN = 2.0**-100
RMS_TO_PEAK_MIN = 2.0**-20  # a constant plane still gets a step that its mean fits
RMS_TO_PEAK_MIN_DRAINS = 2.0**-9  # and drain tokens, at step/8, one at which the whole plane's range fits 16 bits
MAGNITUDE_MAX = 2.0**100
STEP_MAX = 2.0**100  # also of a mean's unit: nothing decoded can overflow a float

Ints = npt.NDArray[Any]


@dataclass(frozen=True)
class Statistics:
    """What the reader must know of a plane: step D, and each channel's mean (float32) and scale id (0–63)."""

    step: np.float32
    mean_shift: int
    mean_steps: Ints
    scale_ids: Ints

    @property
    def means(self) -> Float32s:
        quantum = self.step * np.float32(0.25) * np.float32(2.0**self.mean_shift)
        return self.mean_steps.astype(np.float32) * quantum

    @property
    def plain_scales(self) -> Ints:
        """Scale index of each channel at step D."""
        return self.scale_ids - tables.SCALE_ID_OFFSET

    @property
    def drain_scales(self) -> Ints:
        """Scale index of each channel's drain tokens at their step D/8.

        A drain token lies near zero, so it is the mean away from the mean, whatever the channel's σ. All its
        components are coded, quiet channels too: an outlier there may be all that such a token holds.
        """
        mean = self.mean_steps.astype(np.float64) * (0.25 * 2.0**self.mean_shift)
        energy = tables.SCALE_VARIANCES[self.scale_ids] + mean * mean
        scales = np.searchsorted(tables.SCALE_THRESHOLDS, energy, side="right") - tables.SCALE_ID_OFFSET
        return np.maximum(scales + tables.DRAIN_SHIFT, tables.SCALE_CODED_MIN)


@dataclass(frozen=True)
class Block:
    """Up to 32 components coded in lockstep over the tokens of one class.

    `rows`: each lane's table row (of VALUES if `entry`, else 3·scale of DIGITS).
    """

    components: Ints
    rows: Ints
    entry: bool
    drain: bool


def drain_tokens(k: Plane, v: Plane, sinks: int, dtype: str) -> npt.NDArray[np.uint16]:
    """See SegmentCoder. None if every token would be one."""
    tokens = k.shape[0]
    drain = np.zeros(tokens, bool)
    for plane, limit in ((k, DRAIN_K_NORM), (v, DRAIN_V_NORM)):
        values = to_float32(np.ascontiguousarray(plane), dtype).reshape(tokens, -1).astype(np.float64)
        energy = sum_rows(values * values)[sinks:]
        if energy.size:
            median = np.sort(energy)[(energy.size - 1) // 2]
            drain[sinks:] |= energy < median * (limit * limit)
    if drain[sinks:].all():
        drain[:] = False
    return np.flatnonzero(drain).astype(np.uint16)


def encode_lossy(
    planes: Sequence[CodedPlane], drains: npt.NDArray[np.uint16], sinks: int, dtype: str, levels: int
) -> list[bytes]:
    tokens = planes[0].bits.shape[0]
    plain = _plain_tokens(tokens, sinks, drains)
    statistics: list[Statistics] = []
    coded: list[Ints] = []
    for plane in planes:
        values = to_float32(np.array(plane.bits, order="C"), dtype)
        if not (np.abs(values[sinks:]) < MAGNITUDE_MAX).all():
            raise ValuesError('kv holds NaN, infinite or huge values: store it with quality="lossless"')
        values[:sinks] = 0
        flat = rotate(values, plane.rotation, inverse=True).reshape(tokens, -1)
        measured = _measure(flat[plain], flat[drains], plane.step_factor)
        statistics.append(measured)
        coded.append(_quantise(flat, measured, drains, levels))
    finest = np.concatenate(coded, axis=1)
    scales = _scales(statistics)
    payloads = []
    for level in range(levels):
        value = finest
        for _ in range(levels - 1 - level):
            value = _third(value)
        side = _write_side(planes, statistics, drains, sinks) if level == 0 else b""
        payloads.append(side + _encode_streams(value, scales, level, plain, drains))
    return payloads


def decode_lossy(payloads: Sequence[memoryview], planes: Sequence[CodedPlane], sinks: int, dtype: str) -> None:
    tokens = planes[0].bits.shape[0]
    drains, statistics, at = _read_side(payloads[0], planes, sinks)
    plain = _plain_tokens(tokens, sinks, drains)
    scales = _scales(statistics)
    value = np.zeros((tokens, len(scales[0])), np.int64)
    for level, payload in enumerate(payloads):
        value *= 3 if level else 1
        _decode_streams(payload[at if level == 0 else 0 :], value, scales, level, plain, drains)
    first = 0
    for plane, measured in zip(planes, statistics, strict=True):
        part = value[:, first : first + plane.channels]
        first += plane.channels
        flat = _reconstruct(part, measured, drains, len(payloads) - 1)
        rotated = rotate(flat.reshape(plane.bits.shape), plane.rotation, inverse=False)
        plane.bits[sinks:] = from_float32(rotated[sinks:], dtype)
    _read_sinks(payloads[0], planes, sinks, at)


def _plain_tokens(tokens: int, sinks: int, drains: Ints) -> Ints:
    plain = np.ones(tokens, bool)
    plain[:sinks] = False
    plain[drains] = False
    return np.flatnonzero(plain)


def _measure(flat: Float32s, drained: Float32s, step_factor: float) -> Statistics:
    """Step, means and scale ids of a plane from its plain tokens, float32 [tokens, channels]. `drained`: the drain
    tokens, of which only the peak counts. They are few, but one may be far out in another layer of its group."""
    count, channels = flat.shape
    if count == 0 or channels == 0:
        return Statistics(np.float32(1), 0, np.zeros(channels, np.int64), np.zeros(channels, np.int64))
    x = flat.astype(np.float64)
    mean = sum_columns(x) / count
    square = sum_columns(x * x) / count
    rms = np.sqrt(sum_rows(np.maximum(square - mean * mean, 0.0)) / channels)
    peak = np.abs(x).max() * RMS_TO_PEAK_MIN
    if drained.size:
        peak = max(np.abs(x).max(), np.abs(drained).max()) * RMS_TO_PEAK_MIN_DRAINS
    step = np.float32(step_factor * max(rms, peak, RMS_MIN))
    shift, quantum = 0, float(step) * 0.25
    while np.abs(mean).max() > quantum * MEAN_MAX:
        shift, quantum = shift + 1, quantum * 2
    mean_steps = np.clip(np.rint(mean / quantum), -MEAN_MAX, MEAN_MAX).astype(np.int64)
    coded_mean = Statistics(step, shift, mean_steps, mean_steps).means.astype(np.float64)
    variance = np.maximum(square - coded_mean * (2.0 * mean - coded_mean), 0.0)
    step_squared = float(step) * float(step)
    scale_ids = np.searchsorted(tables.SCALE_THRESHOLDS * step_squared, variance, side="right")
    return Statistics(step, shift, mean_steps, scale_ids)


def _quantise(flat: Float32s, measured: Statistics, drains: Ints, levels: int) -> Ints:
    """Integers on the finest grid, [tokens, channels]; coarser levels follow by exact division."""
    step = _step(measured, levels - 1)
    inverse = np.full((flat.shape[0], 1), np.float32(1) / step, np.float32)
    inverse[drains] = np.float32(1) / (step * DRAIN_SCALE)
    limit = _limit(levels - 1)
    with np.errstate(over="ignore"):
        scaled = np.clip((flat - measured.means) * inverse, np.float32(-limit), np.float32(limit))
    return np.rint(scaled).astype(np.int64)


def _step(measured: Statistics, level: int) -> np.float32:
    return np.float32(measured.step / np.float32(3**level))


def _limit(level: int) -> int:
    """Largest value on the grid of `level` whose value on every coarser grid fits 16 bits."""
    return int(RAW_MAX * 3**level)


def _third(value: Ints) -> Ints:
    """value / 3, to the nearest integer: never a tie, so the coarse grid is exactly the uniform one."""
    return np.sign(value) * ((np.abs(value) + 1) // 3)


def _scales(statistics: Sequence[Statistics]) -> tuple[Ints, Ints]:
    """Scale indices at the base step of all components: of plain tokens, of drain tokens."""
    plain = np.concatenate([s.plain_scales for s in statistics])
    return plain, np.concatenate([s.drain_scales for s in statistics])


def _blocks(scales: tuple[Ints, Ints], level: int, drains: bool) -> list[Block]:
    """Blocks of one quality layer, in coding order; first plain tokens, then drain tokens."""
    blocks = []
    for drain in (False, True) if drains else (False,):
        base = scales[drain]
        now = base + tables.LEVEL_SHIFT[level]
        before = base + tables.LEVEL_SHIFT[level - 1] if level else np.full_like(base, -1)
        entering = (now >= tables.SCALE_CODED_MIN) & (before < tables.SCALE_CODED_MIN)
        for entry, chosen, scale in (
            (True, entering, now),
            (False, before >= tables.SCALE_CODED_MIN, before),
        ):
            scale = np.minimum(scale, tables.SCALES - 1)
            components = np.flatnonzero(chosen)
            components = components[np.argsort(scale[components], kind="stable")]
            for first in range(0, len(components), LANES):
                lanes = components[first : first + LANES]
                blocks.append(Block(lanes, scale[lanes] if entry else 3 * scale[lanes], entry, drain))
    return blocks


def _encode_streams(value: Ints, scales: tuple[Ints, Ints], level: int, plain: Ints, drains: Ints) -> bytes:
    blocks = _blocks(scales, level, len(drains) > 0)
    symbols = sum(len(block.components) * len(drains if block.drain else plain) for block in blocks)
    coarse = _third(value)

    def encode(some: Sequence[Block]) -> bytes:
        encoder = StreamEncoder()
        for block in some:
            for token in drains if block.drain else plain:
                lanes = value[token, block.components]
                if block.entry:
                    _encode_values(encoder, block, lanes)
                else:
                    _encode_digits(encoder, block, lanes, coarse[token, block.components])
        return encoder.finish()

    return join_streams(blocks, symbols, encode)


def _encode_values(encoder: StreamEncoder, block: Block, values: Ints) -> None:
    values = np.clip(values, -RAW_MAX, RAW_MAX)
    symbols = np.where(np.abs(values) <= tables.VALUE_MAX, values + tables.VALUE_MAX, tables.ESCAPE)
    symbols = np.where(tables.VALUES.freq[block.rows, symbols] > 0, symbols, tables.ESCAPE)
    raw = np.where(symbols == tables.ESCAPE, values & 0xFFFF, NO_RAW)
    encoder.step(tables.VALUES, block.rows, symbols, raw)


def _encode_digits(encoder: StreamEncoder, block: Block, values: Ints, coarse: Ints) -> None:
    digits = (values - 3 * coarse) * np.where(coarse < 0, -1, 1)
    rows = block.rows + np.minimum(np.abs(coarse), 2)
    encoder.step(tables.DIGITS, rows, digits + 1, np.full(len(rows), NO_RAW))


def _decode_streams(
    payload: memoryview, value: Ints, scales: tuple[Ints, Ints], level: int, plain: Ints, drains: Ints
) -> None:
    """Adds one quality layer to `value` [tokens, components], which holds 3 × the coarser one."""
    for stream, blocks in split_streams(payload, _blocks(scales, level, len(drains) > 0)):
        decoder = StreamDecoder(stream)
        for block in blocks:
            for token in drains if block.drain else plain:
                if block.entry:
                    value[token, block.components] = _decode_values(decoder, block)
                else:
                    coarse = value[token, block.components] // 3
                    symbols = decoder.step(tables.DIGITS, block.rows + np.minimum(np.abs(coarse), 2))
                    value[token, block.components] += (symbols.astype(np.int64) - 1) * np.where(coarse < 0, -1, 1)
        decoder.finish()


def _decode_values(decoder: StreamDecoder, block: Block) -> Ints:
    symbols = decoder.step(tables.VALUES, block.rows)
    values = symbols.astype(np.int64) - tables.VALUE_MAX
    escaped = symbols == tables.ESCAPE
    values[escaped] = decoder.raw(int(escaped.sum())).astype(np.uint16).view(np.int16)
    return values


def _reconstruct(value: Ints, measured: Statistics, drains: Ints, level: int) -> Float32s:
    """Centroids times step, plus mean: float32 [tokens, channels]."""
    step = np.full((value.shape[0], 1), _step(measured, level), np.float32)
    step[drains] *= DRAIN_SCALE
    scale = np.tile(measured.plain_scales, (value.shape[0], 1))
    scale[drains] = measured.drain_scales
    scale = np.clip(scale + tables.LEVEL_SHIFT[level], 0, tables.SCALES - 1)
    inside = np.abs(value) <= tables.VALUE_MAX
    index = np.where(inside, value, 0) + tables.VALUE_MAX
    steps = np.where(inside, tables.CENTROIDS[scale, index], value.astype(np.float32))
    return steps * step + measured.means


def _write_side(planes: Sequence[CodedPlane], statistics: Sequence[Statistics], drains: Ints, sinks: int) -> bytes:
    parts = [struct.pack("<BBH", 0, 0, len(drains)), drains.astype("<u2").tobytes()]
    for measured in statistics:
        packed = measured.scale_ids | (measured.mean_steps & 0xFFF) << 6
        bits = np.unpackbits(packed.astype("<u4").view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")[:, :18]
        parts.append(struct.pack("<fB", measured.step, measured.mean_shift))
        parts.append(np.packbits(bits, bitorder="little").tobytes())
    parts.extend(np.ascontiguousarray(plane.bits[:sinks]).tobytes() for plane in planes)
    return b"".join(parts)


def _read_side(payload: memoryview, planes: Sequence[CodedPlane], sinks: int) -> tuple[Ints, list[Statistics], int]:
    """(drain tokens, statistics by plane, bytes read, the sinks' included)."""
    tokens = planes[0].bits.shape[0]
    if len(payload) < 4:
        raise DamagedObject("a segment is too short", code=ErrorCode.STRUCTURE)
    mode, reserved, count = struct.unpack_from("<BBH", payload)
    at = 4 + 2 * count
    if mode or reserved or len(payload) < at:
        raise DamagedObject("a segment's side information is wrong", code=ErrorCode.STRUCTURE)
    drains = np.frombuffer(payload[4:at], "<u2").astype(np.int64)
    if (np.diff(drains) <= 0).any():
        raise DamagedObject("a segment's side information is wrong", code=ErrorCode.STRUCTURE)
    if count and (drains[0] < sinks or drains[-1] >= tokens):
        raise DamagedObject("a segment's token classes are wrong", code=ErrorCode.STRUCTURE)
    statistics = []
    for plane in planes:
        size = 5 + (plane.channels * 18 + 7) // 8
        if len(payload) < at + size:
            raise DamagedObject("a segment is too short", code=ErrorCode.STRUCTURE)
        step, shift = struct.unpack_from("<fB", payload, at)
        quantum = step * 0.25 * 2.0**shift
        if not 2.0**-126 <= step <= STEP_MAX or shift > MEAN_SHIFT_MAX or quantum > STEP_MAX:
            raise DamagedObject("a segment's step is out of range", code=ErrorCode.STRUCTURE)
        bits = np.unpackbits(np.frombuffer(payload[at + 5 : at + size], np.uint8), bitorder="little")
        rows = bits[: plane.channels * 18].reshape(plane.channels, 18).astype(np.int64)
        packed = rows @ (1 << np.arange(18))
        means = ((packed >> 6) ^ 0x800) - 0x800
        statistics.append(Statistics(np.float32(step), shift, means, packed & 63))
        at += size
    at += sinks * sum(plane.channels * plane.bits.itemsize for plane in planes)
    if len(payload) < at:
        raise DamagedObject("a segment is too short", code=ErrorCode.STRUCTURE)
    return drains, statistics, at


def _read_sinks(payload: memoryview, planes: Sequence[CodedPlane], sinks: int, end: int) -> None:
    at = end - sinks * sum(plane.channels * plane.bits.itemsize for plane in planes)
    for plane in planes:
        size = sinks * plane.channels * plane.bits.itemsize
        plane.bits[:sinks] = np.frombuffer(payload[at : at + size], plane.bits.dtype).reshape(
            sinks, *plane.bits.shape[1:]
        )
        at += size
