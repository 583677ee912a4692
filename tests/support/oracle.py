"""Conversations whose tokens, values and objects follow from numbers alone, and what a read of them may give.

A writer and a reader in different processes agree on every byte without a word between them. A chunk reads as anything
that was put for it, cut at the end of a quality layer; everything else is wrong.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import kv_objects
import numpy as np

import kvstore_codec as codec
from kvstore_codec import Quality

LAYOUT = kv_objects.small_layout("oracle", layers=8, head_dim=64)  # 64 KiB a chunk, raw
CHUNK_TOKENS = LAYOUT.chunk_tokens
QUALITIES = ("low", "medium", "high", "raw")  # that are put
SYSTEM_CHUNKS = 2  # at the start of conversations that share them
_CHUNKS_CACHED = 400


class Conversation:
    """Number `number`; it starts as all do whose numbers are congruent modulo `systems`."""

    def __init__(self, number: int, *, systems: int = 1 << 40) -> None:
        self.number, self._system = number, -1 - number % systems

    def tokens(self, chunks: int) -> list[int]:
        """Of its first so many chunks."""
        return [token for position in range(chunks) for token in _tokens(self._author(position), position)]

    def hashes(self, chunks: int) -> list[bytes]:
        return [ref.hash for ref in self.refs(chunks)]

    def refs(self, chunks: int) -> list[codec.ChunkRef]:
        return list(_refs(tuple(self._author(position) for position in range(chunks))))

    def kv(self, chunks: int) -> Any:
        """The values of its first so many chunks, [layers, 2, tokens, heads, head_dim]."""
        return np.concatenate([_values(self._author(position), position) for position in range(chunks)], axis=2)

    def objects(self, chunks: int, quality: str) -> list[kv_objects.StoredChunk]:
        """As a client stores them."""
        return [
            kv_objects.StoredChunk(ref, self._blob(position, ref, quality), Quality.parse(quality))
            for position, ref in enumerate(self.refs(chunks))
        ]

    def is_legal_object(self, position: int, data: bytes, floor: Quality = Quality.LOW) -> bool:
        """Whether `data` is what was put for a chunk, whole or cut; at `floor` or better."""
        ref = self.refs(position + 1)[-1]
        for quality in QUALITIES:
            whole = self._blob(position, ref, quality)
            header = codec.parse_header(whole)
            ends = [end for end in header.layer_bytes if header.quality_at(end) <= floor]
            if len(data) in ends and whole.startswith(data):
                return True
        return False

    def wrong_chunks(self, values: Any, tokens: int, best: Quality = Quality.RAW) -> list[int]:
        """Positions whose values no read at `best` may give."""
        return [
            position
            for position in range(tokens // CHUNK_TOKENS)
            if _digest(values[:, :, position * CHUNK_TOKENS : (position + 1) * CHUNK_TOKENS])
            not in self._readings(position, best)
        ]

    def _readings(self, position: int, best: Quality) -> frozenset[bytes]:
        return _readings(self._author(position), position, best)

    def _blob(self, position: int, ref: codec.ChunkRef, quality: str) -> bytes:
        return _blob(self._author(position), position, ref.hash, quality)

    def _author(self, position: int) -> int:
        return self._system if position < SYSTEM_CHUNKS else self.number


def _rng(author: int, position: int) -> np.random.Generator:
    return np.random.default_rng((author < 0, abs(author), position))


@lru_cache(_CHUNKS_CACHED)
def _tokens(author: int, position: int) -> tuple[int, ...]:
    return tuple(_rng(author, position).integers(0, 50_000, CHUNK_TOKENS).tolist())


@lru_cache(_CHUNKS_CACHED)
def _refs(authors: tuple[int, ...]) -> tuple[codec.ChunkRef, ...]:
    tokens = [token for position, author in enumerate(authors) for token in _tokens(author, position)]
    return tuple(codec.chunk_refs(LAYOUT, tokens))


@lru_cache(_CHUNKS_CACHED)
def _values(author: int, position: int) -> Any:
    values = codec.empty(LAYOUT, CHUNK_TOKENS)
    values[...] = _rng(author, position).standard_normal(values.shape, np.float32).astype(values.dtype)
    return values


@lru_cache(2 * _CHUNKS_CACHED)
def _blob(author: int, position: int, chunk_hash: bytes, quality: str) -> bytes:
    values, first = _values(author, position), position * CHUNK_TOKENS
    return bytes(codec.encode(values, LAYOUT, quality=quality, first_position=first, chunk_hash=chunk_hash))


@lru_cache(_CHUNKS_CACHED)
def _readings(author: int, position: int, best: Quality) -> frozenset[bytes]:
    """Digests of decoded values, which do not depend on the chunk's hash."""
    found = set()
    for quality in QUALITIES:
        whole = _blob(author, position, bytes(32), quality)
        header = codec.parse_header(whole)
        for number, end in enumerate(header.layer_bytes):
            if header.quality_at(end) >= best or not number:
                found.add(_digest(codec.decode(whole[:end], LAYOUT)))
    return frozenset(found)


def _digest(values: Any) -> bytes:
    return hashlib.blake2b(values.tobytes(), digest_size=16).digest()
