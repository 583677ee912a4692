"""Profiles: bytes and back, hostile bytes, what may be in one, what is learned from chunks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import golden
import golden_profiles
import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_strategies import layouts, random_kv

import kvstore_codec as codec
from kvstore_codec import api
from kvstore_codec.container import KV
from kvstore_codec.profile import scale_ids_of
from kvstore_codec.profile_bytes import METADATA_BYTES_MAX, PROFILE_HEADER_BYTES
from kvstore_codec.reference.numerics import rotate
from kvstore_codec.rope import rotation_for

BOTH = KV.K | KV.V
LAYOUT = codec.KVLayout.uniform(
    model="m", revision="r", num_layers=2, kv_heads=2, head_dim=8, chunk_tokens=32, rope=codec.RoPE(10000.0)
)
every_golden = pytest.mark.parametrize("name", golden_profiles.profiles())


def group(channels: int = 32, *, kv: KV = BOTH, first: int = 0, count: int = 2, rows: int | None = 3) -> Any:
    return golden_profiles.group(kv, first, count, channels, rows)


def profile(*groups: codec.ProfileGroup, kind: codec.ProfileKind = codec.ProfileKind.TRANSFORM) -> codec.Profile:
    return codec.Profile(kind, codec.model_id_of(LAYOUT), groups or (group(),), {"seed": 7, "text": "é"})


SMALL = profile(group(rows=2), group(4, kv=KV.K, first=2, count=1, rows=4), group(0, kv=KV.V, first=2, count=1, rows=0))
BYTES = SMALL.to_bytes()


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def profiles(draw: st.DrawFn) -> codec.Profile:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(codec.ProfileKind))
    groups, first = [], 0
    for count in draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)):
        for kv in draw(st.sampled_from([(BOTH,), (KV.K, KV.V), (KV.V, KV.K)])):
            channels = draw(st.integers(0, 9))
            transform = kind is codec.ProfileKind.TRANSFORM
            rows = draw(st.integers(0, channels)) if transform else channels
            groups.append(
                codec.ProfileGroup(
                    kv, first, count,
                    mean=rng.standard_normal(channels).astype(np.float32),
                    weight=np.exp2(rng.uniform(-40, 40, channels)).astype(np.float32),
                    basis=rng.standard_normal((rows, channels)).astype(np.float16) if transform else None,
                    scale_ids=rng.integers(0, 64, rows).astype(np.uint8),
                )
            )  # fmt: skip
        first += count
    metadata = draw(st.dictionaries(words, json_values, max_size=4))
    return codec.Profile(kind, rng.bytes(32), tuple(groups), metadata)


def resealed(data: bytes | bytearray) -> bytes:
    """With total length and checksum made right again, as a hostile writer would."""
    forged = bytearray(data)
    forged[48:56] = len(forged).to_bytes(8, "little")
    checksum = xxhash.xxh3_64_intdigest(bytes(forged[:56] + forged[PROFILE_HEADER_BYTES:]))
    forged[56:64] = checksum.to_bytes(8, "little")
    return bytes(forged)


def refused(data: bytes) -> bool:
    """Whether the bytes are refused; what is taken must be what the bytes say, byte for byte."""
    try:
        taken = codec.Profile.from_bytes(data)
    except codec.ProfileError:
        return True
    assert taken.to_bytes() == data
    return False


@given(profiles())
@settings(deadline=None)
def test_bytes_and_back(made: codec.Profile) -> None:
    data = made.to_bytes()
    read = codec.Profile.from_bytes(data)
    assert golden_profiles.described(read) == golden_profiles.described(made)
    assert read.to_bytes() == data
    assert codec.Profile.from_bytes(memoryview(bytearray(data))).profile_id == made.profile_id


def test_the_id_covers_every_field() -> None:
    changed = [
        dataclasses.replace(SMALL, metadata={}), dataclasses.replace(SMALL, model_id=bytes(32)),
        dataclasses.replace(SMALL, groups=(SMALL.groups[0], SMALL.groups[2], SMALL.groups[1])),
    ]  # fmt: skip
    for name in ("mean", "weight", "basis", "scale_ids"):
        array = getattr(SMALL.groups[0], name).copy()
        array.reshape(-1)[-1] += 1
        first = dataclasses.replace(SMALL.groups[0], **{name: array})
        changed.append(dataclasses.replace(SMALL, groups=(first, *SMALL.groups[1:])))
    assert len({made.profile_id for made in [SMALL, *changed]}) == len(changed) + 1


@every_golden
def test_golden_bytes(name: str) -> None:
    stored = (golden.PROFILES / f"{name}.kvp").read_bytes()
    meaning = json.loads((golden.PROFILES / f"{name}.json").read_text("utf-8"))
    assert golden_profiles.profiles()[name].to_bytes() == stored
    assert golden_profiles.described(codec.Profile.from_bytes(stored)) == meaning


def test_no_golden_profile_is_missing_and_none_is_left_over() -> None:
    names = {f"{name}.{suffix}" for name in golden_profiles.profiles() for suffix in ("kvp", "json")}
    assert {path.name for path in golden.PROFILES.iterdir()} == names | {golden_profiles.LEARNED_FROM.name}


def test_every_flipped_bit_is_found() -> None:
    for bit in range(8 * len(BYTES)):
        data = bytearray(BYTES)
        data[bit // 8] ^= 1 << bit % 8
        assert refused(bytes(data)), bit


def test_every_truncation_is_found() -> None:
    for length in range(len(BYTES)):
        assert refused(BYTES[:length])
        assert length < PROFILE_HEADER_BYTES or refused(resealed(BYTES[:length]))
    assert refused(BYTES + b"\0")
    assert refused(resealed(BYTES + b"\0"))


@given(st.binary(max_size=300))
def test_random_bytes(data: bytes) -> None:
    assert refused(data)
    refused(resealed(BYTES[:PROFILE_HEADER_BYTES] + data))


@given(st.data())
@settings(max_examples=400)
def test_forged_bytes_with_a_right_checksum_are_refused_or_mean_what_they_say(data: st.DataObject) -> None:
    forged = bytearray(BYTES)
    for _ in range(data.draw(st.integers(1, 4))):
        forged[data.draw(st.integers(0, len(forged) - 1))] ^= data.draw(st.integers(1, 255))
    refused(resealed(forged))


GROUP_AT = PROFILE_HEADER_BYTES + int.from_bytes(BYTES[12:16], "little")
FIELDS = [
    (4, "<H"), (6, "<H"), (8, "<B"), (9, "<B"), (10, "<H"), (12, "<I"),
    *[(GROUP_AT + at, code) for at, code in [(0, "<B"), (1, "<B"), (2, "<H"), (4, "<H"), (6, "<H"), (8, "<I"),
                                             (12, "<I"), (16, "<Q")]],
]  # fmt: skip


@pytest.mark.parametrize(("offset", "code"), FIELDS)
def test_forged_numbers_are_refused_without_memory_for_them(offset: int, code: str) -> None:
    (was,) = struct.unpack_from(code, BYTES, offset)
    top = 256 ** struct.calcsize(code) - 1
    tracemalloc.start()
    for value in {
        0,
        1,
        2,
        3,
        4,
        7,
        8,
        64,
        255,
        256,
        1 << 15,
        1 << 16,
        1 << 20,
        1 << 31,
        top,
        top - 1,
        was + 1,
        was - 1,
    }:
        if value == was or not 0 <= value <= top:
            continue
        data = bytearray(BYTES)
        struct.pack_into(code, data, offset, value)
        assert refused(resealed(data)), value
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * len(BYTES)


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}x", b'{"a": 1}', b'{"b":1,"a":2}', b'{"a":1,"a":1}', b'{"a":NaN}', b'{"a":1.0e0}', b"\xff",
     b'{"a":"\\u0041"}', b'{"a":"\\ud800"}', b'{"a":' + b"[" * 100_000, b"9" * 5000],
)  # fmt: skip
def test_metadata_that_is_not_canonical_json_is_refused(text: bytes) -> None:
    data = bytearray(BYTES[:PROFILE_HEADER_BYTES] + text + BYTES[GROUP_AT:])
    data[12:16] = len(text).to_bytes(4, "little")
    assert refused(resealed(data))


@pytest.mark.parametrize(
    "metadata", [{"a": math.nan}, {"a": {1, 2}}, {"a": "\ud800"}, {"a": "x" * METADATA_BYTES_MAX}, ["a"]]
)
def test_metadata_must_be_json(metadata: Any) -> None:
    with pytest.raises(codec.ProfileError, match="metadata"):
        dataclasses.replace(SMALL, metadata=metadata)


def test_metadata_is_a_copy() -> None:
    given_metadata = {"a": [1]}
    made = dataclasses.replace(SMALL, metadata=given_metadata)
    before = made.to_bytes()
    given_metadata["a"].append(2)
    assert made.to_bytes() == before


def changed(**values: Any) -> Any:
    return lambda: dataclasses.replace(group(), **values)


def nan_in(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    copy = array.copy()
    copy.reshape(-1)[1] = np.nan
    return copy


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (changed(mean=nan_in(group().mean)), "mean must be finite"),
        (changed(basis=nan_in(group().basis)), "basis must be finite"),
        (changed(weight=group().weight * 0), "weights must be"),
        (changed(weight=-group().weight), "weights must be"),
        (changed(weight=np.full(32, 1e-40, np.float32)), "weights must be"),
        (changed(weight=np.full(32, 2e12, np.float32)), "weights must be"),
        (changed(mean=np.full(32, 2e18, np.float32)), "means must be"),
        (changed(mean=group().mean.astype(np.float64)), "mean must be a float32 array"),
        (changed(basis=group().basis.astype(np.float32)), "basis must be a float16 array"),
        (changed(scale_ids=np.array([1, 2, 64], np.uint8)), "scale ids must be 0–63"),
        (changed(scale_ids=np.array([1, 2], np.uint8)), "scale_ids has the wrong shape"),
        (changed(weight=group().weight[:-1]), "weight has the wrong shape"),
        (changed(basis=np.zeros((3, 31), np.float16)), "basis has the wrong shape"),
        (changed(basis=np.zeros((40, 32), np.float16), scale_ids=np.zeros(40, np.uint8)), "no more rows than channels"),
        (changed(kv=KV(0)), "K, V or both"),
        (changed(layer_count=0), "layers are out of range"),
        (changed(layer_first=4095), "layers are out of range"),
        (lambda: profile(group(rows=None)), "every group of a transform profile has a basis"),
        (lambda: profile(kind=codec.ProfileKind.DIAGONAL), "no other profile's has one"),
        (lambda: profile(group(), group()), "every plane exactly once"),
        (lambda: profile(group(first=1)), "every plane exactly once"),
        (lambda: profile(group(), group(first=3)), "every plane exactly once"),
        (lambda: profile(group(kv=KV.K)), "K and V of the same layers"),
        (lambda: profile(group(), group(kv=KV.K, first=2)), "K and V of the same layers"),
        (lambda: dataclasses.replace(SMALL, groups=()), "K and V of the same layers"),
        (lambda: dataclasses.replace(SMALL, model_id=b"short"), "32 bytes"),
    ],
)  # fmt: skip
def test_what_is_no_profile_is_refused(make: Any, message: str) -> None:
    with pytest.raises(codec.ProfileError, match=message):
        make()


def test_a_profile_fits_its_model_at_every_chunk_size_and_partition() -> None:
    made = profile(group(64))
    for layout in (
        LAYOUT, dataclasses.replace(LAYOUT, chunk_tokens=256),
        dataclasses.replace(LAYOUT, partition=codec.Partition(2, 2)),
    ):  # fmt: skip
        assert made.fits(layout)
        made.require_fit(layout)


@pytest.mark.parametrize(
    ("made", "layout", "message"),
    [
        (profile(group(64)), dataclasses.replace(LAYOUT, revision="other"), "another model"),
        (profile(group(64)), dataclasses.replace(LAYOUT, dtype="float16"), "another model"),
        (profile(group(32)), LAYOUT, "other channels"),
        (profile(group(64, count=3)), LAYOUT, "another number of layers"),
    ],
)
def test_a_profile_that_does_not_fit(made: codec.Profile, layout: codec.KVLayout, message: str) -> None:
    assert not made.fits(layout)
    with pytest.raises(codec.ProfileError, match=message):
        made.require_fit(layout)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "small.kvp"
    SMALL.save(path)
    assert path.read_bytes() == BYTES
    other = dataclasses.replace(SMALL, metadata={})
    other.save(path)
    assert codec.Profile.load(path).profile_id == other.profile_id
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        SMALL.save(tmp_path / "missing" / "small.kvp")
    path.write_bytes(b"KVCP")
    with pytest.raises(codec.ProfileError, match="shorter than its header"):
        codec.Profile.load(path)


def test_a_save_that_fails_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.kvp"
    SMALL.save(path)
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            dataclasses.replace(SMALL, metadata={}).save(path)
    assert path.read_bytes() == BYTES
    assert list(tmp_path.iterdir()) == [path]


@given(st.floats(-9, 9))
def test_scale_ids_are_quarter_octaves(octave: float) -> None:
    expected = 4 * octave + 24
    if abs(expected % 1 - 0.5) > 1e-6:  # beside the borders, where floats decide
        assert scale_ids_of(np.array([4.0**octave]))[0] == min(max(round(expected), 0), 63)


def learned(kv: Any, first_position: int = 4, **arguments: Any) -> codec.Profile:
    return codec.learn_statistics([(kv, first_position)], LAYOUT, **arguments)


def steady_kv(tokens: int = 512, seed: int = 3) -> npt.NDArray[np.float32]:
    """[layers, 2, tokens, heads, dim]: channels of their own mean and scale, keys before RoPE, no drain tokens."""
    rng = np.random.default_rng(seed)
    shape = (2, 2, 1, 2, 8)
    values = rng.standard_normal((2, 2, tokens, 2, 8)) * rng.uniform(0.2, 0.6, shape) + rng.uniform(1, 2, shape)
    return values.astype(np.float32)


def as_cached(kv: npt.NDArray[np.float32], first_position: int) -> Any:
    cached = kv.copy()
    for layer in range(2):
        rotation = rotation_for(LAYOUT.layers[layer], first_position, kv.shape[2])
        cached[layer, 0] = rotate(kv[layer, 0], rotation, inverse=False)
    return cached.astype(codec.empty(LAYOUT, 1).dtype)


def test_statistics_are_those_of_the_unrotated_channels() -> None:
    kv = steady_kv()
    (found,) = learned(as_cached(kv, 100), 100).groups
    flat = kv.transpose(0, 1, 3, 4, 2).reshape(4, 16, -1).astype(np.float64)
    np.testing.assert_allclose(found.mean.reshape(4, 16), flat.mean(axis=2), rtol=2e-3)
    rms = np.sqrt(flat.var(axis=2).mean(axis=1))
    factors = np.array([api.STEP_FACTOR_K, api.STEP_FACTOR_V] * 2)
    np.testing.assert_allclose(found.weight.reshape(4, 16), np.tile(1 / (factors * rms), (16, 1)).T, rtol=2e-3)
    ids = scale_ids_of((flat.var(axis=2) / (factors * rms)[:, None] ** 2).reshape(-1))
    assert np.abs(found.scale_ids.astype(int) - ids).max() <= 1


def test_sinks_and_drain_tokens_do_not_count() -> None:
    kv = as_cached(steady_kv(256), 4)
    head = np.full((2, 2, 4, 2, 8), 1000.0, kv.dtype)
    drains = kv[:, :, 100:104] * kv.dtype.type(0.01)
    with_both = np.concatenate([head, kv, drains], axis=2)
    (expected,), (found,) = learned(kv).groups, learned(with_both, 0).groups
    for name in ("mean", "weight", "scale_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    (moved,) = learned(with_both, 4).groups  # the same tokens where they are no sinks
    assert (moved.weight < expected.weight / 10).all()


def test_chunks_add_up() -> None:
    kv = as_cached(steady_kv(64), 4)
    parts = [(codec.token_slice(kv, first, first + 16), 4 + first) for first in range(0, 64, 16)]
    (found,), (expected,) = codec.learn_statistics(parts, LAYOUT).groups, learned(kv).groups
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-6)
    np.testing.assert_allclose(found.weight, expected.weight, rtol=1e-6)


def test_a_doubled_step_halves_the_weights() -> None:
    kv = as_cached(steady_kv(64), 4)
    (plain,), (coarse,) = learned(kv).groups, learned(kv, step=2.0).groups
    np.testing.assert_array_equal(coarse.weight, plain.weight / 2)
    np.testing.assert_array_equal(coarse.scale_ids, plain.scale_ids - 4)


@given(layouts(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=50)
def test_statistics_of_any_layout_fit_it_and_are_the_same_every_time(layout: codec.KVLayout, seed: int) -> None:
    kv = random_kv(layout, 12, seed)
    with contextlib.suppress(codec.ProfileError):  # a random layer may be all drain tokens
        made = codec.learn_statistics([(kv, 0), (kv, 40)], layout)
        assert made.fits(layout)
        assert made.to_bytes() == codec.learn_statistics([(kv, 0), (kv, 40)], layout).to_bytes()
        assert not refused(made.to_bytes())


def test_what_nothing_can_be_learned_from() -> None:
    kv = as_cached(steady_kv(8), 0)
    with pytest.raises(codec.ProfileError, match="no token to learn from"):
        learned(codec.token_slice(kv, 0, 4), 0)
    with pytest.raises(codec.ProfileError, match="no token to learn from"):
        codec.learn_statistics([], LAYOUT)
    with pytest.raises(codec.LayoutError, match="float8_e4m3fn"):
        codec.learn_statistics([], dataclasses.replace(LAYOUT, dtype="float8_e4m3fn"))
    for bad in (np.nan, np.inf, 3e38):
        kv[1, 0, 6, 1, 3] = bad
        with pytest.raises(codec.ValuesError, match="NaN"):
            learned(kv)
    for arguments in ({"step": 0.0}, {"step": np.inf}, {"first_position": -1}):
        with pytest.raises(codec.LayoutError, match="must"):
            learned(kv, **arguments)


def test_a_plane_that_never_changes_has_a_profile() -> None:
    kv = steady_kv(32)
    kv[0, 1] = 1.5
    (found,) = learned(as_cached(kv, 4)).groups
    assert (found.weight.reshape(4, 16)[1] == 1).all()
    assert (found.scale_ids.reshape(4, 16)[1] == 0).all()


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**50])
def test_planes_of_absurd_scale_have_a_profile(scale: float) -> None:
    (found,) = learned(as_cached(steady_kv(32) * np.float32(scale), 4)).groups
    assert (found.weight == (2.0**39 if scale < 1 else 2.0**-39)).all()
