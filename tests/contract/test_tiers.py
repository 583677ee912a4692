"""What every tier must do, on each of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import kv_objects as kv
import pytest
from hypothesis import given, settings
from redis_tiers import flush, redis_tier
from tier_objects import LAYOUT, key_of, put, whole

import kvstore_codec as codec
from kvstore.errors import TierFull
from kvstore.index.entry import ObjectKey
from kvstore.tiers.base import Tier
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk_writer import BLOCK_BYTES
from kvstore.tiers.host import HostTier
from kvstore.tiers.redis import RedisTier

MakeTier = Callable[[int], HostTier | DiskTier]
ROOMY = 64 << 20
# The same chunks in several sizes: what a better version does to a worse one.
CHUNKS = {quality: kv.chunks(LAYOUT, 6, seed=1, quality=quality) for quality in ("low", "high", "raw")}
FAST_DISK = "/dev/shm" if Path("/dev/shm").is_dir() else None  # thousands of syncs, and nothing here loses power


@pytest.fixture(params=["host", "disk"])
def make_tier(request: pytest.FixtureRequest, tmp_path: Path, opened: list[DiskTier]) -> MakeTier:
    def make(capacity_bytes: int) -> HostTier | DiskTier:
        if request.param == "host":
            return HostTier(capacity_bytes)
        opened.append(DiskTier(tmp_path / "disk", capacity_bytes))
        return opened[-1]

    return make


@pytest.fixture(params=["host", "disk", "redis_server", "redis_cluster"])
def tier(request: pytest.FixtureRequest, tmp_path: Path, opened: list[DiskTier]) -> Iterator[Tier]:
    """One with room enough, empty."""
    if request.param == "host":
        yield HostTier(ROOMY)
    elif request.param == "disk":
        opened.append(DiskTier(tmp_path / "disk", ROOMY))
        yield opened[-1]
    else:
        server = request.getfixturevalue(request.param)
        flush(server)
        redis = redis_tier(server)
        yield redis
        redis.close()


def assert_takes(tier: Tier, *lengths: int) -> None:
    """The tier holds objects of these lengths, and accounts for them."""
    if isinstance(tier, RedisTier):  # what Redis needs for them is its own business
        assert tier.probe()
        assert tier.used_bytes > sum(lengths)
    else:
        assert tier.used_bytes == sum(tier.cost_bytes(length) for length in lengths)
    assert tier.objects == len(lengths)


# Every tier


def test_what_is_put_reads_back_whole_and_by_prefix(tier: Tier) -> None:
    chunk = CHUNKS["high"][0]
    key = put(tier, chunk)
    assert whole(tier, chunk) == chunk.blob
    for length in (0, 1, *codec.parse_header(chunk.blob).layer_bytes):
        data = tier.read(key, length)
        assert data is not None
        assert bytes(data) == chunk.blob[:length]
    assert tier.read(key, len(chunk.blob) + 1) is None, "no more than the object"
    assert tier.read(key._replace(part=1), 1) is None
    assert tier.read(key._replace(namespace_id=bytes(32)), 1) is None


def test_delete_frees_all_it_took(tier: Tier) -> None:
    key = put(tier, CHUNKS["raw"][0])
    assert tier.delete(key)
    assert_takes(tier)
    assert not tier.delete(key)
    assert whole(tier, CHUNKS["raw"][0]) is None


@pytest.mark.parametrize(("first", "then"), [("low", "raw"), ("raw", "low"), ("high", "high")])
def test_a_replacement_is_all_that_is_left(tier: Tier, first: str, then: str) -> None:
    put(tier, CHUNKS[first][0])
    put(tier, CHUNKS[then][0])
    assert whole(tier, CHUNKS[then][0]) == CHUNKS[then][0].blob
    assert_takes(tier, len(CHUNKS[then][0].blob))


@pytest.mark.parametrize("spare_bytes", [0, -1])
def test_capacity_holds_to_the_byte_and_full_changes_nothing(make_tier: MakeTier, spare_bytes: int) -> None:
    chunks = CHUNKS["raw"][:4]
    tier = make_tier(ROOMY)
    costs = [tier.cost_bytes(len(chunk.blob)) for chunk in chunks]
    tier.capacity_bytes = sum(costs) + spare_bytes
    for chunk in chunks[:3]:
        put(tier, chunk)
    assert tier.used_bytes == sum(costs[:3])
    if spare_bytes < 0:
        with pytest.raises(TierFull) as raised:
            put(tier, chunks[3])
        assert raised.value.context == {"needed": costs[3], "free": costs[3] + spare_bytes}
    else:
        put(tier, chunks[3])
        with pytest.raises(TierFull):
            put(tier, CHUNKS["raw"][4])
    held = chunks[: 3 if spare_bytes < 0 else 4]
    assert [whole(tier, chunk) for chunk in chunks] == [c.blob if c in held else None for c in chunks]
    assert (tier.used_bytes, tier.objects) == (sum(costs[: len(held)]), len(held))


def test_a_replacement_without_room_leaves_the_old_version(make_tier: MakeTier) -> None:
    tier = make_tier(ROOMY)
    worse, better = CHUNKS["low"][0], CHUNKS["raw"][0]
    put(tier, worse)
    used = tier.used_bytes
    tier.capacity_bytes = tier.cost_bytes(len(better.blob)) - 1
    with pytest.raises(TierFull):
        put(tier, better)
    assert whole(tier, worse) == worse.blob
    assert (tier.used_bytes, tier.objects) == (used, 1)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_will_do(tier: Tier, kind: Callable[[bytes], Any]) -> None:
    chunk = CHUNKS["raw"][0]
    tier.put(key_of(chunk), chunk.ref.parent, kind(chunk.blob))
    assert whole(tier, chunk) == chunk.blob


@pytest.mark.parametrize("layer", [0, 1])
def test_truncation_keeps_a_prefix_and_frees_the_rest(tier: Tier, layer: int) -> None:
    chunk, other = CHUNKS["high"][:2]
    key = put(tier, chunk)
    put(tier, other)
    length = codec.parse_header(chunk.blob).layer_bytes[layer]
    assert tier.truncate(key, length)
    data = tier.read(key, length)
    assert data is not None
    assert bytes(data) == chunk.blob[:length]
    assert tier.read(key, length + 1) is None
    assert whole(tier, other) == other.blob
    assert_takes(tier, length, len(other.blob))
    put(tier, chunk)
    assert whole(tier, chunk) == chunk.blob, "and can be put again, whole"
    assert not tier.truncate(key._replace(part=1), length)


operations = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(sorted(CHUNKS)), st.integers(0, 5)),
        st.tuples(st.just("delete"), st.integers(0, 5)),
    ),
    max_size=40,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["host", "disk"])
@given(operations=operations)
@settings(max_examples=40, deadline=None)
def test_any_sequence_against_a_dict(name: str, operations: list[tuple[str, int]]) -> None:
    """Room for about half of the objects; a put is refused exactly where it would go over the capacity."""
    capacity = 3 * BLOCK_BYTES * -(-len(CHUNKS["raw"][0].blob) // BLOCK_BYTES)
    model: dict[ObjectKey, bytes] = {}
    with tempfile.TemporaryDirectory(dir=FAST_DISK) as folder:
        tier = HostTier(capacity) if name == "host" else DiskTier(Path(folder), capacity)
        for what, number in operations:
            if what == "delete":
                key = key_of(CHUNKS["raw"][number])
                assert tier.delete(key) == (model.pop(key, None) is not None)
                continue
            chunk = CHUNKS[what][number]
            # What is replaced goes once the new one stands.
            if tier.used_bytes + tier.cost_bytes(len(chunk.blob)) > capacity:
                with pytest.raises(TierFull):
                    put(tier, chunk)
            else:
                model[put(tier, chunk)] = chunk.blob
            assert tier.used_bytes == sum(tier.cost_bytes(len(blob)) for blob in model.values()) <= capacity
            assert tier.objects == len(model)
            for each in CHUNKS["raw"]:
                blob = model.get(key_of(each))
                assert tier.read(key_of(each), 1 if blob is None else len(blob)) == blob
        if isinstance(tier, DiskTier):
            tier.close()
            tier = DiskTier(Path(folder), capacity)
            assert {stored.key: stored.length for stored in tier.scan()} == {
                key: len(blob) for key, blob in model.items()
            }
            assert tier.used_bytes == sum(tier.cost_bytes(len(blob)) for blob in model.values())
            tier.close()
