"""What only the Redis tier must do: be asked, share, expire; on one server and on a Cluster."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable

import golden_redis
import hypothesis.strategies as st
import kv_objects as kv
import pytest
import redis_process
from hypothesis import HealthCheck, given, settings
from redis_objects import CHUNKS, MakeRedis, Server, gone, home_of, name_of, spoilt
from redis_tiers import Told, flush, redis_tier
from tier_objects import LAYOUT, key_of, put, whole

import kvstore_codec as codec
from kvstore.errors import TierFailed, TierFull
from kvstore.index.entry import ObjectKey
from kvstore.tiers.redis import OBJECT_BYTES_MAX
from kvstore.tiers.redis_format import ENVELOPE_BYTES, Envelope, unseal, wrap


def hashes(chunks: list[kv.StoredChunk]) -> list[bytes]:
    return [chunk.hash for chunk in chunks]


# The format


def test_values_are_the_pinned_ones() -> None:
    pinned = json.loads(golden_redis.PINNED.read_text())
    assert golden_redis.values() == pinned
    for name, (key, parent, data) in golden_redis.CASES.items():
        envelope = bytes.fromhex(pinned[name]["envelope"])
        assert len(envelope) == ENVELOPE_BYTES
        assert unseal(key, envelope, ENVELOPE_BYTES + len(data)) == Envelope(len(data), parent)


def test_a_value_is_an_envelope_and_the_object(server: Server, make: MakeRedis) -> None:
    tier = make(server)
    chunk = CHUNKS["high"][0]
    put(tier, chunk)
    name = name_of(chunk)
    assert name.split(b":") == [b"kvstore", LAYOUT.namespace_id.hex().encode(), chunk.hash.hex().encode(), b"0"]
    assert home_of(server, name).command("GET", name) == wrap(key_of(chunk), chunk.ref.parent, chunk.blob)


# Asking


@pytest.mark.parametrize("stored", [0, 1, 31, 32, 33, 95, 96, 97, 150])
def test_find_gives_the_longest_prefix(server: Server, make: MakeRedis, stored: int) -> None:
    tier = make(server)
    chunks = kv.chunks(LAYOUT, 150, seed=2, quality="low")
    for number, chunk in enumerate(chunks):
        if number != stored:
            put(tier, chunk)
    found = tier.find(LAYOUT.namespace_id, hashes(chunks), 0)
    assert [each.key for each in found] == [key_of(chunk) for chunk in chunks[:stored]]
    assert [each.parent for each in found] == [chunk.ref.parent for chunk in chunks[:stored]]
    headers = [codec.parse_header(chunk.blob) for chunk in chunks[:stored]]
    assert [(each.first_position, each.tokens) for each in found] == [(h.first_position, h.tokens) for h in headers]
    assert [each.layer_bytes for each in found] == [header.layer_bytes for header in headers]
    assert tier.find(LAYOUT.namespace_id, hashes(chunks), 1) == []
    assert tier.find(bytes(32), hashes(chunks), 0) == []
    assert tier.find(LAYOUT.namespace_id, [], 0) == []


def test_what_find_says_of_a_whole_and_of_a_truncated_object(server: Server, make: MakeRedis) -> None:
    tier = make(server)
    chunk = CHUNKS["high"][0]
    header = codec.parse_header(chunk.blob)
    put(tier, chunk)
    for layers in (3, 2, 1):
        tier.truncate(key_of(chunk), header.layer_bytes[layers - 1])
        (found,) = tier.find(LAYOUT.namespace_id, [chunk.hash], 0)
        assert found.layer_bytes == header.layer_bytes[:layers]
        assert found.length == found.layer_bytes[-1]
        assert found.quality == header.quality_at(found.length)
        assert found.provenance == header.provenance


def test_a_long_miss_is_one_short_question(one: redis_process.RedisProcess, make: MakeRedis) -> None:
    tier = make(one)
    one.command("CONFIG", "RESETSTAT")
    rng = random.Random(3)
    assert tier.find(LAYOUT.namespace_id, [rng.randbytes(32) for _ in range(2000)], 0) == []
    statistics = one.command("INFO", "commandstats").decode()
    (calls,) = (line for line in statistics.splitlines() if line.startswith("cmdstat_getrange:"))
    assert int(calls.split("calls=")[1].split(",")[0]) == 32


def test_read_many_answers_each_in_its_place(server: Server, make: MakeRedis) -> None:
    tier = make(server)
    chunks = kv.chunks(LAYOUT, 60, seed=4, quality="high")
    for chunk in chunks[::2]:
        put(tier, chunk)
    low = [codec.parse_header(chunk.blob).layer_bytes[0] for chunk in chunks]
    read = tier.read_many([(key_of(chunk), length) for chunk, length in zip(chunks, low, strict=True)])
    assert [None if data is None else bytes(data) for data in read] == [
        chunk.blob[:length] if number % 2 == 0 else None
        for number, (chunk, length) in enumerate(zip(chunks, low, strict=True))
    ]
    assert tier.read_many([]) == []


def test_only_the_bytes_asked_for_travel(one: redis_process.RedisProcess, make: MakeRedis) -> None:
    tier = make(one)
    key = ObjectKey(LAYOUT.namespace_id, bytes(32), 0)
    tier.put(key, bytes(32), bytes(1 << 20))

    def sent() -> int:
        statistics = one.command("INFO", "stats").decode()
        return int(statistics.split("total_net_output_bytes:")[1].split()[0])

    before = sent()
    data = tier.read(key, 1000)
    assert data is not None
    assert bytes(data) == bytes(1000)
    assert sent() - before < 10_000


# Time to live


def ttl_s(server: Server, name: bytes) -> int:
    found: int = home_of(server, name).command("TTL", name)
    return found


def test_a_use_prolongs_the_time_to_live_and_a_question_does_not(server: Server, make: MakeRedis) -> None:
    tier = make(server, ttl_s=1000)
    chunk = CHUNKS["high"][0]
    key, name = put(tier, chunk), name_of(chunk)
    assert 990 < ttl_s(server, name) <= 1000
    home_of(server, name).command("EXPIRE", name, 50)
    tier.find(LAYOUT.namespace_id, [chunk.hash], 0)
    tier.truncate(key, codec.parse_header(chunk.blob).layer_bytes[0])
    assert 40 < ttl_s(server, name) <= 50
    tier.read(key, 10)
    assert 990 < ttl_s(server, name) <= 1000
    assert tier.read(key_of(CHUNKS["raw"][1]), 10) is None
    assert home_of(server, name_of(CHUNKS["raw"][1])).command("EXISTS", name_of(CHUNKS["raw"][1])) == 0


def test_what_has_expired_is_a_miss(server: Server, make: MakeRedis, told: Told) -> None:
    tier = make(server, ttl_s=1000)
    put(tier, CHUNKS["low"][0])
    name = name_of(CHUNKS["low"][0])
    home_of(server, name).command("PEXPIREAT", name, 1)
    assert whole(tier, CHUNKS["low"][0]) is None
    assert tier.find(LAYOUT.namespace_id, hashes(CHUNKS["low"]), 0) == []
    assert not told.failures
    assert not told.damages


def test_without_a_time_to_live_there_is_none(server: Server, make: MakeRedis) -> None:
    tier = make(server, ttl_s=0)
    put(tier, CHUNKS["low"][0])
    assert whole(tier, CHUNKS["low"][0]) == CHUNKS["low"][0].blob
    assert ttl_s(server, name_of(CHUNKS["low"][0])) == -1


# Sharing


def test_a_tier_that_only_reads_changes_nothing(server: Server, make: MakeRedis) -> None:
    writer, reader = make(server), make(server, ttl_s=100, read_only=True)
    chunk, bad = CHUNKS["low"][:2]
    key = put(writer, chunk)
    spoilt(server, bad, b"garbage")
    assert whole(reader, chunk) == chunk.blob
    assert ttl_s(server, name_of(chunk)) == -1
    assert reader.read(key_of(bad), 1) is None
    assert not gone(server, bad)
    changes: list[Callable[[], object]] = [
        lambda: put(reader, chunk), lambda: reader.delete(key), lambda: reader.purge(key.namespace_id),
        lambda: reader.truncate(key, 1),
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(TierFailed, match="redis_write"):
            change()
    assert whole(writer, chunk) == chunk.blob


def test_two_prefixes_share_nothing(server: Server, make: MakeRedis) -> None:
    ours, theirs = make(server, prefix="ours"), make(server, prefix="theirs")
    put(ours, CHUNKS["low"][0])
    assert whole(theirs, CHUNKS["low"][0]) is None
    assert theirs.purge(LAYOUT.namespace_id) == 0
    assert whole(ours, CHUNKS["low"][0]) == CHUNKS["low"][0].blob


@pytest.mark.slow
def test_purge_takes_one_namespace_and_nothing_else(server: Server, make: MakeRedis) -> None:
    tier = make(server)
    rng = random.Random(6)
    doomed, kept = ([ObjectKey(name, rng.randbytes(32), 0) for _ in range(1500)] for name in (b"d" * 32, b"k" * 32))
    for key in doomed + kept:
        tier.put(key, bytes(32), b"x")
    home_of(server, b"others").command("SET", b"others", b"x")
    assert tier.purge(b"d" * 32) == len(doomed)
    assert tier.purge(b"d" * 32) == 0
    assert tier.probe()
    assert tier.objects == len(kept) + 1


def test_delete_many_counts_what_was_there(server: Server, make: MakeRedis) -> None:
    tier = make(server)
    keys = [put(tier, chunk) for chunk in CHUNKS["low"][:4]]
    assert tier.delete_many([*keys, key_of(CHUNKS["low"][5])]) == 4
    assert tier.delete_many([]) == 0
    assert [whole(tier, chunk) for chunk in CHUNKS["low"]] == [None] * 6


def test_the_largest_object_and_one_byte_more(server: Server, make: MakeRedis) -> None:
    tier = make(server, timeout_s=2.0)
    key = ObjectKey(LAYOUT.namespace_id, bytes(32), 0)
    largest = random.Random(7).randbytes(OBJECT_BYTES_MAX)
    tier.put(key, bytes(32), largest)
    with pytest.raises(TierFull):
        tier.put(key, bytes(32), largest + b"x")
    data = tier.read(key, len(largest))
    assert data is not None
    assert bytes(data) == largest


def test_room_is_what_redis_says(server: Server, make: MakeRedis) -> None:
    tier = make(server)
    servers = server.masters if isinstance(server, redis_process.RedisCluster) else [server]
    assert (tier.used_bytes, tier.capacity_bytes, tier.objects) == (0, 0, 0), "nothing was asked yet"
    for each in servers:
        each.command("CONFIG", "SET", "maxmemory", 100 << 20)
    put(tier, CHUNKS["raw"][0])
    assert tier.probe()
    assert tier.capacity_bytes == len(servers) * (100 << 20)
    assert tier.used_bytes > len(servers) * 500_000
    assert tier.objects == 1
    for each in servers:
        each.command("CONFIG", "SET", "maxmemory", 0)


def test_readers_see_whole_versions_while_writers_replace_them(server: Server, make: MakeRedis) -> None:
    """Every thread's reads are of one version, whole; nothing is taken for damaged."""
    told = Told()
    tier = redis_tier(server, told, timeout_s=5.0)
    versions = {len(CHUNKS[quality][0].blob): CHUNKS[quality][0] for quality in CHUNKS}
    assert len(versions) == 3
    key = put(tier, CHUNKS["raw"][0])
    stop = threading.Event()
    wrong: list[object] = []

    def write(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            put(tier, rng.choice(list(versions.values())))

    def read() -> None:
        for _ in range(300):
            for found in tier.find(LAYOUT.namespace_id, [key.chunk_hash], 0):
                data = tier.read(key, found.length)
                if data is not None and bytes(data) not in [c.blob[: found.length] for c in versions.values()]:
                    wrong.append(found)

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(2)]
    readers = [threading.Thread(target=read) for _ in range(4)]
    for thread in writers + readers:
        thread.start()
    for thread in readers:
        thread.join()
    stop.set()
    for thread in writers:
        thread.join()
    assert not wrong
    assert not told.failures
    tier.close()


