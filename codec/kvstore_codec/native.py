"""The C++ coder behind the interface of `segments.SegmentCoder`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_codec import _native, tables
from kvstore_codec.arrays import Plane, contiguous_rows
from kvstore_codec.errors import DamagedObject, ErrorCode, ValuesError
from kvstore_codec.reference.lossless import SYMBOL_COSTS
from kvstore_codec.segments import CodedPlane, SegmentCoder

_DTYPES = {"bfloat16": 0, "float16": 1, "float32": 2, "float8_e4m3fn": 3, "float8_e5m2": 4}

#: by Status (codec/native/core.hpp), from 1 on
_PROBLEMS = (
    "a segment is too short", "a segment's side information is wrong", "a segment's token classes are wrong",
    "a segment's step is out of range", "a segment has an impossible number of streams", "a stream exceeds its segment",
    "a segment has bytes left over", "an entropy coder's state is out of range", "an entropy-coded stream ends early",
    "an entropy-coded stream does not end where it should", "a segment names an unknown table",
    "a segment holds an impossible exponent",
)  # fmt: skip
_NOT_FINITE = len(_PROBLEMS) + 1


class NativeCoder:
    """Stateless; safe to share between threads, which run in parallel (the GIL is released).

    `vector`: whether to use AVX-512 (None: where the CPU has it); the bytes and values are the same."""

    def __init__(self, *, vector: bool | None = None) -> None:
        self._coder = _native.Coder(
            tables.VALUES.freq.astype(np.uint16), tables.DIGITS.freq.astype(np.uint16), tables.CENTROIDS,
            tables.SCALE_THRESHOLDS, tables.SCALE_VARIANCES, tables.EXPONENTS.freq.astype(np.uint16),
            SYMBOL_COSTS.astype(np.int32), _native.has_avx512() if vector is None else vector,
        )  # fmt: skip

    def drain_tokens(self, k: Plane, v: Plane, sinks: int, dtype: str) -> npt.NDArray[np.uint16]:
        found: npt.NDArray[np.uint16] = self._coder.drain_tokens(_rows(k), _rows(v), sinks, _DTYPES[dtype])
        return found

    def encode_lossy(
        self, planes: Sequence[CodedPlane], drains: npt.NDArray[np.uint16], sinks: int, dtype: str, levels: int
    ) -> list[bytes]:
        arguments = [_argument(plane, _rows(plane.bits)) for plane in planes]
        status, payloads = self._coder.encode_lossy(arguments, drains, sinks, _DTYPES[dtype], levels)
        if status == _NOT_FINITE:
            raise ValuesError('kv holds NaN, infinite or huge values: store it with quality="lossless"')
        return payloads

    def decode_lossy(
        self, payloads: Sequence[memoryview], planes: Sequence[CodedPlane], sinks: int, dtype: str
    ) -> None:
        buffers = [np.frombuffer(payload, np.uint8) for payload in payloads]
        _into_rows(
            [plane.bits for plane in planes],
            lambda rows: self._coder.decode_lossy(
                buffers, [_argument(plane, row) for plane, row in zip(planes, rows, strict=True)], sinks, _DTYPES[dtype]
            ),
        )

    def encode_lossless(self, planes: Sequence[Plane], dtype: str) -> bytes:
        return self._coder.encode_lossless([_rows(plane) for plane in planes], _DTYPES[dtype])

    def decode_lossless(self, payload: memoryview, planes: Sequence[Plane], dtype: str) -> None:
        buffer = np.frombuffer(payload, np.uint8)
        _into_rows(planes, lambda rows: self._coder.decode_lossless(buffer, rows, _DTYPES[dtype]))


#: The one that everybody uses: its tables take some milliseconds and a megabyte to make.
NATIVE: SegmentCoder = NativeCoder()


def _argument(plane: CodedPlane, rows: Plane) -> Any:
    rotation = plane.rotation
    return rows, None if rotation is None else (rotation.cos, rotation.sin, rotation.interleaved), plane.step_factor


def _rows(plane: Plane) -> Plane:
    """The plane itself, or a copy where its memory is not in rows (an engine's head-major cache)."""
    return plane if contiguous_rows(plane) else np.ascontiguousarray(plane)


def _into_rows(planes: Sequence[Plane], decode: Callable[[list[Plane]], int]) -> None:
    """Decodes into the planes, through a copy of those whose memory is not in rows. Raises DamagedObject."""
    rows = [plane if contiguous_rows(plane) else np.empty(plane.shape, plane.dtype) for plane in planes]
    status = decode(rows)
    if status:
        raise DamagedObject(_PROBLEMS[status - 1], code=ErrorCode.STRUCTURE)
    for plane, row in zip(planes, rows, strict=True):
        if row is not plane:
            plane[...] = row
