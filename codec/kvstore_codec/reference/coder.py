"""The NumPy coder behind the interface of `segments.SegmentCoder`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvstore_codec.arrays import Plane
from kvstore_codec.reference import lossless, lossy
from kvstore_codec.segments import LossySegment


class ReferenceCoder:
    """One segment after the other, whatever `threads` says."""

    def drain_tokens(
        self, groups: Sequence[Sequence[tuple[Plane, Plane]]], sinks: int, dtype: str, threads: int
    ) -> list[npt.NDArray[np.uint16]]:
        return [lossy.drain_tokens(layers, sinks, dtype) for layers in groups]

    def encode_lossy(
        self, segments: Sequence[LossySegment], sinks: int, dtype: str, levels: int, threads: int
    ) -> list[list[bytes]]:
        return [lossy.encode_lossy(segment, sinks, dtype, levels) for segment in segments]

    def decode_lossy(
        self,
        segments: Sequence[LossySegment],
        payloads: Sequence[Sequence[memoryview]],
        sinks: int,
        dtype: str,
        threads: int,
    ) -> None:
        for segment, layers in zip(segments, payloads, strict=True):
            lossy.decode_lossy(segment, layers, sinks, dtype)

    def encode_lossless(self, segments: Sequence[Sequence[Plane]], dtype: str, threads: int) -> list[bytes]:
        return [lossless.encode_lossless(planes, dtype) for planes in segments]

    def decode_lossless(
        self, segments: Sequence[Sequence[Plane]], payloads: Sequence[memoryview], dtype: str, threads: int
    ) -> None:
        for planes, payload in zip(segments, payloads, strict=True):
            lossless.decode_lossless(payload, planes, dtype)
