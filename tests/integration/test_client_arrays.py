"""Every form of array that the client takes and fills: what is put comes back, bit for bit, at every quality."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from client_prompts import CHUNK, counted, expected, names, new_layout, prompt
from kv_strategies import bits, random_kv
from prometheus_client import CollectorRegistry

import kvstore_codec as codec
from kvstore_client import Client, InvalidArgument, KVLayout, LayerSpec, LayoutError, Partition, PutResult, Quality

QUALITIES = [quality.label for quality in Quality]


def mixed_layout() -> KVLayout:
    return KVLayout(
        model=next(names), revision="r", dtype="float16", chunk_tokens=CHUNK,
        layers=(
            LayerSpec(kv_heads=2, k_dim=16, v_dim=16, rope=codec.RoPE(theta=10000.0)),
            LayerSpec(kv_heads=1, k_dim=8, v_dim=4),
            LayerSpec(kv_heads=3, k_dim=6, v_dim=0),
        ),
    )  # fmt: skip


class BareDLPack:
    """An array of a library that we know nothing of but that it speaks DLPack."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **arguments: Any) -> Any:
        return self._array.__dlpack__(**arguments)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def as_torch(array: np.ndarray[Any, Any]) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def bits_of_torch(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy())


# What is put comes back


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_round_trip(client: Client, dtype: str, quality: str) -> None:
    layout = new_layout(dtype)
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 3.5)
    stored = cache.put(tokens, kv, quality=quality)
    assert stored == PutResult(stored=3, tokens=3 * CHUNK, bytes=stored.bytes)
    assert stored.bytes > 0
    got, n = cache.get(tokens)
    assert n == 3 * CHUNK
    assert bits(got) == expected(layout, kv, n, quality)
    assert (bits(got) == bits(codec.token_slice(kv, 0, n))) == Quality.parse(quality).exact


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_torch_in_and_torch_out(client: Client, dtype: str) -> None:
    layout = new_layout(dtype)
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 2)
    engine = as_torch(kv).permute(0, 1, 3, 2, 4).contiguous().permute(0, 1, 3, 2, 4)  # strided as an engine's is
    assert not engine.is_contiguous()
    cache.put(tokens, engine, quality="lossless")
    out = torch.empty_like(engine)
    got, n = cache.get(torch.tensor(tokens), out=out)
    assert isinstance(got, torch.Tensor)
    assert (n, got.data_ptr()) == (2 * CHUNK, out.data_ptr())
    assert bits_of_torch(out) == bits(kv)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lists_of_pairs(client: Client, dtype: str) -> None:
    layout = new_layout(dtype)
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 2)
    cache.put(tokens, [(as_torch(layer[0]), layer[1]) for layer in kv], quality="raw")
    out = [(np.zeros_like(layer[0]), torch.zeros_like(as_torch(layer[1]))) for layer in kv]
    got, n = cache.get(tokens, out=out)
    assert n == 2 * CHUNK
    for (k, v), (k_out, _), layer in zip(got, out, kv, strict=True):
        assert np.shares_memory(k, k_out)
        assert (bits(k), bits_of_torch(v)) == (bits(layer[0]), bits(layer[1]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_arrays_that_only_speak_dlpack(client: Client, dtype: str) -> None:
    layout = new_layout(dtype)
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 2)
    assert cache.put(tokens, BareDLPack(as_torch(kv)), quality="raw").stored == 2
    assert bits(cache.get(tokens)[0]) == bits(kv)
    out = torch.zeros_like(as_torch(kv))
    got, n = cache.get(tokens, out=BareDLPack(out))
    assert n == 2 * CHUNK
    assert bits_of_torch(out) == bits(kv)
    assert [np.shares_memory(k, out.view(torch.int16).numpy()) for k, _ in got] == [True] * 3
    pairs = [(BareDLPack(as_torch(layer[0])), layer[1]) for layer in kv]
    other = [9, *tokens[1:]]
    assert cache.put(other, pairs, quality="raw").stored == 2
    assert bits(cache.get(other)[0]) == bits(kv)


@pytest.mark.parametrize("quality", QUALITIES)
def test_layers_of_different_shapes(client: Client, quality: str) -> None:
    layout = mixed_layout()
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 2)
    cache.put(tokens, kv, quality=quality)
    got, n = cache.get(tokens)
    assert [(k.shape, v.shape) for k, v in got] == [(k.shape, v.shape) for k, v in kv]
    assert (n, bits(got)) == (2 * CHUNK, expected(layout, kv, n, quality))
    out = codec.empty(layout, 5 * CHUNK)
    assert bits(cache.get(tokens, out=out)[0]) == bits(codec.token_slice(out, 0, n)) == bits(got)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "uint8"])
