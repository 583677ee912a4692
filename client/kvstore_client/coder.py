"""The codec's coder, made to stop when its call is over.

A thread cannot be interrupted, but an object is coded segment by segment, each some milliseconds: between two of them
is the place to give up. (Raw objects are copied, not coded; that is not interrupted.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvstore_client.deadline import Deadline
from kvstore_client.errors import DeadlineExceeded
from kvstore_codec.arrays import Plane
from kvstore_codec.native import NATIVE
from kvstore_codec.segments import CodedPlane


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

    def drain_tokens(self, k: Plane, v: Plane, sinks: int, dtype: str) -> npt.NDArray[np.uint16]:
        self.check()
        return NATIVE.drain_tokens(k, v, sinks, dtype)

    def encode_lossy(
        self, planes: Sequence[CodedPlane], drains: npt.NDArray[np.uint16], sinks: int, dtype: str, levels: int
    ) -> list[bytes]:
        self.check()
        return NATIVE.encode_lossy(planes, drains, sinks, dtype, levels)

    def decode_lossy(
        self, payloads: Sequence[memoryview], planes: Sequence[CodedPlane], sinks: int, dtype: str
    ) -> None:
        self.check()
        NATIVE.decode_lossy(payloads, planes, sinks, dtype)

    def encode_lossless(self, planes: Sequence[Plane], dtype: str) -> bytes:
        self.check()
        return NATIVE.encode_lossless(planes, dtype)

    def decode_lossless(self, payload: memoryview, planes: Sequence[Plane], dtype: str) -> None:
        self.check()
        NATIVE.decode_lossless(payload, planes, dtype)
