"""The namespace id: any difference separates, no accident of writing does."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv_strategies import layouts

import kvstore_codec as codec

BASE = codec.KVLayout(
    model="m", revision="r", dtype="bfloat16", chunk_tokens=256,
    layers=(
        codec.LayerSpec(4, 64, 64, rope=codec.RoPE(10000.0, 32, scaling=codec.RopeScaling("llama3", 8, 1, 4, 8192))),
        codec.LayerSpec(4, 64, 32, codec.LayerKind.SLIDING, 512, codec.RoPE(10000.0)),
    ),
)  # fmt: skip

CHANGES: list[tuple[str, Any]] = [
    ("model", "n"), ("revision", "s"), ("dtype", "float16"), ("chunk_tokens", 128),
    ("layers", BASE.layers[:1]), ("layers", BASE.layers[::-1]), ("partition", codec.Partition(2, 1)),
    ("partition", codec.Partition(1, 2)),
]  # fmt: skip
LAYER_CHANGES: list[tuple[str, Any]] = [
    ("kv_heads", 2), ("k_dim", 66), ("v_dim", 62), ("kind", codec.LayerKind.STATE), ("rope", None),
]  # fmt: skip
ROPE_CHANGES: list[tuple[str, Any]] = [
    ("theta", 10001.0), ("rotary_dims", 30), ("interleaved", True), ("scaling", None),
    ("scaling", codec.RopeScaling("linear", 8)), ("scaling", codec.RopeScaling("llama3", 9, 1, 4, 8192)),
    ("scaling", codec.RopeScaling("llama3", 8, 2, 4, 8192)), ("scaling", codec.RopeScaling("llama3", 8, 1, 5, 8192)),
    ("scaling", codec.RopeScaling("llama3", 8, 1, 4, 8191)),
]  # fmt: skip


def test_every_field_of_every_part_is_in_the_id() -> None:
    layer, rope = BASE.layers[0], BASE.layers[0].rope
    assert rope is not None
    variants = [dataclasses.replace(BASE, **{name: value}) for name, value in CHANGES]
    layers = [dataclasses.replace(layer, **{name: value}) for name, value in LAYER_CHANGES]
    layers += [dataclasses.replace(layer, rope=dataclasses.replace(rope, **{n: v})) for n, v in ROPE_CHANGES]
    layers.append(dataclasses.replace(BASE.layers[1], window=513))
    variants += [dataclasses.replace(BASE, layers=(changed, BASE.layers[1])) for changed in layers]
    ids = [variant.namespace_id for variant in (BASE, *variants)]
    assert len(set(ids)) == len(ids)
    changed_names = {name for name, _ in CHANGES} | {"format_version"}
    assert changed_names == {field.name for field in dataclasses.fields(codec.KVLayout)}
    assert {n for n, _ in LAYER_CHANGES} | {"window"} == {f.name for f in dataclasses.fields(codec.LayerSpec)}
    assert {n for n, _ in ROPE_CHANGES} == {f.name for f in dataclasses.fields(codec.RoPE)}


@given(layouts(), st.randoms())
def test_order_of_writing_does_not_matter(layout: codec.KVLayout, rng: random.Random) -> None:
    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            items = list(value.items())
            rng.shuffle(items)
            return {key: shuffled(item) for key, item in items}
        if isinstance(value, list | tuple):
            return [shuffled(item) for item in value]
        return value

    again = codec.KVLayout.from_dict(shuffled(layout.to_dict()))
    assert again == layout
    assert again.namespace_id == layout.namespace_id


@given(layouts(), layouts())
def test_ids_are_equal_exactly_when_layouts_are(one: codec.KVLayout, other: codec.KVLayout) -> None:
    assert (one.namespace_id == other.namespace_id) == (one == other)


@given(layouts())
def test_canonical_bytes_round_trip(layout: codec.KVLayout) -> None:
    assert codec.KVLayout.from_canonical_bytes(layout.canonical_bytes) == layout


def test_number_types_do_not_split_a_namespace() -> None:
    as_int = codec.KVLayout.uniform(
        model="m", revision="r", num_layers=1, kv_heads=1, head_dim=8, rope=codec.RoPE(10000)
    )
    as_float = codec.KVLayout.uniform(
        model="m", revision="r", num_layers=1, kv_heads=1, head_dim=8, rope=codec.RoPE(10000.0)
    )
    assert as_int.namespace_id == as_float.namespace_id


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model": ""}, "model"),
        ({"dtype": "bf16"}, "bfloat16"),
        ({"chunk_tokens": 8}, "16"),
        ({"layers": []}, "layers"),
        ({"wheels": 4}, "wheels"),
        ({"format_version": 2}, "version"),
        ({"kv_heads": 3.0}, "kv_heads"),
        ({"chunk_tokens": "256"}, "chunk_tokens"),
        ({"partition": {"head_groups": 3}}, "head_groups"),
    ],
)
def test_a_bad_layout_is_refused_in_one_line_that_names_the_field(change: dict[str, Any], names: str) -> None:
    data = json.loads(json.dumps(BASE.to_dict()))
    if "kv_heads" in change:
        data["layers"][0].update(change)
    else:
        data.update(change)
    with pytest.raises(codec.LayoutError) as error:
        codec.KVLayout.from_dict(data)
    assert names in str(error.value)
    assert "\n" not in str(error.value)


@given(st.binary(max_size=200))
def test_hostile_layout_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(codec.LayoutError):
        codec.KVLayout.from_canonical_bytes(data)


@given(layouts(), st.data())
def test_no_other_bytes_are_the_same_layout(layout: codec.KVLayout, data: st.DataObject) -> None:
    """One flipped bit is another layout or none: canonical bytes are the only spelling."""
    wire = bytearray(layout.canonical_bytes)
    wire[data.draw(st.integers(0, len(wire) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        other = codec.KVLayout.from_canonical_bytes(bytes(wire))
    except codec.LayoutError:
        return
    assert other != layout


def test_parts_slice_layers_and_heads() -> None:
    layout = dataclasses.replace(BASE, partition=codec.Partition(2, 2))
    part = layout.part_layout(3)
    assert [(spec.kv_heads, spec.v_dim) for spec in part.layers] == [(2, 32)]
    with pytest.raises(codec.LayoutError):
        layout.part_layout(4)
