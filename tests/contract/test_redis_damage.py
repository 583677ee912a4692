"""Values in Redis that strangers, or other nodes meanwhile, have changed: a miss, and put right where it can be."""

from __future__ import annotations

import random

import pytest
import redis_process
from redis_objects import CHUNKS, MakeRedis, Server, gone, home_of, name_of, spoilt
from redis_tiers import Told, redis_tier
from tier_objects import LAYOUT, key_of, put, whole

import kvstore.tiers.redis
import kvstore_codec as codec
from kvstore.index.entry import ObjectKey
from kvstore.tiers import redis_format
from kvstore.tiers.redis_format import ENVELOPE_BYTES, Envelope, wrap

VERSION_BYTES = (8, 9)  # of an envelope


@pytest.mark.slow
@pytest.mark.parametrize("ask", ["read", "find"])
def test_garbage_and_cut_values_of_every_length_are_misses_and_go(
    one: redis_process.RedisProcess, make: MakeRedis, told: Told, ask: str
) -> None:
    tier = make(one)
    chunk = CHUNKS["low"][0]
    value = wrap(key_of(chunk), chunk.ref.parent, chunk.blob)
    rng = random.Random(5)
    for length in range(len(value)):
        for bad in (value[:length], rng.randbytes(length), value[:ENVELOPE_BYTES] + rng.randbytes(length)):
            if len(bad) == len(value) or not bad:
                continue  # of the right length: damage inside the object, which its own checksums find
            spoilt(one, chunk, bad)
            if ask == "read":
                assert tier.read(key_of(chunk), min(length, 100)) is None, length
            else:
                assert tier.find(LAYOUT.namespace_id, [chunk.hash], 0) == [], length
            assert gone(one, chunk), length
    assert set(told.damages) == {"foreign", "truncated"}
    put(tier, chunk)
    assert whole(tier, chunk) == chunk.blob


@pytest.mark.slow
def test_every_flipped_bit_of_an_envelope_is_a_miss(
    one: redis_process.RedisProcess, make: MakeRedis, told: Told
) -> None:
    tier = make(one)
    chunk = CHUNKS["low"][0]
    value = wrap(key_of(chunk), chunk.ref.parent, chunk.blob)
    for bit in range(8 * ENVELOPE_BYTES):
        bad = bytearray(value)
        bad[bit // 8] ^= 1 << bit % 8
        spoilt(one, chunk, bytes(bad))
        assert whole(tier, chunk) is None
        assert gone(one, chunk) == (bit // 8 not in VERSION_BYTES), "another version's value is left alone"
    assert told.damages == {"foreign": 64, "version": 16, "checksum": 432}


@pytest.mark.slow
def test_every_flipped_bit_of_an_object_header_is_found_by_find(
    one: redis_process.RedisProcess, make: MakeRedis, told: Told
) -> None:
    tier = make(one)
    chunk = CHUNKS["low"][0]
    value = wrap(key_of(chunk), chunk.ref.parent, chunk.blob)
    for bit in range(8 * codec.HEADER_BYTES):
        bad = bytearray(value)
        bad[ENVELOPE_BYTES + bit // 8] ^= 1 << bit % 8
        spoilt(one, chunk, bytes(bad))
        assert tier.find(LAYOUT.namespace_id, [chunk.hash], 0) == []
    assert told.damages["header"] + told.damages["version"] == 8 * codec.HEADER_BYTES
    assert told.damages["header"] > 7 * codec.HEADER_BYTES


def test_an_object_copied_to_another_key_is_a_miss(server: Server, make: MakeRedis, told: Told) -> None:
    tier = make(server)
    good, other = CHUNKS["low"][:2]
    spoilt(server, other, wrap(key_of(good), good.ref.parent, good.blob))
    assert tier.read(key_of(other), 1) is None
    assert gone(server, other)
    spoilt(server, other, wrap(key_of(other), good.ref.parent, good.blob))
    assert tier.find(LAYOUT.namespace_id, [other.hash], 0) == []
    assert gone(server, other)
    assert told.damages == {"checksum": 1, "header": 1}


@pytest.mark.parametrize("ask", ["read", "find", "truncate"])
def test_a_key_that_holds_no_string_is_a_miss_and_goes(server: Server, make: MakeRedis, told: Told, ask: str) -> None:
    tier = make(server, ttl_s=100)
    chunk = CHUNKS["low"][0]
    home_of(server, name_of(chunk)).command("RPUSH", name_of(chunk), "x")
    if ask == "read":
        assert tier.read(key_of(chunk), 1) is None
    elif ask == "find":
        assert tier.find(LAYOUT.namespace_id, [chunk.hash], 0) == []
    else:
        assert not tier.truncate(key_of(chunk), 1)
    assert gone(server, chunk)
    assert told.damages == {"type": 1}


def test_an_object_of_a_later_format_is_left_alone(server: Server, make: MakeRedis, told: Told) -> None:
    tier = make(server)
    chunk = CHUNKS["low"][0]
    later = bytearray(chunk.blob)
    later[4] += 1  # the object format's version
    spoilt(server, chunk, wrap(key_of(chunk), chunk.ref.parent, later))
    assert tier.find(LAYOUT.namespace_id, [chunk.hash], 0) == []
    assert not gone(server, chunk)
    assert told.damages == {"version": 1}


def test_what_another_node_puts_right_meanwhile_stays(server: Server, make: MakeRedis) -> None:
    """The damaged value is deleted only if it is still there."""
    good = make(server)
    chunk = CHUNKS["low"][0]

    class Meanwhile(Told):
        def damaged(self, reason: str) -> None:
            super().damaged(reason)
            put(good, chunk)

    told = Meanwhile()
    tier = redis_tier(server, told)
    spoilt(server, chunk, b"garbage")
    assert tier.read(key_of(chunk), 1) is None
    assert told.damages == {"foreign": 1}
    assert whole(tier, chunk) == chunk.blob
    tier.close()


def test_a_truncation_does_not_touch_what_another_node_put_meanwhile(
    server: Server, make: MakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = make(server)
    worse, better = CHUNKS["high"][0], CHUNKS["raw"][0]
    put(tier, worse)
    real = redis_format.seal

    def meanwhile(key: ObjectKey, envelope: Envelope) -> bytes:
        put(tier, better)
        return real(key, envelope)

    monkeypatch.setattr(kvstore.tiers.redis, "seal", meanwhile)
    assert not tier.truncate(key_of(worse), codec.parse_header(worse.blob).layer_bytes[0])
    assert whole(tier, better) == better.blob