operations = st.lists(
    st.tuples(st.sampled_from(["low", "high", "raw", "delete", "truncate", "damage"]), st.integers(0, 5)), max_size=30
)


@pytest.mark.slow
@given(operations=operations)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence_against_a_dict(server: Server, operations: list[tuple[str, int]]) -> None:
    flush(server)
    tier = redis_tier(server, timeout_s=5.0)
    model: dict[int, bytes] = {}
    for what, number in operations:
        chunk = CHUNKS["raw"][number]
        if what == "delete":
            assert tier.delete(key_of(chunk)) == (model.pop(number, None) is not None)
        elif what == "truncate":
            held = model.get(number, b"")
            length = codec.parse_header(held).layer_bytes[0] if held else 1
            assert tier.truncate(key_of(chunk), length) == bool(held)
            if held:
                model[number] = held[:length]
        elif what == "damage":
            spoilt(server, chunk, b"KVCREDIS\1" + bytes(100))
            model.pop(number, None)
        else:
            put(tier, CHUNKS[what][number])
            model[number] = CHUNKS[what][number].blob
        prefix = next((n for n in range(6) if n not in model), 6)
        found = tier.find(LAYOUT.namespace_id, hashes(CHUNKS["raw"]), 0)
        assert [each.length for each in found] == [len(model[n]) for n in range(prefix)]
        wanted = [(key_of(CHUNKS["raw"][n]), len(model.get(n, b"x"))) for n in range(6)]
        read = tier.read_many(wanted)
        assert [None if data is None else bytes(data) for data in read] == [model.get(n) for n in range(6)]
    tier.close()
