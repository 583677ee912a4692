"""A profile as rows of objects and back, whatever its length; and rows that lie."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from small_profiles import transform_profile

import kvstore_codec as codec
from kvstore_client import InvalidArgument, KVLayout, LayerSpec, Partition, ProfileDamaged, profiles
from kvstore_client.profiles import (
    CHUNK_BYTES,
    PROFILE_BYTES_MAX,
    PROFILE_LAYOUT,
    ROW_BYTES,
    as_kv,
    chunks_of,
    empty_rows,
    length_in,
    pack,
    parse,
    profile_refs,
    require_usable,
    unpack,
)

LAYOUT = KVLayout.uniform(model="m", revision="r", num_layers=2, kv_heads=2, head_dim=16, chunk_tokens=16)
PROFILE = transform_profile(LAYOUT)
FULL = CHUNK_BYTES - ROW_BYTES  # the longest profile of one chunk
KEY = codec.DEFAULT_TENANT_KEY


@given(length=st.integers(1, 3 * CHUNK_BYTES), seed=st.integers(0, 9))
@example(length=1, seed=0)
@example(length=FULL, seed=0)
@example(length=FULL + 1, seed=0)
@example(length=FULL + CHUNK_BYTES, seed=0)
def test_bytes_come_back_through_objects(length: int, seed: int) -> None:
    data = np.random.default_rng(seed).bytes(length)
    rows = pack(data)
    assert len(rows) == PROFILE_LAYOUT.chunk_tokens * chunks_of(length)
    refs = profile_refs(bytes(32), chunks_of(length), KEY)
    arrived = empty_rows(len(refs))
    for ref in refs:
        some = slice(ref.first_token, ref.first_token + ref.tokens)
        blob = codec.encode(
            as_kv(rows[some]), PROFILE_LAYOUT, quality="raw", first_position=ref.first_token, chunk_hash=ref.hash
        )
        codec.decode(blob, PROFILE_LAYOUT, out=as_kv(arrived[some]), chunk_hash=ref.hash)
    assert bytes(unpack(arrived)) == data


def test_the_id_is_the_address() -> None:
    (first,) = profile_refs(PROFILE.profile_id, 1, KEY)
    refs = profile_refs(PROFILE.profile_id, 5, KEY)
    others = [*profile_refs(bytes(32), 5, KEY), *profile_refs(PROFILE.profile_id, 5, bytes(range(32)))]
    assert refs[0] == first
    assert len({ref.hash for ref in [*refs, *others]}) == 15


@pytest.mark.parametrize("length", [0, PROFILE_BYTES_MAX + 1, 2**63, 2**64 - 1])
def test_an_impossible_length_is_not_believed(length: int) -> None:
    rows = pack(b"profile")
    rows[0, :8] = np.frombuffer(length.to_bytes(8, "little"), np.uint8)
    for read in (length_in, unpack):
        with pytest.raises(ProfileDamaged, match="impossible length"):
            read(rows)


@pytest.mark.parametrize("length", [FULL + 1, PROFILE_BYTES_MAX])
def test_a_length_beyond_the_rows_is_not_read(length: int) -> None:
    rows = pack(b"profile")
    rows[0, :8] = np.frombuffer(length.to_bytes(8, "little"), np.uint8)
    with pytest.raises(ProfileDamaged, match="another length"):
        unpack(rows)


def test_only_the_profile_with_the_id_is_taken() -> None:
    data = PROFILE.to_bytes()
    assert parse(data, PROFILE.profile_id).to_bytes() == data
    with pytest.raises(ProfileDamaged, match="another one"):
        parse(transform_profile(LAYOUT, 1).to_bytes(), PROFILE.profile_id)
    for at in (0, 70, len(data) // 2, len(data) - 1):
        with pytest.raises(ProfileDamaged, match="cannot be read"):
            parse(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], PROFILE.profile_id)
    with pytest.raises(ProfileDamaged, match="cannot be read"):
        parse(data[:-1], PROFILE.profile_id)


def test_a_profile_that_does_not_fit_is_the_callers_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LayerSpec(kv_heads=2, k_dim=16, v_dim=16, kind=codec.LayerKind.STATE)
    state = KVLayout("m", "r", "bfloat16", 16, (layer, layer))
    parted = KVLayout.uniform(
        model="m", revision="r", num_layers=2, kv_heads=2, head_dim=16, partition=Partition(head_groups=2)
    )
    stranger = KVLayout.uniform(model="n", revision="r", num_layers=2, kv_heads=2, head_dim=16)
    require_usable(PROFILE, LAYOUT)
    require_usable(PROFILE, KVLayout.uniform(model="m", revision="r", num_layers=2, kv_heads=2, head_dim=16))
    for layout, problem in ((stranger, "another model"), (parted, "without partition"), (state, "recurrent state")):
        with pytest.raises(InvalidArgument, match=problem):
            require_usable(PROFILE, layout)
    with pytest.raises(InvalidArgument, match=r"Profile\.load"):
        require_usable("profile.kvcp", LAYOUT)  # type: ignore[arg-type]
    monkeypatch.setattr(profiles, "PROFILE_BYTES_MAX", 1 << 10)
    with pytest.raises(InvalidArgument, match="too large"):
        require_usable(PROFILE, LAYOUT)
