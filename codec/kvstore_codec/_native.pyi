"""kvstore codec core (C++)"""

from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray


def view_bits(array: Annotated[NDArray, dict(device='cpu')]) -> tuple[str, object]:
    """
    (dtype name, the array's memory as unsigned integers of its element size, sharing it)
    """

def instruction_sets() -> list[tuple[int, str]]:
    """
    (number, name) of those that this build and this CPU have; the last is the best
    """

class Coder:
    """Codes segments; see kvstore_codec.segments.SegmentCoder"""

    def __init__(self, values: Annotated[NDArray[numpy.uint16], dict(shape=(None, None), order='C', device='cpu', writable=False)], digits: Annotated[NDArray[numpy.uint16], dict(shape=(None, None), order='C', device='cpu', writable=False)], shrinkage: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], thresholds: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu', writable=False)], variances: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu', writable=False)], exponents: Annotated[NDArray[numpy.uint16], dict(shape=(None, None), order='C', device='cpu', writable=False)], costs: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)], isa: int) -> None:
        """isa: a number of `instruction_sets()`, else ValueError"""

    def drain_tokens(self, groups: Sequence[Sequence[tuple[Annotated[NDArray, dict(device='cpu', writable=False)] | tuple[Annotated[NDArray, dict(device='cpu', writable=False)], Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], int, int], Annotated[NDArray, dict(device='cpu', writable=False)] | tuple[Annotated[NDArray, dict(device='cpu', writable=False)], Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], int, int]]]], sinks: int, dtype: int, threads: int) -> list[Annotated[NDArray[numpy.uint16], dict(shape=(None,))]]: ...

    def encode_lossy(self, segments: Sequence[tuple[Sequence[tuple[Annotated[NDArray, dict(device='cpu', writable=False)] | tuple[Annotated[NDArray, dict(device='cpu', writable=False)], Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], int, int], tuple[Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], bool] | None, float]], Annotated[NDArray[numpy.uint16], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, tuple[Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.uint16], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None, Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]] | None, int]], sinks: int, dtype: int, levels: int, threads: int) -> tuple[int, list[list[bytes]]]:
        """(status, for each segment the payload of each quality layer)"""

    def decode_lossy(self, segments: Sequence[tuple[Sequence[tuple[Annotated[NDArray, dict(device='cpu', writable=False)] | tuple[Annotated[NDArray, dict(device='cpu', writable=False)], Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], int, int], tuple[Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], bool] | None, float]], Annotated[NDArray[numpy.uint16], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, tuple[Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.uint16], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None, Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]] | None, int]], payloads: Sequence[Sequence[Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]]], sinks: int, dtype: int, threads: int) -> int:
        """status; writes the planes"""

    def encode_lossless(self, segments: Sequence[Sequence[Annotated[NDArray, dict(device='cpu', writable=False)] | tuple[Annotated[NDArray, dict(device='cpu', writable=False)], Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], int, int]]], dtype: int, threads: int) -> list[bytes]: ...

    def decode_lossless(self, segments: Sequence[Sequence[Annotated[NDArray, dict(device='cpu', writable=False)] | tuple[Annotated[NDArray, dict(device='cpu', writable=False)], Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], int, int]]], payloads: Sequence[Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]], dtype: int, threads: int) -> int:
        """status; writes the planes"""

class RawPlanes:
    """K₀, V₀, K₁, V₁, … of a raw object; see kvstore_codec.raw"""

    def __init__(self, planes: Annotated[NDArray, dict(device='cpu', writable=False)] | Sequence[Annotated[NDArray, dict(device='cpu', writable=False)] | tuple[Annotated[NDArray, dict(device='cpu', writable=False)], Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], int, int]], itemsize: int, isa: int) -> None:
        """
        planes: one array [layers, 2, tokens, heads, dim], or one each; isa: a number of `instruction_sets()`
        """

    def write(self, table: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], payload: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> tuple[int, int]:
        """
        (status, segment at fault); copies the payload, comparing each segment's checksum
        """

    def seal(self, head: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], segments: int) -> bytes:
        """
        the object that a header and a table without checksums head, with its payload and all checksums
        """

    def seal_into(self, object: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], head: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], segments: int) -> None:
        """the same, into memory of just that size"""

class RawChunks:
    """planes of the tokens of many chunks; see kvstore_codec.raw_chunks"""

    def __init__(self, planes: Annotated[NDArray, dict(device='cpu', writable=False)] | Sequence[Annotated[NDArray, dict(device='cpu', writable=False)] | tuple[Annotated[NDArray, dict(device='cpu', writable=False)], Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], int, int]], itemsize: int, provenance_max: int, isa: int) -> None:
        """planes, itemsize, isa: as of RawPlanes, of any number of tokens"""

    def read(self, objects: Sequence[tuple[Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], tuple[bytes, bytes, int, int, int]]]) -> int:
        """
        (object, chunk) of each; how many of the first are in their places. A chunk is (head, hash, position, first token in the planes, tokens)
        """

class RawChunkReader:
    """one object of RawChunks, in pieces"""

    def __init__(self, chunks: object, chunk: tuple[bytes, bytes, int, int, int]) -> None: ...

    def take(self, data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> int:
        """how many of the object's next bytes are done with"""

    @property
    def state(self) -> int:
        """0 reading, 1 done, 2 another object, 3 damaged"""

    @property
    def segment(self) -> int:
        """the one at fault"""
