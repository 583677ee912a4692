"""Every instruction set gives the scalar kernels' bytes, values and errors (codec/native/kernels.hpp)."""

from __future__ import annotations

import functools
import itertools
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_strategies import bits

import kvstore_codec as codec
from kvstore_codec import _native
from kvstore_codec.native import NativeCoder
from kvstore_codec.reference.coder import ReferenceCoder
from kvstore_codec.segments import NO_DRAINS, CodedPlane, LossySegment

CODERS = {name: NativeCoder(name) for _, name in _native.instruction_sets()}
SCALAR = CODERS["scalar"]
VECTOR_SETS = [name for name in CODERS if name != "scalar"]
LOSSY_LEVELS = {"low": 1, "medium": 2, "high": 3}
QUALITIES = ["lossless", *LOSSY_LEVELS]
TOKENS_MAX = 300
ENDS_EARLY = "an entropy-coded stream ends early"


@dataclass(frozen=True, repr=False)
class Cache:
    layout: codec.KVLayout
    kv: Any
    first_position: int

    def __repr__(self) -> str:
        layer = self.layout.layers[0]
        return f"Cache({layer.kv_heads} x {layer.k_dim}, {self.kv.shape[2]} tokens at {self.first_position})"

    def encode(self, quality: str, coder: Any) -> bytes:
        return codec.encode(self.kv, self.layout, quality=quality, first_position=self.first_position, coder=coder)


