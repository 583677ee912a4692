"""Prompts with their KV and objects, for tests of the client."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

import kvstore_codec as codec


@dataclass(frozen=True)
class Prompt:
    """`kv` holds all of `tokens`; the rest follows from them."""

    layout: codec.KVLayout
    tokens: list[int]
    kv: Any

    @cached_property
    def refs(self) -> list[codec.ChunkRef]:
        return codec.chunk_refs(self.layout, self.tokens)

    def chunk_kv(self, index: int) -> Any:
        ref = self.refs[index]
        return codec.token_slice(self.kv, ref.first_token, ref.first_token + ref.tokens)

    def blob(self, index: int, quality: str = "raw", **changes: Any) -> bytes:
        """Chunk `index` as a client would store it; `changes` are arguments of `codec.encode` that lie."""
        ref = self.refs[index]
        honest: dict[str, Any] = {"quality": quality, "first_position": ref.first_token, "chunk_hash": ref.hash}
        return bytes(codec.encode(self.chunk_kv(index), self.layout, **(honest | changes)))


def layout(model: str = "test-model", *, dtype: str = "bfloat16", wide: bool = False) -> codec.KVLayout:
    """Two layers of chunks of 16 tokens; `wide`: raw objects of 2 MiB, which travel in several messages."""
    return codec.KVLayout.uniform(
        model=model, revision="r1", num_layers=16 if wide else 2, kv_heads=8 if wide else 2,
        head_dim=256 if wide else 16, dtype=dtype, chunk_tokens=16, rope=codec.RoPE(theta=10000.0),
    )  # fmt: skip


def prompt(of: codec.KVLayout, tokens: int, seed: int = 0) -> Prompt:
    rng = np.random.default_rng(seed)
    kv = codec.empty(of, tokens)
    kv[...] = rng.standard_normal(kv.shape, dtype=np.float32).astype(kv.dtype)
    return Prompt(of, [int(token) for token in rng.integers(0, 50_000, tokens)], kv)


def same(one: Any, other: Any) -> bool:
    """Bit for bit, whatever the dtype."""
    return bool(one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes())
