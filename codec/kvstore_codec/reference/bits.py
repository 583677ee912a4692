"""Bit strings, least significant bit first, and Rice codes in them (R. F. Rice, JPL 79-22, 1979).

A signed number is folded to z = 2n − 1 for n > 0, −2n otherwise; z = q·2ᵏ + r is q ones, a zero and r in k bits. From
q = 15 on it is fifteen ones and z in `raw_bits` bits, so one outlier costs little and a hostile string ends.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_codec.errors import DamagedObject, ErrorCode

Ints = npt.NDArray[Any]

QUOTIENT_MAX = 15
PARAMETERS = 13  # k of 0…12


def fold(values: Ints) -> Ints:
    return np.where(values > 0, 2 * values - 1, -2 * values)


def unfold(folded: Ints) -> Ints:
    return np.where(folded & 1, (folded + 1) // 2, -(folded // 2))


def rice_parameter(folded: Ints, raw_bits: int) -> int:
    """The k that makes the string shortest; the smallest of several."""
    costs = []
    for k in range(PARAMETERS):
        quotient = folded >> k
        costs.append(int(np.where(quotient < QUOTIENT_MAX, quotient + 1 + k, QUOTIENT_MAX + raw_bits).sum()))
    return int(np.argmin(costs))


def rice_bits(folded: Ints, k: int, raw_bits: int) -> list[int]:
    bits: list[int] = []
    for z in folded.tolist():
        quotient = z >> k
        if quotient < QUOTIENT_MAX:
            bits += [1] * quotient + [0] + [z >> bit & 1 for bit in range(k)]
        else:
            bits += [1] * QUOTIENT_MAX + [z >> bit & 1 for bit in range(raw_bits)]
    return bits


class BitReader:
    """Raises DamagedObject at the end of the bytes."""

    def __init__(self, data: memoryview) -> None:
        self._bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        self._at = 0

    @property
    def bytes_read(self) -> int:
        return (self._at + 7) // 8

    def take(self, count: int) -> int:
        if self._at + count > len(self._bits):
            raise DamagedObject("a segment is too short", code=ErrorCode.STRUCTURE)
        bits = self._bits[self._at : self._at + count]
        self._at += count
        return sum(int(bit) << i for i, bit in enumerate(bits))

    def rice(self, count: int, k: int, raw_bits: int) -> Ints:
        """`count` numbers, still folded."""
        out = np.zeros(count, np.int64)
        for index in range(count):
            quotient = 0
            while quotient < QUOTIENT_MAX and self.take(1):
                quotient += 1
            out[index] = self.take(raw_bits) if quotient == QUOTIENT_MAX else quotient << k | self.take(k)
        return out


def pack(bits: list[int]) -> bytes:
    return np.packbits(np.array(bits, np.uint8), bitorder="little").tobytes()
