"""Profiles that are gone from the node, or stored wrong: a miss, until somebody puts them again."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import kv_objects
import numpy as np
import pytest
import xxhash
from kv_strategies import bits, random_kv
from node_process import NodeProcess
from profile_callers import CHUNK, Caller, expected, logged, names, prompt, refs_of
from small_profiles import transform_profile

import kvstore_codec as codec
from kvstore_client import (
    BadObject,
    KvClientError,
    KVLayout,
    Partition,
    Profile,
    ProfileDamaged,
    ProfileMissing,
    profile_shelf,
)
from kvstore_client.profiles import PROFILE_LAYOUT, as_kv, pack, profile_refs
from kvstore_codec import Quality
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.admin_pb2 import EvictRequest

StartNode = Callable[..., NodeProcess]


def evict(node: NodeProcess, profile: Profile) -> None:
    hashes = [ref.hash for ref in refs_of(profile)]
    evicted = node.admin.Evict(EvictRequest(chunk_hashes=b"".join(hashes)))
    assert evicted.objects == len(hashes)


# Profiles that are gone


def test_an_evicted_profile_is_a_miss_and_the_next_put_stores_it_again(
    shared: NodeProcess, caller: Callable[..., Caller], layout: KVLayout, profile: Profile,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(profile_shelf, "BELIEVED_S", 0.0)
    tokens, kv = prompt(layout, 3)
    cache = caller(shared.address, strict=True).client.namespace(layout, profile=profile)
    cache.put(tokens, kv)
    evict(shared, profile)
    lenient, strict = caller(shared.address), caller(shared.address, strict=True)
    for _ in range(2):
        got, n = lenient.client.namespace(layout).get(tokens)
        assert (n, got.shape[2]) == (0, 0)
    assert lenient.counted("misses", reason="profile_missing") == 2
    assert lenient.counted("failures", call="get", reason="profile_missing") == 2
    assert [line.split(": ")[:2] for line in logged(caplog)] == [["get", "profile_missing"]]
    with pytest.raises(ProfileMissing, match=profile.profile_id.hex()) as raised:
        strict.client.namespace(layout).get(tokens)
    assert isinstance(raised.value, BadObject)
    assert bits(cache.get(tokens)[0]) == expected(layout, kv, "high", profile), "who holds it reads on"
    again = cache.put(tokens, kv)
    assert (again.stored, again.have) == (0, 3)
    for reader in (lenient, strict):
        got, n = reader.client.namespace(layout).get(tokens)
        assert (n, bits(got)) == (3 * CHUNK, expected(layout, kv, "high", profile))


def test_the_prefix_before_a_lost_profile_is_served(
    shared: NodeProcess, caller: Callable[..., Caller], layout: KVLayout, profile: Profile
) -> None:
    tokens, kv = prompt(layout, 4)
    caller(shared.address, strict=True).client.namespace(layout).put(tokens[: 2 * CHUNK], kv[:, :, : 2 * CHUNK])
    caller(shared.address, strict=True).client.namespace(layout, profile=profile).put(tokens, kv)
    evict(shared, profile)
    reader = caller(shared.address)
    got, n = reader.client.namespace(layout).get(tokens)
    assert (n, bits(got)) == (2 * CHUNK, expected(layout, kv[:, :, : 2 * CHUNK], "high", None))
    assert reader.counted("misses", reason="profile_missing") == 1


def test_who_missed_for_want_of_a_profile_may_put_what_it_computed(
    shared: NodeProcess, caller: Callable[..., Caller], layout: KVLayout, profile: Profile
) -> None:
    """Objects of a profile that nobody has any more would otherwise be held, and unreadable, for ever."""
    tokens, kv = prompt(layout, 4)
    caller(shared.address, strict=True).client.namespace(layout).put(tokens[:CHUNK], kv[:, :, :CHUNK])
    caller(shared.address, strict=True).client.namespace(layout, profile=profile).put(tokens, kv)
    evict(shared, profile)
    cache = caller(shared.address).client.namespace(layout)
    assert cache.put(tokens, kv).have == 4, "it has not noticed yet"
    _, n = cache.get(tokens)
    assert n == CHUNK
    result = cache.put(tokens, kv[:, :, n:], first_token=n)
    assert (result.stored, result.have, result.tokens) == (3, 0, 4 * CHUNK)
    got, n = caller(shared.address, strict=True).client.namespace(layout).get(tokens)
    assert (n, bits(got)) == (4 * CHUNK, expected(layout, kv, "high", None))
    assert cache.put(tokens, kv).have == 4


def test_a_profile_in_use_outlives_what_is_not(
    start_node: StartNode, caller: Callable[..., Caller], layout: KVLayout, profile: Profile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(profile_shelf, "BELIEVED_S", 0.0)
    node = start_node("--host-capacity", "2MiB")
    tokens, kv = prompt(layout, 2)
    reader = caller(node.address, strict=True).client.namespace(layout, profile=profile)
    reader.put(tokens, kv)  # and so it takes no lease to load it, which would hold it as well
    filler = kv_objects.small_layout(next(names), layers=16, head_dim=64)  # 128 KiB a chunk
    for seed in range(24):
        kv_objects.put(node.store, filler, kv_objects.chunks(filler, 1, seed))
        assert reader.get(tokens)[1] == 2 * CHUNK  # uses the profile as well as the objects
    found = [len(kv_objects.lookup(node.store, filler, [kv_objects.chunks(filler, 1, s)[0].hash])) for s in range(24)]
    assert 0 < sum(found) < 24, "there was pressure"
    assert caller(node.address, strict=True).client.namespace(layout).get(tokens)[1] == 2 * CHUNK


# Profiles that are wrong


def put_rows(node: NodeProcess, profile_id: bytes, rows: Any) -> None:
    """Stores rows under the address of a profile, by the raw protocol."""
    made = []
    for ref in profile_refs(profile_id, len(rows) // PROFILE_LAYOUT.chunk_tokens, codec.DEFAULT_TENANT_KEY):
        some = as_kv(rows[ref.first_token : ref.first_token + ref.tokens])
        blob = codec.encode(some, PROFILE_LAYOUT, quality="raw", first_position=ref.first_token, chunk_hash=ref.hash)
        made.append(kv_objects.StoredChunk(ref, blob, Quality.RAW))
    outcomes = kv_objects.put(node.store, PROFILE_LAYOUT, made)
    assert [result.outcome for result in outcomes] == [pb.OUTCOME_STORED] * len(made)


def with_length(rows: Any, length: int) -> Any:
    rows[0, :8] = np.frombuffer(struct.pack("<Q", length), np.uint8)
    return rows


def wrong_rows() -> Iterator[tuple[str, type[KvClientError], Callable[[bytes, Profile], Any]]]:
    yield "another profile", ProfileDamaged, lambda data, other: pack(other.to_bytes())
    yield "a flipped bit", ProfileDamaged, lambda data, other: pack(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    yield "cut short", ProfileDamaged, lambda data, other: pack(data[:-8])
    yield "garbage", ProfileDamaged, lambda data, other: pack(np.random.default_rng(0).bytes(len(data)))
    yield "zeros", ProfileDamaged, lambda data, other: np.zeros_like(pack(data))
    yield "a huge length", ProfileDamaged, lambda data, other: with_length(pack(data), 2**64 - 1)
    yield "more than there is", ProfileMissing, lambda data, other: with_length(pack(data), 1 << 30)


@pytest.mark.parametrize(("what", "kind", "rows"), [pytest.param(*case, id=case[0]) for case in wrong_rows()])
def test_a_wrong_profile_is_a_miss(
    shared: NodeProcess, caller: Callable[..., Caller], layout: KVLayout, caplog: pytest.LogCaptureFixture,
    what: str, kind: type[KvClientError], rows: Callable[[bytes, Profile], Any],
) -> None:  # fmt: skip
    profile = transform_profile(layout)
    put_rows(shared, profile.profile_id, rows(profile.to_bytes(), transform_profile(layout, 1)))
    tokens, kv = prompt(layout, 2)
    blobs = [
        kv_objects.StoredChunk(
            ref,
            codec.encode(
                codec.token_slice(kv, ref.first_token, ref.first_token + CHUNK), layout, quality="high",
                first_position=ref.first_token, chunk_hash=ref.hash, profile=profile,
            ),
            Quality.HIGH,
        )
        for ref in codec.chunk_refs(layout, tokens)
    ]  # fmt: skip
    kv_objects.put(shared.store, layout, blobs)
    lenient, strict = caller(shared.address), caller(shared.address, strict=True)
    for _ in range(2):
        assert lenient.client.namespace(layout).get(tokens)[1] == 0
    assert lenient.counted("misses", reason=kind.code.value) == 2
    assert [line.split(": ")[:2] for line in logged(caplog)] == [["get", kind.code.value]]
    with pytest.raises(kind) as raised:
        strict.client.namespace(layout).get(tokens)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("parted", [False, True])
def test_an_object_that_names_a_profile_of_another_model(
    shared: NodeProcess, caller: Callable[..., Caller], parted: bool
) -> None:
    """Or whose layout allows none: also to a client that holds that profile."""
    layout = KVLayout.uniform(
        model=next(names), revision="r", num_layers=3, kv_heads=2, head_dim=16, dtype="bfloat16", chunk_tokens=CHUNK,
        partition=Partition(layer_groups=3) if parted else None,
    )  # fmt: skip
    other = kv_objects.small_layout(next(names))
    stranger = transform_profile(other)
    tokens, _ = prompt(layout, 1)
    kv = random_kv(layout.part_layout(0), CHUNK, 1)
    (ref,) = codec.chunk_refs(layout, tokens)
    blob = bytearray(codec.encode(kv, layout, quality="high", chunk_hash=ref.hash))
    blob[88], blob[96:128] = int(codec.CodecId.PROFILE), stranger.profile_id  # codec/FORMAT.md
    blob[-8 - len(blob) + codec.HEADER_BYTES : codec.HEADER_BYTES] = struct.pack(
        "<Q", xxhash.xxh3_64_intdigest(bytes(blob[: codec.HEADER_BYTES - 8]))
    )
    assert codec.parse_header(blob).profile_id == stranger.profile_id
    stored = kv_objects.put(shared.store, layout, [kv_objects.StoredChunk(ref, bytes(blob), Quality.HIGH)])
    assert stored[0].outcome == pb.OUTCOME_STORED
    lenient, strict = caller(shared.address), caller(shared.address, strict=True)
    lenient.client.namespace(other, profile=stranger).store_profile(stranger)
    for _ in range(2):
        assert lenient.client.namespace(layout).get(tokens)[1] == 0
    assert lenient.counted("misses", reason="profile_damaged") == 2
    with pytest.raises(ProfileDamaged):
        strict.client.namespace(layout).get(tokens)
