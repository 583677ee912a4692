"""The exact codec, in NumPy. FORMAT.md §5 is the same in prose.

Sign and mantissa bits hardly compress and are stored as they are. The exponents of one channel spread over a few
values below a base, in a shape that depends on the channel's mean and scale only: each channel names one of 40
shared tables and its base exponent. Exponents outside the table are escaped, so every bit pattern is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_codec import arrays, tables
from kvstore_codec.arrays import Plane
from kvstore_codec.errors import DamagedObject, ErrorCode
from kvstore_codec.reference.blocks import Block, deal
from kvstore_codec.reference.rans import (
    LANES,
    NO_RAW,
    StreamDecoder,
    StreamEncoder,
    join_streams,
    split_streams,
    stream_count,
)  # fmt: skip
from kvstore_codec.reference.value_streams import window_steps

Ints = npt.NDArray[Any]

BASES_TRIED = 3  # the channel's largest exponent and the two below it
ESCAPE_COST = 16 << 8  # bits of an escape's raw word, in 1/256 bit


@dataclass(frozen=True)
class FloatBits:
    """Where a dtype's exponent lies; what is not exponent is sign and mantissa."""

    exponent_bits: int
    mantissa_bits: int

    @property
    def plain_bits(self) -> int:
        return 1 + self.mantissa_bits

    def split(self, bits: Ints) -> tuple[Ints, Ints]:
        """(exponents, sign over mantissa)."""
        mantissa = bits & ((1 << self.mantissa_bits) - 1)
        exponent = (bits >> self.mantissa_bits) & ((1 << self.exponent_bits) - 1)
        sign = bits >> (self.mantissa_bits + self.exponent_bits)
        return exponent, sign << self.mantissa_bits | mantissa

    def join(self, exponents: Ints, plain: Ints) -> Ints:
        mantissa = plain & ((1 << self.mantissa_bits) - 1)
        sign = plain >> self.mantissa_bits
        return sign << (self.mantissa_bits + self.exponent_bits) | exponents << self.mantissa_bits | mantissa


FLOATS = {
    "bfloat16": FloatBits(8, 7),
    "float16": FloatBits(5, 10),
    "float32": FloatBits(8, 23),
    "float8_e4m3fn": FloatBits(4, 3),
    "float8_e5m2": FloatBits(5, 2),
}


def _symbol_costs() -> Ints:
    """Cost of each symbol of each table in 1/256 bit, from an integer logarithm: part of the encoder only, but
    every implementation must choose the same tables. Symbols without frequency cost what an escape does."""
    freq = tables.EXPONENTS.freq.astype(np.int64)
    whole = np.array([[max(int(f).bit_length() - 1, 0) for f in row] for row in freq])
    fraction = (freq << 8 >> whole) - 256  # log2(1 + f) ≈ f: within 0.09 bit, the same for everyone
    cost = (tables.SLOT_BITS - whole) * 256 - fraction
    escape = cost[:, tables.EXPONENT_ESCAPE : tables.EXPONENT_ESCAPE + 1] + ESCAPE_COST
    return np.where(freq > 0, cost, escape)


SYMBOL_COSTS = _symbol_costs()


def encode_lossless(planes: Sequence[Plane], dtype: str) -> bytes:
    layout = FLOATS[dtype]
    tokens = planes[0].shape[0]
    split = [layout.split(arrays.read(plane).reshape(tokens, -1).astype(np.int64)) for plane in planes]
    exponents = np.concatenate([part[0] for part in split], axis=1)
    chosen, bases = _choose_tables(exponents, layout)
    plain = b"".join(_pack_bits(part[1], layout.plain_bits) for part in split)
    streams = _encode_streams(exponents, chosen, bases)
    return chosen.astype(np.uint8).tobytes() + bases.astype(np.uint8).tobytes() + plain + streams


