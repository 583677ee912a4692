"""Namespaces that no other test has, prompts for them, and the bits that the client must bring back."""

from __future__ import annotations

import itertools
from typing import Any

from kv_strategies import bits, random_kv
from prometheus_client import CollectorRegistry

import kvstore_codec as codec
from kvstore_client import KVLayout

CHUNK = 16
DEADLINE_S = 20.0  # of calls that are not about time
names = (f"client-test-{number}" for number in itertools.count())


def new_layout(dtype: str = "float16", **changes: Any) -> KVLayout:
    """Three layers of two heads, chunks of 16 tokens."""
    return KVLayout.uniform(
        model=next(names), revision="r", num_layers=3, kv_heads=2, head_dim=16, dtype=dtype, chunk_tokens=CHUNK,
        rope=codec.RoPE(theta=10000.0), **changes,
    )  # fmt: skip


def prompt(layout: KVLayout, chunks: float, *, seed: int = 1) -> tuple[list[int], Any]:
    tokens = int(chunks * CHUNK)
    return [seed * 1000 + position for position in range(tokens)], random_kv(layout, tokens, seed)


def expected(layout: KVLayout, kv: Any, tokens: int, stored: str, read: str | None = None) -> bytes:
    """Of each chunk by itself, what the codec makes of it."""
    out = codec.empty(layout, tokens)
    for first in range(0, tokens, CHUNK):
        last = min(first + CHUNK, tokens)
        blob = codec.encode(codec.token_slice(kv, first, last), layout, quality=stored, first_position=first)
        if read is not None:
            blob = bytes(codec.truncate(blob, read))
        codec.decode(blob, layout, out=codec.token_slice(out, first, last))
    return bits(out)


def counted(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(f"kvstore_client_{name}_total", labels) or 0.0
