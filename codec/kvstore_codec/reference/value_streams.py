"""One quality layer's streams: values that enter, digits that refine, window by window (FORMAT.md §3, §4.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_codec import tables
from kvstore_codec.reference.blocks import Block, blocks, deal
from kvstore_codec.reference.rans import NO_RAW, StreamDecoder, StreamEncoder, join_streams, split_streams, stream_count

Ints = npt.NDArray[Any]

WINDOW_TOKENS = 32
VALUE_LIMIT = np.float32(32760)  # on the finest grid: 16 bits, and its thirds refine to no more


@dataclass(frozen=True)
class CodedScales:
    """Scale indices at the base step of all components of a segment: of plain tokens, of drain tokens."""

    plain: Ints
    drain: Ints


@dataclass(frozen=True)
class TokenClasses:
    """Tokens of a segment, ascending; sinks are the first ones and in neither list."""

    plain: Ints
    drains: Ints

    @classmethod
    def of(cls, tokens: int, sinks: int, drains: Ints) -> TokenClasses:
        plain = np.ones(tokens, bool)
        plain[:sinks] = False
        plain[drains] = False
        return cls(np.flatnonzero(plain), drains.astype(np.int64))


@dataclass(frozen=True)
class Plan:
    """The blocks of a quality layer, by token class."""

    plain: list[Block]
    drain: list[Block]
    classes: TokenClasses

    @classmethod
    def of(cls, scales: CodedScales, level: int, classes: TokenClasses) -> Plan:
        return cls(
            blocks(scales.plain, level) if len(classes.plain) else [],
            blocks(scales.drain, level) if len(classes.drains) else [],
            classes,
        )

    @property
    def blocks(self) -> int:
        return len(self.plain) + len(self.drain)

    @property
    def symbols(self) -> int:
        lanes = (sum(len(block.components) for block in some) for some in (self.plain, self.drain))
        return sum(a * len(b) for a, b in zip(lanes, (self.classes.plain, self.classes.drains), strict=True))

    def steps(self, count: int, index: int) -> Iterator[tuple[Block, int]]:
        """(block, token) of stream `index` of `count`, in decoding order: drain tokens' windows, then plain ones'."""
        for some, tokens in ((self.drain, self.classes.drains), (self.plain, self.classes.plain)):
            yield from window_steps(deal(some, count, index), tokens)


def window_steps(blocks: Sequence[Block], tokens: Ints) -> Iterator[tuple[Block, int]]:
    """For each 32 of `tokens`, for each block, for each of those tokens."""
    for first in range(0, len(tokens), WINDOW_TOKENS):
        for block in blocks:
            for token in tokens[first : first + WINDOW_TOKENS]:
                yield block, int(token)


def encode_streams(values: Ints, plan: Plan, level: int) -> bytes:
    """`values`: [tokens, components] on the grid of `level`."""
    coarse = third(values)

    def encode(index: int, count: int) -> bytes:
        encoder = StreamEncoder()
        for block, token in plan.steps(count, index):
            lanes = values[token, block.components]
            if block.level == level:
                _encode_values(encoder, block, lanes)
            else:
                _encode_digits(encoder, block.digit_rows(level), lanes, coarse[token, block.components])
        return encoder.finish()

    return join_streams(stream_count(plan.blocks, plan.symbols), encode)


def decode_streams(payload: memoryview, values: Ints, plan: Plan, level: int) -> None:
    """Turns `values` [tokens, components] (int16) on the coarser grid into those on the grid of `level`."""
    streams = split_streams(payload, plan.blocks)
    for index, stream in enumerate(streams):
        decoder = StreamDecoder(stream)
        for block, token in plan.steps(len(streams), index):
            if block.level == level:
                values[token, block.components] = _decode_values(decoder, block)
            else:
                coarse = values[token, block.components]
                values[token, block.components] = _decode_digits(decoder, block.digit_rows(level), coarse)
        decoder.finish()


def third(values: Ints) -> Ints:
    """values / 3, to the nearest integer: never a tie, so the coarse grid is exactly the uniform one."""
    return np.sign(values) * ((np.abs(values) + 1) // 3)


def _encode_values(encoder: StreamEncoder, block: Block, values: Ints) -> None:
    rows = block.value_rows()
    symbols = np.where(np.abs(values) <= tables.VALUE_MAX, values + tables.VALUE_MAX, tables.ESCAPE)
    symbols = np.where(tables.VALUES.freq[rows, symbols] > 0, symbols, tables.ESCAPE)
    raw = np.where(symbols == tables.ESCAPE, values & 0xFFFF, NO_RAW)
    encoder.step(tables.VALUES, rows, symbols, raw)


def _encode_digits(encoder: StreamEncoder, rows: Ints, values: Ints, coarse: Ints) -> None:
    digits = (values - 3 * coarse) * np.where(coarse < 0, -1, 1)
    rows = rows + np.minimum(np.abs(coarse), 2)
    encoder.step(tables.DIGITS, rows, digits + 1, np.full(len(rows), NO_RAW))


def _decode_values(decoder: StreamDecoder, block: Block) -> Ints:
    symbols = decoder.step(tables.VALUES, block.value_rows())
    values = symbols.astype(np.int16) - np.int16(tables.VALUE_MAX)
    escaped = symbols == tables.ESCAPE
    values[escaped] = decoder.raw(int(escaped.sum())).astype(np.uint16).view(np.int16)
    return values


def _decode_digits(decoder: StreamDecoder, rows: Ints, coarse: Ints) -> Ints:
    """Hostile bytes may drive a value over 16 bits; it wraps, as it does in every implementation."""
    wide = coarse.astype(np.int64)
    magnitude = np.where(wide == -32768, 0, np.minimum(np.abs(wide), 2))
    symbols = decoder.step(tables.DIGITS, rows + magnitude)
    wide = 3 * wide + (symbols.astype(np.int64) - 1) * np.where(wide < 0, -1, 1)
    return wide.astype(np.int16)
