"""The codec's coder, made to stop when its call is over.

A thread cannot be interrupted, but an object is coded segment by segment, each some tenths of a millisecond: after some
of them is the place to give up. (Raw objects are copied, not coded; that is not interrupted.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from kvstore_client.deadline import Deadline
from kvstore_client.errors import DeadlineExceeded
from kvstore_codec.arrays import Plane
from kvstore_codec.native import NATIVE
from kvstore_codec.segments import LossySegment

#: segments coded between two looks at the clock
BATCH_SEGMENTS = 8


class DeadlineCoder:
    """A SegmentCoder whose methods raise DeadlineExceeded once the deadline has passed, or after `stop()`."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def check(self) -> None:
        """Raises DeadlineExceeded."""
        if self._stopped or self._deadline.remaining() <= 0:
            raise DeadlineExceeded("the call's deadline passed while coding", seconds=self._deadline.seconds)

    def drain_tokens(
        self, groups: Sequence[Sequence[tuple[Plane, Plane]]], sinks: int, dtype: str, threads: int
    ) -> list[npt.NDArray[np.uint16]]:
        coded = (NATIVE.drain_tokens(groups[some], sinks, dtype, threads) for some in self._batches(len(groups)))
        return list(chain.from_iterable(coded))

    def encode_lossy(
        self, segments: Sequence[LossySegment], sinks: int, dtype: str, levels: int, threads: int
    ) -> list[list[bytes]]:
        batches = self._batches(len(segments))
        coded = (NATIVE.encode_lossy(segments[some], sinks, dtype, levels, threads) for some in batches)
        return list(chain.from_iterable(coded))

    def decode_lossy(
        self,
        segments: Sequence[LossySegment],
        payloads: Sequence[Sequence[memoryview]],
        sinks: int,
        dtype: str,
        threads: int,
    ) -> None:
        for some in self._batches(len(segments)):
            NATIVE.decode_lossy(segments[some], payloads[some], sinks, dtype, threads)

    def encode_lossless(self, segments: Sequence[Sequence[Plane]], dtype: str, threads: int) -> list[bytes]:
        coded = (NATIVE.encode_lossless(segments[some], dtype, threads) for some in self._batches(len(segments)))
        return list(chain.from_iterable(coded))

    def decode_lossless(
        self, segments: Sequence[Sequence[Plane]], payloads: Sequence[memoryview], dtype: str, threads: int
    ) -> None:
        for some in self._batches(len(segments)):
            NATIVE.decode_lossless(segments[some], payloads[some], dtype, threads)

    def _batches(self, segments: int) -> Iterator[slice]:
        for first in range(0, segments, BATCH_SEGMENTS):
            self.check()
            yield slice(first, first + BATCH_SEGMENTS)
