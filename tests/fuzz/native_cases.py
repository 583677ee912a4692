"""The C++ targets' inputs in Python: a header of 24 bytes (native/case.hpp says what is in it; change both), then
payloads or values. Here they are made into seeds, and replayed through every coder, the NumPy reference among them,
without clang.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from coders import EVERY

from kvstore_codec.errors import DamagedObject, ValuesError
from kvstore_codec.rope import Rotation
from kvstore_codec.segments import NO_DRAINS, CodedPlane, LossySegment, SegmentCoder

HEADER = struct.Struct("<9B8sbBB2H")
assert HEADER.size == 24
LOSSY_DTYPES = ("bfloat16", "float16", "float32")
LOSSLESS_DTYPES = (*LOSSY_DTYPES, "float8_e4m3fn", "float8_e5m2")
ELEMENTS_MAX, ELEMENTS_MAX_LARGE = 2048, 40960
ANY_BITS, FINITE, SAME_FOR_ALL, SOME_QUIET = range(4)
NONE, DIAGONAL, BASIS = range(3)

_BITS = {"bfloat16": "<u2", "float16": "<u2", "float32": "<u4", "float8_e4m3fn": "u1", "float8_e5m2": "u1"}
#: by bytes of an element: all but the exponent's upper bit; all but its four upper bits
_FINITE = {1: 0xBF, 2: 0xBFFF, 4: 0xBFFFFFFF}
_QUIET = {1: 0x87, 2: 0x87FF, 4: 0x87FFFFFF}

T = TypeVar("T")
Bits = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, eq=False)
class CaseProfile:
    """What a coder reads of a profile (`segments.GroupProfile`)."""

    mean: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]
    basis: npt.NDArray[np.float16] | None
    scale_ids: npt.NDArray[np.uint8]

    @property
    def components(self) -> int:
        return len(self.scale_ids)


@dataclass(frozen=True)
class Case:
    """One header's fields as they lie in the bytes, before they are brought into range; and what follows it."""

    dtype: int = 0
    levels: int = 2
    tokens: int = 31
    sinks: int = 0
    memory: int = 0
    profile: int = NONE
    seed: int = 0
    rotation: int = 0
    planes: int = 1
    shapes: bytes = b"\x01\x10" * 4
    quarters: int = 0
    fill: int = FINITE
    drains: int = 0
    length_0: int = 0
    length_1: int = 0
    rest: bytes = b""

    @classmethod
    def of_bytes(cls, data: bytes) -> Case | None:
        if len(data) < HEADER.size:
            return None
        return replace(cls(*HEADER.unpack_from(data)), rest=data[HEADER.size :])

    def to_bytes(self) -> bytes:
        return (
            HEADER.pack(
                self.dtype, self.levels, self.tokens, self.sinks, self.memory, self.profile, self.seed, self.rotation,
                self.planes, self.shapes, self.quarters, self.fill, self.drains, self.length_0, self.length_1,
            )
            + self.rest
        )  # fmt: skip

    @property
    def level_count(self) -> int:
        return 1 + self.levels % 3

    @property
    def plane_shapes(self) -> list[tuple[int, int]]:
        count = 1 + self.planes % 4
        return [(1 + self.shapes[2 * p] % 8, self.shapes[2 * p + 1] % 65) for p in range(count)]

    @property
    def channels(self) -> int:
        return sum(heads * dim for heads, dim in self.plane_shapes)

    @property
    def token_count(self) -> int:
        elements = ELEMENTS_MAX_LARGE if self.fill >= 240 else ELEMENTS_MAX
        return min(1 + self.tokens, max(1, elements // max(1, self.channels)))

    @property
    def sink_count(self) -> int:
        return min(self.sinks % 5, self.token_count)

    def payloads(self, count: int) -> list[bytes]:
        edges = [0]
        for length in (self.length_0, self.length_1)[: count - 1]:
            edges.append(min(edges[-1] + length, len(self.rest)))
        return [self.rest[a:b] for a, b in zip(edges, [*edges[1:], len(self.rest)], strict=True)]

    def values(self, dtype: str) -> list[Bits]:
        """The planes' bits, made from `rest`."""
        kind: np.dtype[Any] = np.dtype(_BITS[dtype])
        given = np.frombuffer(self.rest, kind, len(self.rest) // kind.itemsize)
        given = given if len(given) else np.zeros(1, kind)
        tokens, fill = self.token_count, self.fill % 4
        out: list[Bits] = []
        element = channel = 0
        for heads, dim in self.plane_shapes:
            width = heads * dim
            index = element + np.arange(tokens * width).reshape(tokens, width)
            if fill == SAME_FOR_ALL:
                index = np.broadcast_to(channel + np.arange(width), (tokens, width))
            bits = given[index % len(given)]
            if fill != ANY_BITS:
                bits &= kind.type(_FINITE[kind.itemsize])
            if fill == SOME_QUIET:
                bits[np.arange(tokens) % 7 == 3] &= kind.type(_QUIET[kind.itemsize])
            out.append(bits.reshape(tokens, heads, dim))
            element, channel = element + tokens * width, channel + width
        return out

    def segment(self, planes: Sequence[Bits]) -> LossySegment:
        coded = [CodedPlane(plane, self._rotation(p), self.step_factor) for p, plane in enumerate(planes)]
        profile = self._profile()
        return LossySegment(coded, self._drains(), profile, self.quarters if profile else 0)

    @property
    def step_factor(self) -> float:
        return float(0.75 * 2.0 ** (self.drains // 3 % 17 - 8))

    def _drains(self) -> npt.NDArray[np.uint16] | None:
        if self.drains % 3 == 1 and len(self.plane_shapes) % 2 == 0:
            return None
        if self.drains % 3 != 2 or not self.rest:
            return NO_DRAINS
        tokens = np.arange(self.sink_count, self.token_count)
        odd = np.frombuffer(self.rest, np.uint8)[tokens % len(self.rest)] & 1
        listed: npt.NDArray[np.uint16] = tokens[odd == 1].astype(np.uint16)
        return listed

    def _rotation(self, plane: int) -> Rotation | None:
        dim = self.plane_shapes[plane][1]
        pairs = min(1, dim // 2) if self.rotation & 4 else dim // 2
        if plane % 2 or not self.rotation & 1 or not pairs:
            return None
        third = np.add.outer(np.arange(self.token_count), np.arange(pairs)) % 3 != 0
        cos, sin = np.where(third, np.float32(0.6), np.float32(0.8)), np.where(third, np.float32(0.8), np.float32(-0.6))
        return Rotation(cos, sin, bool(self.rotation & 2))

    def _profile(self) -> CaseProfile | None:
        kind, channels, seed, extreme = self.profile % 3, self.channels, self.seed, self.seed >= 128
        if kind == NONE:
            return None
        index = np.arange(channels)
        rows = np.arange(channels - channels * (seed % 4) // 4 if kind == BASIS else channels)
        basis = ((31 * rows[:, None] + 17 * index + 7 * seed) % 13 - 6) * (8192.0 if extreme else 0.125)
        return CaseProfile(
            mean=(((5 * index + seed) % 17 - 8) * (2.0**57 if extreme else 0.25)).astype(np.float32),
            weight=np.exp2(((7 * index + seed) % 9 - 4) * (10.0 if extreme else 1.0)).astype(np.float32),
            basis=basis.astype(np.float16) if kind == BASIS else None,
            scale_ids=((11 * rows + seed) % 64).astype(np.uint8),
        )


def lossy_decode(data: bytes) -> bool:
    case = Case.of_bytes(data)
    if case is None:
        return False
    dtype = LOSSY_DTYPES[case.dtype % 3]
    payloads = [memoryview(payload) for payload in case.payloads(case.level_count)]
    return _same_everywhere(lambda coder: _read_lossy(coder, case, dtype, payloads)) is not None


def lossless_decode(data: bytes) -> bool:
    case = Case.of_bytes(data)
    if case is None:
        return False
    dtype = LOSSLESS_DTYPES[case.dtype % 5]
    return _same_everywhere(lambda coder: _read_lossless(coder, case, dtype, memoryview(case.rest))) is not None


def lossy_round_trip(data: bytes) -> bool:
    case = Case.of_bytes(data)
    if case is None:
        return False
    dtype = LOSSY_DTYPES[case.dtype % 3]
    values = case.values(dtype)

    def write(coder: SegmentCoder) -> list[bytes] | None:
        try:
            return coder.encode_lossy([case.segment(values)], case.sink_count, dtype, case.level_count, 1)[0]
        except ValuesError:
            return None

    payloads = _same_everywhere(write)
    if payloads is None:
        assert case.fill % 4 == ANY_BITS, "finite values are refused"
        return False
    for levels in range(1, case.level_count + 1):
        held = [memoryview(payload) for payload in payloads[:levels]]
        restored = _same_everywhere(lambda coder, held=held: _read_lossy(coder, case, dtype, held))  # type: ignore[misc]
        assert restored is not None, "what an encoder wrote does not decode"
        for was, got in zip(values, restored, strict=True):
            assert was[: case.sink_count].tobytes() == got[: case.sink_count].tobytes(), "sinks are not exact"
    return True


def lossless_round_trip(data: bytes) -> bool:
    case = Case.of_bytes(data)
    if case is None:
        return False
    dtype = LOSSLESS_DTYPES[case.dtype % 5]
    values = case.values(dtype)
    payload = _same_everywhere(lambda coder: coder.encode_lossless([values], dtype, 1)[0])
    restored = _same_everywhere(lambda coder: _read_lossless(coder, case, dtype, memoryview(payload)))
    assert restored is not None, "what an encoder wrote does not decode"
    assert [plane.tobytes() for plane in restored] == [plane.tobytes() for plane in values]
    return True


#: by name of the C++ program: replays one input; whether a coder took it. Raises whatever is a finding.
TARGETS: dict[str, Callable[[bytes], bool]] = {
    "lossless_decode": lossless_decode, "lossless_round_trip": lossless_round_trip,
    "lossy_decode": lossy_decode, "lossy_round_trip": lossy_round_trip,
}  # fmt: skip


def _same_everywhere(ask: Callable[[SegmentCoder], T]) -> T:
    """What every coder answers. Raises AssertionError where they differ."""
    answers = {name: ask(coder) for name, coder in EVERY.items()}
    seen = {name: _comparable(answer) for name, answer in answers.items()}
    assert len(set(seen.values())) == 1, f"coders differ: {[name for name in seen if seen[name] != seen['scalar']]}"
    return answers["scalar"]


def _comparable(answer: object) -> object:
    if isinstance(answer, list):
        return tuple(item if isinstance(item, bytes) else item.tobytes() for item in answer)
    return answer


def _read_lossy(coder: SegmentCoder, case: Case, dtype: str, payloads: Sequence[memoryview]) -> list[Bits] | None:
    planes = _empty(case, dtype)
    try:
        coder.decode_lossy([case.segment(planes)], [payloads], case.sink_count, dtype, 1)
    except DamagedObject:
        return None
    return planes


def _read_lossless(coder: SegmentCoder, case: Case, dtype: str, payload: memoryview) -> list[Bits] | None:
    planes = _empty(case, dtype)
    try:
        coder.decode_lossless([planes], [payload], dtype, 1)
    except DamagedObject:
        return None
    return planes


def _empty(case: Case, dtype: str) -> list[Bits]:
    kind: np.dtype[Any] = np.dtype(_BITS[dtype])
    return [np.full((case.token_count, *shape), 0x55, kind) for shape in case.plane_shapes]