def test_dtypes_that_lossy_qualities_do_not_take_come_back_exactly(client: Client, dtype: str) -> None:
    layout = new_layout(dtype)
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 2)
    cache.put(tokens, kv, quality="low")
    got, n = cache.get(tokens, min_quality="lossless")
    assert (n, bits(got)) == (2 * CHUNK, bits(kv))


def test_parts_of_one_layout_lie_side_by_side(client: Client) -> None:
    layout = new_layout(partition=Partition(layer_groups=3, head_groups=2))
    tokens = prompt(layout, 2)[0]
    whole = [random_kv(layout.part_layout(part), 2 * CHUNK, part) for part in range(layout.partition.parts)]
    for part, kv in enumerate(whole):
        assert client.namespace(layout, part=part).put(tokens, kv, quality="raw").stored == 2
    for part, kv in enumerate(whole):
        assert bits(client.namespace(layout, part=part).get(tokens)[0]) == bits(kv)
    with pytest.raises(InvalidArgument, match="no such part"):
        client.namespace(layout, part=layout.partition.parts)


# The caller's buffer


@pytest.mark.parametrize("room", [0, CHUNK - 1, CHUNK, 2 * CHUNK + 5, 3 * CHUNK, 4 * CHUNK, 10 * CHUNK])
def test_a_buffer_smaller_or_larger_than_the_hit(client: Client, room: int, registry: CollectorRegistry) -> None:
    layout = new_layout()
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 4)
    cache.put(tokens[: 3 * CHUNK], codec.token_slice(kv, 0, 3 * CHUNK), quality="raw")
    out = np.full((3, 2, room, 2, 16), 7, np.float16)
    got, n = cache.get(tokens, out=out)
    assert n == min(3, room // CHUNK) * CHUNK
    assert got.shape[2] == n
    assert n == 0 or np.shares_memory(got, out)
    assert bits(out[:, :, :n]) == bits(codec.token_slice(kv, 0, n))
    assert (out[:, :, n:] == 7).all()
    assert counted(registry, "tokens", outcome="hit") == n
    assert counted(registry, "tokens", outcome="miss") == 4 * CHUNK - n


def test_a_buffer_with_gaps_between_its_rows(client: Client) -> None:
    layout = new_layout()
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 2)
    cache.put(tokens, kv, quality="high")
    pool = np.full((3, 2, 3, 2 * CHUNK, 40), 7, np.float16)  # heads before tokens, rows longer than head_dim
    out = pool.transpose(0, 1, 3, 2, 4)[:, :, :, 1:, 8:24]
    assert bits(cache.get(tokens, out=out)[0]) == expected(layout, kv, 2 * CHUNK, "high")
    pool.transpose(0, 1, 3, 2, 4)[:, :, :, 1:, 8:24] = 7
    assert (pool == 7).all()


def test_a_buffer_that_does_not_fit_is_the_callers_mistake(client: Client) -> None:
    layout = new_layout()
    cache = client.namespace(layout)
    tokens, kv = prompt(layout, 2)
    cache.put(tokens, kv)
    read_only = np.zeros_like(kv)
    read_only.flags.writeable = False
    misfits: tuple[Any, ...] = (kv[:2], kv[..., :8], kv.astype(np.float32), "kv", 7, [], read_only)
    for out in misfits:
        with pytest.raises(LayoutError) as raised:
            cache.get(tokens, out=out)
        assert len(str(raised.value).splitlines()) == 1
