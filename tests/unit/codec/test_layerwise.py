"""One chunk as an object a layer: they decode alone, are told apart, and join to the chunk's own object."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_strategies import bits, layouts, random_kv

import kvstore_codec as codec
from kvstore_codec import KVLayout, LayerSpec, Partition, Quality

HASH = bytes(range(32))


def pairs(kv: codec.KVArray) -> list[codec.KVArray]:
    """(k, v) of each layer."""
    return [(layer[0], layer[1]) for layer in kv]


def objects_of(
    kv: codec.KVArray, layout: KVLayout, quality: str, *, part: int = 0, first_position: int = 0
) -> list[bytes]:  # fmt: skip
    by_layers = codec.layout_by_layers(layout)
    return [
        codec.encode(
            [pair], by_layers, quality=quality, first_position=first_position, chunk_hash=HASH,
            part=codec.layer_part(layout, part, layer),
        )
        for layer, pair in enumerate(pairs(kv))
    ]  # fmt: skip


@given(
    layout=layouts(), tokens=st.integers(1, 40), first_position=st.sampled_from([0, 3, 4096]),
    quality=st.sampled_from([quality.label for quality in Quality]), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_layers_join_to_an_object_of_the_same_values(
    layout: KVLayout, tokens: int, first_position: int, quality: str, seed: int
) -> None:
    tokens = min(tokens, layout.chunk_tokens)
    kv = random_kv(layout, tokens, seed)
    objects = objects_of(kv, layout, quality, first_position=first_position)
    joined = codec.join_layers(objects, layout)
    codec.check_header(codec.parse_header(joined), layout, chunk_hash=HASH, part=0)
    for read_at in [None, *(other.label for other in Quality)]:
        whole = pairs(codec.decode(joined, layout, quality=read_at))
        for layer, blob in enumerate(objects):
            alone = pairs(codec.decode(blob, codec.layout_by_layers(layout), quality=read_at))
            assert bits(alone) == bits([whole[layer]]), (layer, read_at)
    if Quality.parse(quality).exact:
        assert bits(codec.decode(joined, layout)) == bits(kv)


@pytest.mark.parametrize("quality", [quality.label for quality in Quality])
def test_where_layers_have_their_own_segments_the_joined_object_is_the_encoders(quality: str) -> None:
    layout = KVLayout.uniform(model="m", revision="r", num_layers=3, kv_heads=4, head_dim=64, chunk_tokens=512)
    kv = random_kv(layout, 512, seed=1)
    expected = codec.encode(kv, layout, quality=quality, chunk_hash=HASH, first_position=512)
    assert codec.join_layers(objects_of(kv, layout, quality, first_position=512), layout) == expected


def test_every_layer_of_every_part_is_a_part_of_its_own() -> None:
    layout = KVLayout.uniform(
        model="m", revision="r", num_layers=6, kv_heads=4, head_dim=16, chunk_tokens=16, dtype="float16",
        partition=Partition(layer_groups=2, head_groups=2),
    )  # fmt: skip
    seen = [codec.layer_part(layout, part, layer) for part in range(4) for layer in range(3)]
    assert sorted(seen) == list(range(12))
    kv = random_kv(layout.part_layout(3), 16, seed=2)
    joined = codec.join_layers(objects_of(kv, layout, "lossless", part=3), layout, part=3)
    assert bits(codec.decode(joined, layout, part=3)) == bits(kv)
    with pytest.raises(codec.ForeignObject):
        codec.join_layers(objects_of(kv, layout, "lossless", part=2), layout, part=3)
    for part, layer in ((4, 0), (-1, 0), (0, 3), (0, -1)):
        with pytest.raises(codec.LayoutError):
            codec.layer_part(layout, part, layer)


def test_layers_that_are_not_one_chunks_do_not_join() -> None:
    layout = KVLayout.uniform(model="m", revision="r", num_layers=3, kv_heads=2, head_dim=16, chunk_tokens=16)
    kv = random_kv(layout, 16, seed=3)
    objects = objects_of(kv, layout, "high")
    with pytest.raises(codec.LayoutError):
        codec.join_layers(objects[:2], layout)
    with pytest.raises(codec.ForeignObject):
        codec.join_layers([objects[1], objects[0], objects[2]], layout)
    for other in (
        objects_of(kv, layout, "medium"), objects_of(kv, layout, "lossless"),
        objects_of(kv, layout, "high", first_position=16), objects_of(kv[:, :, :15], layout, "high"),
        [bytes(codec.truncate(blob, "low")) for blob in objects],
    ):  # fmt: skip
        with pytest.raises(codec.DamagedObject):
            codec.join_layers([*objects[:2], other[2]], layout)
    damaged = bytearray(objects[1])
    damaged[-1] ^= 1
    with pytest.raises(codec.DamagedObject):
        codec.join_layers([objects[0], damaged, objects[2]], layout)


def test_exact_state_among_lossy_layers_is_not_refined() -> None:
    layers = (LayerSpec(2, 16, 16), LayerSpec(2, 16, 16, kind=codec.LayerKind.STATE), LayerSpec(2, 16, 16))
    layout = KVLayout("m", "r", "float32", 16, layers)
    kv = random_kv(layout, 16, seed=4)
    joined = codec.join_layers(objects_of(kv, layout, "high"), layout)
    for quality in ("high", "low"):
        decoded = codec.decode(codec.truncate(joined, quality), layout)
        assert np.array_equal(decoded[1], kv[1])
        assert not np.array_equal(decoded[0], kv[0])
