"""32 interleaved rANS lanes over one stream of 16-bit words.

Each lane's state x is in [2¹⁶, 2³²); frequencies sum to 2¹². A stream is 32 states (uint32), then words (uint16),
in the order in which the decoder needs them. At each step all lanes of a block decode one symbol; then those whose
state fell under 2¹⁶ take a word each, lane 0 first; then those whose symbol was the escape take a raw word each,
lane 0 first. The encoder runs backwards from x = 2¹⁶ in every lane, where the decoder must end.
Source: J. Duda, "Asymmetric numeral systems" (2013); interleaving as in F. Giesen's ryg_rans.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_codec.errors import DamagedObject, ErrorCode
from kvstore_codec.tables import SLOT_BITS, SLOTS, SlotTable

LANES = 32
STATE_MIN = 1 << 16
NO_RAW = -1
STREAM_SYMBOLS = 1 << 17  # about this many symbols share one stream's states
STREAM_PAIR_SYMBOLS = 1 << 15  # and from here on there are two


class StreamEncoder:
    """Collects steps in decoding order; `finish` codes them backwards."""

    def __init__(self) -> None:
        self._steps: list[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]] = []

    def step(self, table: SlotTable, rows: npt.NDArray[Any], symbols: npt.NDArray[Any], raw: npt.NDArray[Any]) -> None:
        """One symbol a lane from table rows `rows`; `raw[lane]` is a 16-bit word to follow it, or NO_RAW."""
        self._steps.append((table.freq[rows, symbols], table.start[rows, symbols], raw))

    def finish(self) -> bytes:
        states = np.full(LANES, STATE_MIN, np.uint64)
        backwards: list[int] = []
        for freq, start, raw in reversed(self._steps):
            backwards.extend(int(word) for word in raw[::-1] if word != NO_RAW)
            x, f = states[: len(freq)], freq.astype(np.uint64)
            full = x >= f << np.uint64(20)
            backwards.extend(int(word) for word in (x[full] & np.uint64(0xFFFF))[::-1])
            x = np.where(full, x >> np.uint64(16), x)
            states[: len(freq)] = ((x // f) << np.uint64(SLOT_BITS)) + x % f + start
        words = np.array(backwards[::-1], dtype="<u2")
        return states.astype("<u4").tobytes() + words.tobytes()


class StreamDecoder:
    """Decodes step by step. Raises DamagedObject when the words run out or do not come out even."""

    def __init__(self, stream: memoryview) -> None:
        if len(stream) < 4 * LANES or len(stream) % 2:
            raise DamagedObject("an entropy-coded stream is too short", code=ErrorCode.STRUCTURE)
        self._states = np.frombuffer(stream, "<u4", LANES).astype(np.uint64)
        self._words = np.frombuffer(stream, "<u2", offset=4 * LANES)
        self._at = 0
        if (self._states < STATE_MIN).any():
            raise DamagedObject("an entropy coder's state is out of range", code=ErrorCode.STRUCTURE)

    def step(self, table: SlotTable, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """One symbol for each of the first len(rows) lanes."""
        x = self._states[: len(rows)]
        slot = (x & np.uint64(SLOTS - 1)).astype(np.int64)
        symbols = table.symbol[rows, slot]
        x = (
            table.freq[rows, symbols] * (x >> np.uint64(SLOT_BITS))
            + slot.astype(np.uint64)
            - table.start[rows, symbols]
        )
        low = x < STATE_MIN
        x[low] = x[low] << np.uint64(16) | self._take(int(low.sum()))
        self._states[: len(rows)] = x
        return symbols

    def raw(self, count: int) -> npt.NDArray[Any]:
        """The next `count` raw words."""
        return self._take(count)

    def finish(self) -> None:
        if self._at != len(self._words) or (self._states != STATE_MIN).any():
            raise DamagedObject("an entropy-coded stream does not end where it should", code=ErrorCode.STRUCTURE)

    def _take(self, count: int) -> npt.NDArray[Any]:
        words = self._words[self._at : self._at + count]
        if len(words) < count:
            raise DamagedObject("an entropy-coded stream ends early", code=ErrorCode.STRUCTURE)
        self._at += count
        return words.astype(np.uint64)


def stream_count(blocks: int, symbols: int) -> int:
    """The encoder's choice. Two streams are decoded in lockstep, which hides latency; one costs 128 bytes of states."""
    wanted = max(2 if symbols >= STREAM_PAIR_SYMBOLS else 1, symbols // STREAM_SYMBOLS)
    return min(blocks, wanted)


def join_streams(count: int, encode: Callable[[int, int], bytes]) -> bytes:
    """A streams section: count, each stream's words, the streams, which `encode(index, count)` makes."""
    streams = [encode(index, count) for index in range(count)]
    lengths = b"".join(struct.pack("<I", (len(stream) - 4 * LANES) // 2) for stream in streams)
    return struct.pack("<H", count) + lengths + b"".join(streams)


def split_streams(payload: memoryview, blocks: int) -> list[memoryview]:
    """The streams of a streams section, which must fill `payload`."""
    if len(payload) < 2:
        raise DamagedObject("a segment is too short", code=ErrorCode.STRUCTURE)
    (count,) = struct.unpack_from("<H", payload)
    at = 2 + 4 * count
    if count > blocks or (count == 0) != (blocks == 0) or len(payload) < at:
        raise DamagedObject("a segment has an impossible number of streams", code=ErrorCode.STRUCTURE)
    streams = []
    for (words,) in struct.iter_unpack("<I", payload[2:at]):
        length = 4 * LANES + 2 * words
        if length > len(payload) - at:
            raise DamagedObject("a stream exceeds its segment", code=ErrorCode.STRUCTURE)
        streams.append(payload[at : at + length])
        at += length
    if at != len(payload):
        raise DamagedObject("a segment has bytes left over", code=ErrorCode.STRUCTURE)
    return streams
