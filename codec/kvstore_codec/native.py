"""The C++ coder behind the interface of `segments.SegmentCoder`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_codec import _native, tables
from kvstore_codec.arrays import Plane
from kvstore_codec.errors import DamagedObject, ErrorCode, ValuesError
from kvstore_codec.reference.lossless import SYMBOL_COSTS
from kvstore_codec.segments import LossySegment, SegmentCoder

_DTYPES = {"bfloat16": 0, "float16": 1, "float32": 2, "float8_e4m3fn": 3, "float8_e5m2": 4}

#: by Status (codec/native/core.hpp), from 1 on
_PROBLEMS = (
    "a segment is too short", "a segment's side information is wrong", "a segment's token classes are wrong",
    "a segment's step is out of range", "a segment has an impossible number of streams", "a stream exceeds its segment",
    "a segment has bytes left over", "an entropy coder's state is out of range", "an entropy-coded stream ends early",
    "an entropy-coded stream does not end where it should", "a segment names an unknown table",
    "a segment holds an impossible exponent", "a raw segment has the wrong length",
    "segment checksum does not match",
)  # fmt: skip
_NOT_FINITE = len(_PROBLEMS) + 1


class NativeCoder:
    """Stateless; safe to share between threads, which run in parallel (the GIL is released).

    `isa`: "scalar", "avx2", "avx512"; None: the best that the CPU has. The bytes and values are the same. Raises
    ValueError for one that this CPU, or this build, does not have."""

    def __init__(self, isa: str | None = None) -> None:
        found = {name: number for number, name in _native.instruction_sets()}
        if isa is not None and isa not in found:
            raise ValueError(f"no {isa} here: use one of {', '.join(found)}")
        self.isa = isa or list(found)[-1]
        self._coder = _native.Coder(
            tables.VALUES.freq.astype(np.uint16), tables.DIGITS.freq.astype(np.uint16), tables.SHRINKAGE,
            tables.SCALE_THRESHOLDS, tables.SCALE_VARIANCES, tables.EXPONENTS.freq.astype(np.uint16),
            SYMBOL_COSTS.astype(np.int32), found[self.isa],
        )  # fmt: skip

    def drain_tokens(
        self, groups: Sequence[Sequence[tuple[Plane, Plane]]], sinks: int, dtype: str, threads: int
    ) -> list[npt.NDArray[np.uint16]]:
        return self._coder.drain_tokens(groups, sinks, _DTYPES[dtype], threads)

    def encode_lossy(
        self, segments: Sequence[LossySegment], sinks: int, dtype: str, levels: int, threads: int
    ) -> list[list[bytes]]:
        arguments = [_segment(segment) for segment in segments]
        status, payloads = self._coder.encode_lossy(arguments, sinks, _DTYPES[dtype], levels, threads)
        if status == _NOT_FINITE:
            raise ValuesError('kv holds NaN, infinite or huge values: store it with quality="lossless"')
        return payloads

    def decode_lossy(
        self,
        segments: Sequence[LossySegment],
        payloads: Sequence[Sequence[memoryview]],
        sinks: int,
        dtype: str,
        threads: int,
    ) -> None:
        arguments = [_segment(segment) for segment in segments]
        buffers: Any = payloads  # any buffers will do, which the stub cannot say
        _check(self._coder.decode_lossy(arguments, buffers, sinks, _DTYPES[dtype], threads))

    def encode_lossless(self, segments: Sequence[Sequence[Plane]], dtype: str, threads: int) -> list[bytes]:
        return self._coder.encode_lossless(segments, _DTYPES[dtype], threads)

    def decode_lossless(
        self, segments: Sequence[Sequence[Plane]], payloads: Sequence[memoryview], dtype: str, threads: int
    ) -> None:
        buffers: Any = payloads
        _check(self._coder.decode_lossless(segments, buffers, _DTYPES[dtype], threads))


#: The one that everybody uses: its tables take some milliseconds and a megabyte to make.
NATIVE: SegmentCoder = NativeCoder()


def _check(status: int) -> None:
    """Raises DamagedObject."""
    if status:
        raise DamagedObject(_PROBLEMS[status - 1], code=ErrorCode.STRUCTURE)


def _segment(segment: LossySegment) -> Any:
    """As `_native.Coder` takes it: the tuple that it is, a profile's arrays in the place of the profile."""
    profile = segment.profile
    if profile is None:
        return segment
    basis = None if profile.basis is None else profile.basis.view(np.uint16)
    return (
        segment.planes,
        segment.drains,
        (profile.mean, profile.weight, basis, profile.scale_ids),
        segment.step_quarters,
    )