def decode_lossless(payload: memoryview, planes: Sequence[Plane], dtype: str) -> None:
    layout = FLOATS[dtype]
    tokens = planes[0].shape[0]
    channels = [plane.shape[1] * plane.shape[2] for plane in planes]
    total = sum(channels)
    sizes = [(tokens * count * layout.plain_bits + 7) // 8 for count in channels]
    at = 2 * total
    if len(payload) < at + sum(sizes):
        raise DamagedObject("a segment is too short", code=ErrorCode.STRUCTURE)
    chosen = np.frombuffer(payload[:total], np.uint8).astype(np.int64)
    bases = np.frombuffer(payload[total:at], np.uint8).astype(np.int64)
    if (chosen >= tables.EXPONENT_TABLES).any() or (bases >= 1 << layout.exponent_bits).any():
        raise DamagedObject("a segment names an unknown table", code=ErrorCode.STRUCTURE)
    exponents = _decode_streams(payload[at + sum(sizes) :], tokens, chosen, bases, layout)
    first = 0
    for plane, count, size in zip(planes, channels, sizes, strict=True):
        plain = _unpack_bits(payload[at : at + size], tokens * count, layout.plain_bits).reshape(tokens, count)
        bits = layout.join(exponents[:, first : first + count], plain)
        arrays.write(plane, bits.astype(plane.dtype).reshape(plane.shape))
        at += size
        first += count


def _choose_tables(exponents: Ints, layout: FloatBits) -> tuple[Ints, Ints]:
    """The cheapest (table, base) of each channel; ties go to the first base, then the first table."""
    channels = exponents.shape[1]
    chosen, bases = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
    for channel in range(channels):
        histogram = np.bincount(exponents[:, channel], minlength=1 << layout.exponent_bits)
        top = int(np.flatnonzero(histogram)[-1])
        best = -1
        for base in range(top, max(top - BASES_TRIED, -1), -1):
            distance = base - np.flatnonzero(histogram)
            coded = (distance >= 0) & (distance < tables.EXPONENT_ESCAPE)
            symbols = np.where(coded, distance, tables.EXPONENT_ESCAPE)
            price = SYMBOL_COSTS[:, symbols] + np.where(coded, 0, ESCAPE_COST)
            costs = (price * histogram[histogram > 0]).sum(axis=1)
            table = int(costs.argmin())
            if best < 0 or costs[table] < best:
                best, chosen[channel], bases[channel] = int(costs[table]), table, base
    return chosen, bases


def _blocks(chosen: Ints) -> list[Block]:
    order = np.argsort(chosen, kind="stable")
    cuts = (order[first : first + LANES] for first in range(0, len(order), LANES))
    return [Block(components, chosen[components], 0) for components in cuts]


def _encode_streams(exponents: Ints, chosen: Ints, bases: Ints) -> bytes:
    blocks = _blocks(chosen)

    def encode(index: int, count: int) -> bytes:
        encoder = StreamEncoder()
        for block, token in window_steps(deal(blocks, count, index), np.arange(len(exponents))):
            exponent = exponents[token, block.components]
            distance = bases[block.components] - exponent
            coded = (distance >= 0) & (distance < tables.EXPONENT_ESCAPE)
            symbols = np.where(coded, distance, tables.EXPONENT_ESCAPE)
            symbols = np.where(tables.EXPONENTS.freq[block.scales, symbols] > 0, symbols, tables.EXPONENT_ESCAPE)
            raw = np.where(symbols == tables.EXPONENT_ESCAPE, exponent, NO_RAW)
            encoder.step(tables.EXPONENTS, block.scales, symbols, raw)
        return encoder.finish()

    return join_streams(stream_count(len(blocks), exponents.size), encode)


def _decode_streams(payload: memoryview, tokens: int, chosen: Ints, bases: Ints, layout: FloatBits) -> Ints:
    blocks = _blocks(chosen)
    exponents = np.zeros((tokens, len(chosen)), np.int64)
    streams = split_streams(payload, len(blocks))
    for index, stream in enumerate(streams):
        decoder = StreamDecoder(stream)
        for block, token in window_steps(deal(blocks, len(streams), index), np.arange(tokens)):
            symbols = decoder.step(tables.EXPONENTS, block.scales).astype(np.int64)
            value = bases[block.components] - symbols
            escaped = symbols == tables.EXPONENT_ESCAPE
            value[escaped] = decoder.raw(int(escaped.sum()))
            if ((value < 0) | (value >= 1 << layout.exponent_bits)).any():
                raise DamagedObject("a segment holds an impossible exponent", code=ErrorCode.STRUCTURE)
            exponents[token, block.components] = value
        decoder.finish()
    return exponents


def _pack_bits(values: Ints, width: int) -> bytes:
    """Each value's low `width` bits, least significant first, without gaps."""
    as_bytes = values.astype("<u4").reshape(-1, 1).view(np.uint8)
    bits = np.unpackbits(as_bytes, axis=1, bitorder="little")[:, :width]
    return np.packbits(bits, bitorder="little").tobytes()


def _unpack_bits(packed: memoryview, count: int, width: int) -> Ints:
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")[: count * width]
    return bits.reshape(count, width).astype(np.int64) @ (1 << np.arange(width, dtype=np.int64))
