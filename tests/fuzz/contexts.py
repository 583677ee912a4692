"""Small layouts of every kind, with profiles, that the Python targets read and write objects of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import kvstore_codec as codec
from kvstore_codec.container import KV


@dataclass(frozen=True)
class Context:
    layout: codec.KVLayout
    profile: codec.Profile | None = None
    part: int = 0


def _uniform(
    dtype: str = "bfloat16", heads: int = 2, dim: int = 16, partition: codec.Partition | None = None
) -> codec.KVLayout:
    return codec.KVLayout.uniform(
        model="fuzz", revision="0", num_layers=2, kv_heads=heads, head_dim=dim, dtype=dtype, chunk_tokens=40,
        rope=codec.RoPE(10000.0), partition=partition,
    )  # fmt: skip


_MIXED = codec.KVLayout(
    model="fuzz", revision="1", dtype="float16", chunk_tokens=40,
    layers=(
        codec.LayerSpec(2, 16, 8, rope=codec.RoPE(500000.0, scaling=codec.RopeScaling("llama3", 8, 1, 4, 8192))),
        codec.LayerSpec(2, 12, 12, codec.LayerKind.SLIDING, 512, codec.RoPE(10000.0, 8, interleaved=True)),
        codec.LayerSpec(1, 24, 0, codec.LayerKind.MLA),
        codec.LayerSpec(1, 6, 6, codec.LayerKind.STATE),
    ),
)  # fmt: skip


def _group(kv: KV, channels: int, rows: int | None) -> codec.ProfileGroup:
    index = np.arange(channels)
    basis = None if rows is None else (np.add.outer(7 * np.arange(rows), 3 * index) % 11 / 32 - 0.15).astype(np.float16)
    return codec.ProfileGroup(
        kv, 0, 2, mean=((index % 9 - 4) / 4).astype(np.float32), weight=np.exp2(index % 7 - 2.0).astype(np.float32),
        basis=basis, scale_ids=(index[: channels if rows is None else rows] * 5 % 64).astype(np.uint8),
    )  # fmt: skip


def _profile(layout: codec.KVLayout, kind: codec.ProfileKind, *groups: codec.ProfileGroup) -> codec.Profile:
    return codec.Profile(kind, codec.model_id_of(layout), groups, {"made": "for fuzzing"})


CONTEXTS = [
    Context(_uniform()),
    Context(_MIXED),
    Context(_uniform("float32", 4, partition=codec.Partition(2, 2)), part=3),
    Context(_uniform("float8_e4m3fn")),
    Context(_uniform("int8")),
    Context(_uniform(), _profile(_uniform(), codec.ProfileKind.TRANSFORM, _group(KV.K | KV.V, 128, 45))),
    Context(
        _uniform("float16"),
        _profile(_uniform("float16"), codec.ProfileKind.DIAGONAL, _group(KV.K, 64, None), _group(KV.V, 64, None)),
    ),
    Context(_uniform("float8_e5m2", 1, 6)),
]
