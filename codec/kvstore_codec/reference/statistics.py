"""What the reader of a plane coded without a profile must know: step, channels' means and scales (FORMAT.md §4.1)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_codec import tables
from kvstore_codec.errors import DamagedObject, ErrorCode
from kvstore_codec.reference import bits
from kvstore_codec.reference.numerics import Float32s, sum_columns, sum_rows

Ints = npt.NDArray[Any]

MEAN_MAX = 2047  # in units of D/4 · 2^shift
MEAN_SHIFT_MAX = 31  # the encoder needs at most 14
#: a mean's unit is D/4; on fewer tokens a coarser one costs less than the bits it saves
MEAN_SHIFTS = ((32, 2), (64, 1))
RMS_MIN = 2.0**-100
#: The step is at least this much of the plane's peak, by quality layers: 16 bits hold twice it on the finest grid.
STEP_TO_PEAK_MIN = {1: 2.0**-13, 2: 2.0**-12, 3: 2.0**-10}
DRAINS_FINER = 8.0  # drain tokens are at step/8, so then it is at least this much more
STEP_MAX = 2.0**100  # also of a mean's unit: nothing decoded can overflow a float
ID_RAW_BITS = 7
MEAN_RAW_BITS = 12
_HEAD = struct.Struct("<fBBBB")  # step, mean shift, base id, Rice parameters of ids and means


@dataclass(frozen=True)
class Statistics:
    """Step D, and each channel's mean (float32) and scale id (0–63)."""

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


def measure(flat: Float32s, drained: Float32s, step_factor: float, levels: int = 3) -> Statistics:
    """Of one plane from its plain tokens, float32 [tokens, channels]. `drained`: the drain tokens, of which only the
    peak counts. They are few, but one may be far out in another layer of its group."""
    count, channels = flat.shape
    if count == 0 or channels == 0:
        return Statistics(np.float32(1), 0, np.zeros(channels, np.int64), np.zeros(channels, np.int64))
    x = flat.astype(np.float64)
    mean = sum_columns(x) / count
    square = sum_columns(x * x) / count
    rms = np.sqrt(sum_rows(np.maximum(square - mean * mean, 0.0)) / channels)
    peak = np.abs(x).max() * STEP_TO_PEAK_MIN[levels]
    if drained.size:
        peak = max(np.abs(x).max(), np.abs(drained).max()) * STEP_TO_PEAK_MIN[levels] * DRAINS_FINER
    step = np.float32(step_factor * max(rms, RMS_MIN))
    step = min(max(step, np.float32(peak)), np.float32(STEP_MAX))
    shift = next((shift for tokens, shift in MEAN_SHIFTS if count <= tokens), 0)
    quantum = float(step) * (0.25 * 2.0**shift)
    while np.abs(mean).max() > quantum * MEAN_MAX:
        shift, quantum = shift + 1, quantum * 2
    mean_steps = np.clip(np.rint(mean / quantum), -MEAN_MAX, MEAN_MAX).astype(np.int64)
    coded_mean = Statistics(step, shift, mean_steps, mean_steps).means.astype(np.float64)
    variance = np.maximum(square - coded_mean * (2.0 * mean - coded_mean), 0.0)
    step_squared = float(step) * float(step)
    scale_ids = np.searchsorted(tables.SCALE_THRESHOLDS * step_squared, variance, side="right")
    return Statistics(step, shift, mean_steps, scale_ids)


def write(measured: Statistics) -> bytes:
    ids, means = measured.scale_ids, bits.fold(measured.mean_steps)
    base = int(np.sort(ids)[(len(ids) - 1) // 2]) if len(ids) else 0
    ids = bits.fold(ids - base)
    id_k, mean_k = bits.rice_parameter(ids, ID_RAW_BITS), bits.rice_parameter(means, MEAN_RAW_BITS)
    coded = bits.rice_bits(ids, id_k, ID_RAW_BITS) + bits.rice_bits(means, mean_k, MEAN_RAW_BITS)
    return _HEAD.pack(measured.step, measured.mean_shift, base, id_k, mean_k) + bits.pack(coded)


def read(payload: memoryview, channels: int) -> tuple[Statistics, int]:
    """(statistics, bytes read). Raises DamagedObject."""
    if len(payload) < _HEAD.size:
        raise DamagedObject("a segment is too short", code=ErrorCode.STRUCTURE)
    step, shift, base, id_k, mean_k = _HEAD.unpack_from(payload)
    if not 2.0**-126 <= step <= STEP_MAX or shift > MEAN_SHIFT_MAX or step * 0.25 * 2.0**shift > STEP_MAX:
        raise DamagedObject("a segment's step is out of range", code=ErrorCode.STRUCTURE)
    if max(id_k, mean_k) >= bits.PARAMETERS:
        raise DamagedObject("a segment's side information is wrong", code=ErrorCode.STRUCTURE)
    reader = bits.BitReader(payload[_HEAD.size :])
    ids = base + bits.unfold(reader.rice(channels, id_k, ID_RAW_BITS))
    means = bits.unfold(reader.rice(channels, mean_k, MEAN_RAW_BITS))
    if channels and (ids.min() < 0 or ids.max() > tables.SCALE_ID_MAX or np.abs(means).max() > MEAN_MAX):
        raise DamagedObject("a segment's side information is wrong", code=ErrorCode.STRUCTURE)
    return Statistics(np.float32(step), shift, means, ids), _HEAD.size + reader.bytes_read
