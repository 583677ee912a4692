"""Hypothesis strategies for layouts and for KV of every shape the codec must take."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

import kvstore_codec as codec

ropes = st.one_of(
    st.none(),
    st.builds(
        codec.RoPE,
        theta=st.sampled_from([100.0, 10000.0, 500000.0]),
        rotary_dims=st.sampled_from([None, 2, 4]),
        interleaved=st.booleans(),
        scaling=st.sampled_from([
            None, codec.RopeScaling("linear", 4.0), codec.RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        ]),
    ),
)  # fmt: skip


@st.composite
def layer_specs(draw: st.DrawFn, *, uniform_width: bool = False) -> codec.LayerSpec:
    kind = draw(st.sampled_from(list(codec.LayerKind)))
    k_dim = draw(st.sampled_from([4, 6, 16]))
    v_dim = k_dim if uniform_width else draw(st.sampled_from([0, 4, 10]))
    return codec.LayerSpec(
        kv_heads=draw(st.integers(1, 3)), k_dim=k_dim, v_dim=v_dim, kind=kind,
        window=128 if kind is codec.LayerKind.SLIDING else None, rope=draw(ropes),
    )  # fmt: skip


@st.composite
def layouts(draw: st.DrawFn, *, dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")) -> codec.KVLayout:
    if draw(st.booleans()):
        layers = (draw(layer_specs(uniform_width=True)),) * draw(st.integers(1, 3))
    else:
        layers = tuple(draw(st.lists(layer_specs(), min_size=1, max_size=3)))
    return codec.KVLayout(
        model="m", revision="r", dtype=draw(st.sampled_from(dtypes)), chunk_tokens=draw(st.sampled_from([16, 40])),
        layers=layers,
    )  # fmt: skip


def random_kv(layout: codec.KVLayout, tokens: int, seed: int) -> Any:
    """KV with what real caches have: channels of very different scales and means, constant and empty channels,
    and tokens of tiny norm."""
    rng = np.random.default_rng(seed)
    kv = codec.empty(layout, tokens)
    for array in (
        [kv[layer, side] for layer in range(len(kv)) for side in range(2)]
        if layout.is_uniform
        else [array for pair in kv for array in pair]
    ):
        shape = array.shape
        values = rng.standard_normal(shape) * np.exp2(rng.integers(-6, 6, shape[1:])) + rng.standard_normal(shape[1:])
        values[:, rng.random(shape[1:]) < 0.1] = 0.0
        values[:, rng.random(shape[1:]) < 0.1] = 3.25
        values[rng.random(tokens) < 0.1] *= 0.01
        if rng.random() < 0.2:
            values *= 2.0 ** rng.integers(-8, 8)
        array[...] = values.astype(array.dtype)
    return kv


def bits(kv: Any) -> bytes:
    """The exact bytes of an array or list of pairs."""
    if isinstance(kv, list):
        return b"".join(np.ascontiguousarray(array).tobytes() for pair in kv for array in pair)
    return np.ascontiguousarray(kv).tobytes()