def cache(heads: int, dim: int, tokens: int, *, dtype: str, first_position: int, tail: float, seed: int) -> Cache:
    """KV with Student's t of `tail` degrees of freedom in each channel; below 2 some values exceed every table."""
    layout = codec.KVLayout.uniform(
        model="m", revision="r", num_layers=2, kv_heads=heads, head_dim=dim, dtype=dtype, chunk_tokens=512,
        rope=codec.RoPE(10000.0),
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    scales = np.exp2(rng.integers(-4, 5, (2, 2, 1, heads, dim)))
    values = (rng.standard_t(tail, (2, 2, tokens, heads, dim)) + rng.standard_normal(scales.shape)) * scales
    values[:, :, rng.random(tokens) < 0.05] *= 0.01
    kv = codec.empty(layout, tokens)
    kv[...] = np.clip(values, -60000, 60000).astype(kv.dtype)
    return Cache(layout, kv, first_position)


caches = st.builds(
    cache,
    st.integers(1, 5), st.sampled_from([2, 6, 10, 22, 32, 40]), st.integers(1, TOKENS_MAX),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]), first_position=st.sampled_from([0, 2, 1000]),
    tail=st.sampled_from([1.1, 2.0, 30.0]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip

#: Enough symbols for two streams and more, which are decoded in lockstep; the last of 7 blocks has 8 lanes.
LARGE = cache(5, 40, TOKENS_MAX, dtype="bfloat16", first_position=1000, tail=1.5, seed=1)


def assert_like_scalar(isa: str, cache: Cache, quality: str) -> None:
    blob = cache.encode(quality, SCALAR)
    assert cache.encode(quality, CODERS[isa]) == blob
    values = bits(codec.decode(blob, cache.layout, coder=SCALAR))
    assert bits(codec.decode(blob, cache.layout, coder=CODERS[isa])) == values
    assert quality != "lossless" or values == bits(cache.kv)


@pytest.mark.parametrize("isa", VECTOR_SETS)
@given(cache=caches, quality=st.sampled_from(QUALITIES))
@settings(deadline=None, max_examples=80)
def test_bytes_and_values_are_the_scalar_ones(isa: str, cache: Cache, quality: str) -> None:
    assert_like_scalar(isa, cache, quality)


@pytest.mark.parametrize("isa", VECTOR_SETS)
@pytest.mark.parametrize("quality", QUALITIES)
def test_streams_in_lockstep(isa: str, quality: str) -> None:
    assert_like_scalar(isa, LARGE, quality)


@given(cache=caches, quality=st.sampled_from(QUALITIES))
@settings(deadline=None, max_examples=20)
def test_the_reference_agrees(cache: Cache, quality: str) -> None:
    """NumPy code that shares nothing with the kernels."""
    reference = ReferenceCoder()
    blob = cache.encode(quality, reference)
    values = bits(codec.decode(blob, cache.layout, coder=reference))
    for coder in CODERS.values():
        assert cache.encode(quality, coder) == blob
        assert bits(codec.decode(blob, cache.layout, coder=coder)) == values


@functools.cache
def plane_bits() -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
    """(K, V) of a layer of LARGE."""
    key, value = LARGE.kv[0].view(np.uint16)
    return key, value


@functools.cache
def payloads(quality: str) -> list[bytes]:
    """One segment's payloads, of quality layers 0…n−1."""
    if quality == "lossless":
        return SCALAR.encode_lossless([plane_bits()], "bfloat16", 1)
    segment = LossySegment([CodedPlane(plane, None, 0.75) for plane in plane_bits()], NO_DRAINS)
    return SCALAR.encode_lossy([segment], 0, "bfloat16", LOSSY_LEVELS[quality], 1)[0]


def outcome(isa: str, quality: str, stored: Sequence[bytes]) -> bytes | str:
    """The decoded bits, or the error's message."""
    coder = CODERS[isa]
    planes = [np.zeros_like(plane) for plane in plane_bits()]
    views = [memoryview(payload) for payload in stored]
    try:
        if quality == "lossless":
            coder.decode_lossless([planes], views, "bfloat16", 1)
        else:
            segment = LossySegment([CodedPlane(plane, None, 0.75) for plane in planes], NO_DRAINS)
            coder.decode_lossy([segment], [views], 0, "bfloat16", 1)
    except codec.DamagedObject as error:
        return str(error)
    return b"".join(plane.tobytes() for plane in planes)


@functools.cache
def split(payload: bytes) -> tuple[bytes, tuple[bytes, ...]]:
    """What precedes the streams section that ends a payload, and its streams (FORMAT.md §3): a few, of LARGE."""
    for at in range(len(payload) - 1):
        (count,) = struct.unpack_from("<H", payload, at)
        first = at + 2 + 4 * count
        if not 0 < count < 10 or first > len(payload):
            continue
        lengths = [128 + 2 * words for words in struct.unpack_from(f"<{count}I", payload, at + 2)]
        if first + sum(lengths) == len(payload):
            ends = np.cumsum([first, *lengths])
            return payload[:at], tuple(payload[start:end] for start, end in itertools.pairwise(ends))
    raise AssertionError("no streams section")


def join(before: bytes, streams: Sequence[bytes]) -> bytes:
    words = [(len(stream) - 128) // 2 for stream in streams]
    return before + struct.pack(f"<H{len(words)}I", len(words), *words) + b"".join(streams)


@given(quality=st.sampled_from(QUALITIES), words=st.integers(1, 200), data=st.data())
@settings(deadline=None, max_examples=60)
def test_streams_that_run_dry(quality: str, words: int, data: st.DataObject) -> None:
    """A decoder takes exactly the words that there are: without the last ones it always ends early."""
    stored = list(payloads(quality))
    level = data.draw(st.integers(0, len(stored) - 1))
    before, streams = split(stored[level])
    assert len(streams) >= 2
    index = data.draw(st.integers(0, len(streams) - 1))
    short = streams[index][: max(128, len(streams[index]) - 2 * words)]
    stored[level] = join(before, [*streams[:index], short, *streams[index + 1 :]])
    for isa in CODERS:
        assert outcome(isa, quality, stored) == ENDS_EARLY


@pytest.mark.parametrize("isa", VECTOR_SETS)
@given(quality=st.sampled_from(QUALITIES), rng=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=80)
def test_forged_words(isa: str, quality: str, rng: random.Random) -> None:
    """Other states and words decode to other values and escapes, and use up other numbers of words."""
    stored = list(payloads(quality))
    level = rng.randrange(len(stored))
    before, streams = split(stored[level])
    index = rng.randrange(len(streams))
    forged = bytearray(streams[index])
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(forged))
        forged[at : at + 2] = rng.randbytes(min(2, len(forged) - at))
    if rng.random() < 0.3:  # a longer stream cannot run dry, so that the other errors are reached, and none
        forged += rng.randbytes(2 * rng.randint(1, 100))
    stored[level] = join(before, [*streams[:index], bytes(forged), *streams[index + 1 :]])
    assert outcome(isa, quality, stored) == outcome("scalar", quality, stored)
