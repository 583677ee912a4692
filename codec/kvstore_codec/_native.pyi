"""kvstore codec core (C++)"""

from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray


def view_bits(array: Annotated[NDArray, dict(device='cpu')]) -> tuple[str, object]:
    """
    (dtype name, the array's memory as unsigned integers of its element size, sharing it)
    """

def has_avx512() -> bool:
    """whether this build and this CPU have it"""

class Coder:
    """Codes segments; see kvstore_codec.segments.SegmentCoder"""

    def __init__(self, values: Annotated[NDArray[numpy.uint16], dict(shape=(None, None), order='C', device='cpu', writable=False)], digits: Annotated[NDArray[numpy.uint16], dict(shape=(None, None), order='C', device='cpu', writable=False)], centroids: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], thresholds: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu', writable=False)], variances: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu', writable=False)], exponents: Annotated[NDArray[numpy.uint16], dict(shape=(None, None), order='C', device='cpu', writable=False)], costs: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)], vector: bool) -> None:
        """vector: use AVX-512; ValueError where `has_avx512()` is false"""

    def drain_tokens(self, k: Annotated[NDArray, dict(device='cpu', writable=False)], v: Annotated[NDArray, dict(device='cpu', writable=False)], sinks: int, dtype: int) -> Annotated[NDArray[numpy.uint16], dict(shape=(None,))]: ...

    def encode_lossy(self, planes: Sequence[tuple[Annotated[NDArray, dict(device='cpu', writable=False)], tuple[Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], bool] | None, float]], drains: Annotated[NDArray[numpy.uint16], dict(shape=(None,), order='C', device='cpu', writable=False)], sinks: int, dtype: int, levels: int) -> tuple[int, list[bytes]]:
        """(status, payload of each quality layer)"""

    def decode_lossy(self, payloads: Sequence[Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]], planes: Sequence[tuple[Annotated[NDArray, dict(device='cpu', writable=False)], tuple[Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], bool] | None, float]], sinks: int, dtype: int) -> int:
        """status; writes the planes"""

    def encode_lossless(self, planes: Sequence[Annotated[NDArray, dict(device='cpu', writable=False)]], dtype: int) -> bytes: ...

    def decode_lossless(self, payload: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], planes: Sequence[Annotated[NDArray, dict(device='cpu', writable=False)]], dtype: int) -> int:
        """status; writes the planes"""
