"""Profiles through real nodes: a reader needs no configuration, and whatever is wrong with a profile is a miss."""

from __future__ import annotations

import asyncio
import itertools
import logging
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kv_objects
import numpy as np
import pytest
import xxhash
from hostile_server import (
    Answer,
    Context,
    HostileServer,
    hang,
    holds_nothing,
    receive_data,
    results,
    takes_all,
    verdicts,
)
from kv_strategies import bits, random_kv
from node_process import NodeProcess
from polling import wait_until
from prometheus_client import CollectorRegistry
from small_profiles import transform_profile

import kvstore_codec as codec
from kvstore_client import (
    AsyncClient,
    BadObject,
    Client,
    DeadlineExceeded,
    InvalidArgument,
    KvClientError,
    KVLayout,
    Namespace,
    Partition,
    Profile,
    ProfileDamaged,
    ProfileMissing,
    RequestRefused,
    Unavailable,
    profile_shelf,
)
from kvstore_client.profiles import PROFILE_LAYOUT, as_kv, chunks_of, pack, profile_refs
from kvstore_client.transports.bulk_path import Transport
from kvstore_codec import Quality
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.admin_pb2 import EvictRequest
from kvstore_proto.v1.framing import Framed

StartNode = Callable[..., NodeProcess]
CHUNK = 16
DEADLINE_S = 20.0  # of calls that are not about time
names = (f"profile-test-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """One node for the tests that keep to a namespace, and profiles, of their own."""
    folder = tmp_path_factory.mktemp("shared")
    node = NodeProcess(folder, "--host-capacity", "256MiB", "--disk-path", str(folder / "disk"))
    try:
        yield node
    finally:
        node.kill()


@pytest.fixture
def layout() -> KVLayout:
    """Its own namespace, and so its own profile, a test."""
    return KVLayout.uniform(
        model=next(names), revision="r", num_layers=3, kv_heads=2, head_dim=16, dtype="bfloat16", chunk_tokens=CHUNK,
        rope=codec.RoPE(theta=10000.0),
    )  # fmt: skip


@pytest.fixture
def profile(layout: KVLayout) -> Profile:
    return transform_profile(layout)


class Caller:
    """A client with its own metrics, as another process has."""

    def __init__(self, target: Any, *, strict: bool = False, deadline: float = DEADLINE_S) -> None:
        self.registry = CollectorRegistry()
        self.client = Client(target, strict=strict, deadline=deadline, registry=self.registry)

    def counted(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"kvstore_client_{name}_total", labels) or 0.0

    def events(self, event: str) -> float:
        return self.counted("profiles", event=event)


@pytest.fixture
def caller() -> Iterator[Callable[..., Caller]]:
    callers: list[Caller] = []

    def make(target: Any, **options: Any) -> Caller:
        callers.append(Caller(target, **options))
        return callers[-1]

    yield make
    for each in callers:
        each.client.close()


def prompt(layout: KVLayout, chunks: int, seed: int = 1) -> tuple[list[int], Any]:
    return [seed * 10_000 + position for position in range(chunks * CHUNK)], random_kv(layout, chunks * CHUNK, seed)


def expected(layout: KVLayout, kv: Any, quality: str, profile: Profile | None, read: str | None = None) -> bytes:
    """The bits that `codec.decode` gives for each chunk by itself."""
    out = codec.empty(layout, codec.token_count(kv, layout))
    for first in range(0, codec.token_count(kv, layout), CHUNK):
        some = codec.token_slice(kv, first, first + CHUNK)
        blob = codec.encode(some, layout, quality=quality, first_position=first, profile=profile)
        place = codec.token_slice(out, first, first + CHUNK)
        codec.decode(blob, layout, quality=read, out=place, profile=profile)
    return bits(out)


def refs_of(profile: Profile) -> list[codec.ChunkRef]:
    return profile_refs(profile.profile_id, chunks_of(len(profile.to_bytes())), codec.DEFAULT_TENANT_KEY)


def evict(node: NodeProcess, profile: Profile) -> None:
    hashes = [ref.hash for ref in refs_of(profile)]
    evicted = node.admin.Evict(EvictRequest(chunk_hashes=b"".join(hashes)))
    assert evicted.objects == len(hashes)


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "kvstore_client"]


# What is put with a profile comes back


@pytest.mark.parametrize("quality", ["low", "medium", "high"])
def test_a_reader_needs_no_configuration(
    shared: NodeProcess, caller: Callable[..., Caller], layout: KVLayout, profile: Profile, quality: str
) -> None:
    writer, reader = caller(shared.address, strict=True), caller(shared.address, strict=True)
    tokens, kv = prompt(layout, 3)
    cache = writer.client.namespace(layout, profile=profile)
    stored = cache.put(tokens, kv, quality=quality)
    assert (stored.stored, stored.tokens) == (3, 3 * CHUNK)
    for _ in range(2):
        got, n = reader.client.namespace(layout).get(tokens)
        assert (n, bits(got)) == (3 * CHUNK, expected(layout, kv, quality, profile))
    assert bits(reader.client.namespace(layout).get(tokens, quality="low")[0]) == expected(
        layout, kv, quality, profile, "low"
    )
    assert (writer.events("stored"), writer.events("loaded"), reader.events("loaded")) == (1, 0, 1)
    assert bits(cache.get(tokens)[0]) == bits(got)
    assert writer.events("loaded") == 0, "it has it"


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_a_get_over_the_bulk_path_loads_the_profile_it_needs(
    shared: NodeProcess, layout: KVLayout, profile: Profile, transport: Transport
) -> None:
    tokens, kv = prompt(layout, 6, seed=7)

    def client() -> Client:
        return Client(
            shared.address, strict=True, deadline=DEADLINE_S, transport=transport, registry=CollectorRegistry()
        )

    with client() as writer:
        writer.namespace(layout, profile=profile).put(tokens, kv, quality="high")
    with client() as reader:
        got, count = reader.namespace(layout).get(tokens)
    assert count == len(tokens)
    assert bits(got) == expected(layout, kv, "high", profile)


def test_a_profile_of_several_chunks(shared: NodeProcess, caller: Callable[..., Caller]) -> None:
    wide = KVLayout.uniform(model=next(names), revision="r", num_layers=2, kv_heads=4, head_dim=32, chunk_tokens=CHUNK)
    profile = transform_profile(wide)
    assert chunks_of(len(profile.to_bytes())) == 5
    tokens, kv = prompt(wide, 2)
    writer, reader = caller(shared.address, strict=True), caller(shared.address, strict=True)
    sent = writer.client.namespace(wide, profile=profile).put(tokens, kv).bytes
    assert writer.counted("stream_bytes", direction="out") > sent + len(profile.to_bytes())
    got, n = reader.client.namespace(wide).get(tokens)
    assert (n, bits(got)) == (2 * CHUNK, expected(wide, kv, "high", profile))
    again = caller(shared.address, strict=True)
    other, other_kv = prompt(wide, 1, seed=2)
    result = again.client.namespace(wide, profile=profile).put(other, other_kv)
    assert again.counted("stream_bytes", direction="out") == result.bytes, "the node had the profile"


@pytest.mark.parametrize("quality", ["raw", "lossless"])
def test_exact_qualities_have_no_use_for_a_profile(
    shared: NodeProcess, caller: Callable[..., Caller], layout: KVLayout, profile: Profile, quality: str
) -> None:
    tokens, kv = prompt(layout, 2)
    writer = caller(shared.address, strict=True)
    cache = writer.client.namespace(layout, profile=profile)
    cache.put(tokens, kv, quality=quality)
    assert bits(cache.get(tokens, min_quality="lossless")[0]) == bits(kv)
    assert writer.events("stored") == 0
    assert kv_objects.lookup(shared.store, PROFILE_LAYOUT, [refs_of(profile)[0].hash]) == []


async def test_the_asynchronous_client(shared: NodeProcess, layout: KVLayout, profile: Profile) -> None:
    prompts = [prompt(layout, 2, seed) for seed in range(5)]
    async with AsyncClient(shared.address, strict=True, deadline=DEADLINE_S, registry=CollectorRegistry()) as client:
        cache = client.namespace(layout, profile=profile)
        await asyncio.gather(*(cache.put(tokens, kv) for tokens, kv in prompts))
    registry = CollectorRegistry()
    async with AsyncClient(shared.address, strict=True, deadline=DEADLINE_S, registry=registry) as client:
        reader = client.namespace(layout)
        for (got, _), (_, kv) in zip(
            await asyncio.gather(*(reader.get(tokens) for tokens, _ in prompts)), prompts, strict=True
        ):
            assert bits(got) == expected(layout, kv, "high", profile)
        loaded = await reader.load_profile(profile.profile_id)
    assert loaded is not None
    assert loaded.to_bytes() == profile.to_bytes()
    assert registry.get_sample_value("kvstore_client_profiles_total", {"event": "loaded"}) == 1


def test_chunks_of_several_profiles_and_of_none_in_one_prompt(
    shared: NodeProcess, caller: Callable[..., Caller], layout: KVLayout
) -> None:
    profiles = [None, transform_profile(layout, 1), transform_profile(layout, 2), None]
    tokens, kv = prompt(layout, len(profiles))
    for index, each in enumerate(profiles):
        end = (index + 1) * CHUNK
        namespace = caller(shared.address, strict=True).client.namespace(layout, profile=each)
        assert namespace.put(tokens[:end], kv[:, :, :end]).stored == 1
    reader = caller(shared.address, strict=True)
    got, n = reader.client.namespace(layout).get(tokens)
    assert n == len(tokens)
    for index, each in enumerate(profiles):
        some = slice(index * CHUNK, (index + 1) * CHUNK)
        blob = codec.encode(kv[:, :, some], layout, quality="high", first_position=some.start, profile=each)
        assert bits(got[:, :, some]) == bits(codec.decode(blob, layout, profile=each))
    assert reader.events("loaded") == 2


def test_a_durable_put_makes_its_profile_durable(
    start_node: StartNode, tmp_path: Path, caller: Callable[..., Caller], layout: KVLayout, profile: Profile
) -> None:
    flags = ("--host-capacity", "64MiB", "--disk-path", str(tmp_path / "disk"), "--disk-capacity", "256MiB")
    node = start_node(*flags)
    tokens, kv = prompt(layout, 3)
    cache = caller(node.address, strict=True).client.namespace(layout, profile=profile)
    cache.put(tokens[:CHUNK], kv[:, :, :CHUNK])  # the profile is in memory only
    result = cache.put(tokens, kv, durable=True)
    assert (result.stored, result.have, result.durable) == (2, 1, True)
    node.kill()
    start_node(*flags, listen=node.address)
    got, n = caller(node.address, strict=True).client.namespace(layout).get(tokens)
    assert (n, bits(got)) == (3 * CHUNK, expected(layout, kv, "high", profile))


def test_a_durable_put_says_so_of_its_profile(
    caller: Callable[..., Caller], layout: KVLayout, profile: Profile
) -> None:
    """And is not durable where the profile is not: the objects would be of no use without it."""
    offers: list[tuple[bool, int]] = []

    def put(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
        offer = next(requests).head.offer
        is_profile = offer.namespace_id == PROFILE_LAYOUT.namespace_id
        offers.append((is_profile, offer.durability))
        yield verdicts([pb.VERDICT_SEND] * len(offer.objects))
        receive_data(requests)
        stored = pb.ObjectResult(outcome=pb.OUTCOME_STORED, durable=not is_profile or profile_is_durable)
        yield pb.PutResponse(results=pb.PutResults(results=[stored] * len(offer.objects)))

    tokens, kv = prompt(layout, 2)
    with HostileServer(lookup=holds_nothing, put=put) as server:
        for profile_is_durable in (True, False):
            cache = caller(server.address, strict=True).client.namespace(layout, profile=profile)
            assert cache.put(tokens, kv).stored == 2
            assert cache.put(tokens, kv, durable=True).durable is profile_is_durable
            assert cache.put(tokens, kv, durable=True).durable is profile_is_durable
    memory, disk = pb.DURABILITY_MEMORY, pb.DURABILITY_DISK
    assert offers == [
        (True, memory), (False, memory), (True, disk), (False, disk), (False, disk),
    ] * 2  # fmt: skip


def test_a_profile_lies_where_its_objects_lie(
    start_node: StartNode, caller: Callable[..., Caller], layout: KVLayout, profile: Profile
) -> None:
    seeds = [start_node("--host-capacity", "64MiB") for _ in range(2)]
    addresses = [seed.address for seed in seeds]
    prompts = [prompt(layout, 1, seed) for seed in range(12)]
    cache = caller(addresses, strict=True).client.namespace(layout, profile=profile)
    for tokens, kv in prompts:
        cache.put(tokens, kv)
    for seed in seeds:
        assert len(kv_objects.lookup(seed.store, PROFILE_LAYOUT, [refs_of(profile)[0].hash])) == 1
    for seed in seeds:  # each by itself: the other might as well be gone
        found = [caller(seed.address, strict=True).client.namespace(layout).get(t)[1] for t, _ in prompts]
        assert 0 < sum(found) < len(prompts) * CHUNK
    hashes = b"".join(ref.hash for ref in refs_of(profile))
    gone = pb.DeleteRequest(namespace_id=PROFILE_LAYOUT.namespace_id, chunk_hashes=hashes)
    assert seeds[0].store.Delete(gone).objects > 0  # one has lost it: the other still has it
    reader = caller(addresses, strict=True)
    own = caller(seeds[0].address).client.namespace(layout)
    for tokens, kv in sorted(prompts, key=lambda each: -own.lookup(each[0]).tokens):  # those of the first seed first
        assert bits(reader.client.namespace(layout).get(tokens)[0]) == expected(layout, kv, "high", profile)
    assert reader.events("loaded") == 1


# The public calls


def test_store_and_load_by_id(
    shared: NodeProcess, caller: Callable[..., Caller], layout: KVLayout, profile: Profile
) -> None:
    writer, reader = (caller(shared.address, strict=True).client.namespace(layout) for _ in range(2))
    chunks = len(refs_of(profile))
    first = writer.store_profile(profile, durable=True)
    assert (first.stored, first.have, first.tokens, first.durable) == (chunks, 0, 0, True)
    again = writer.store_profile(profile)
    assert (again.stored, again.have) == (0, chunks)
    loaded = reader.load_profile(profile.profile_id)
    assert loaded is not None
    assert (loaded.to_bytes(), loaded.profile_id) == (profile.to_bytes(), profile.profile_id)


def test_a_profile_that_is_not_stored_is_a_miss(
    shared: NodeProcess, caller: Callable[..., Caller], layout: KVLayout, profile: Profile
) -> None:
    lenient, strict = caller(shared.address), caller(shared.address, strict=True)
    assert lenient.client.namespace(layout).load_profile(profile.profile_id) is None
    assert lenient.counted("failures", call="load_profile", reason="profile_missing") == 1
    with pytest.raises(ProfileMissing):
        strict.client.namespace(layout).load_profile(profile.profile_id)
    for wrong in (profile.profile_id.hex(), b"", None):
        with pytest.raises(InvalidArgument, match="32 bytes"):
            lenient.client.namespace(layout).load_profile(wrong)  # type: ignore[arg-type]


def test_a_profile_of_another_model_is_not_taken(
    shared: NodeProcess, caller: Callable[..., Caller], layout: KVLayout
) -> None:
    other = kv_objects.small_layout(next(names))
    stranger = transform_profile(other)
    reader = caller(shared.address, strict=True).client
    with pytest.raises(InvalidArgument, match="another model"):
        reader.namespace(layout, profile=stranger)
    with pytest.raises(InvalidArgument, match="another model"):
        reader.namespace(layout).store_profile(stranger)
    reader.namespace(other).store_profile(stranger)
    with pytest.raises(ProfileDamaged, match="another model"):
        reader.namespace(layout).load_profile(stranger.profile_id)
    with pytest.raises(InvalidArgument, match="pass profile= or learn_statistics=True"):
        reader.namespace(other, profile=stranger, learn_statistics=True)
    parted = KVLayout.uniform(
        model="m", revision="r", num_layers=2, kv_heads=2, head_dim=16, partition=Partition(head_groups=2)
    )
    with pytest.raises(InvalidArgument, match="without partition"):
        reader.namespace(parted, learn_statistics=True)


def test_no_node_at_all(caller: Callable[..., Caller], layout: KVLayout, profile: Profile) -> None:
    lenient = caller("127.0.0.1:9", deadline=1.0)
    result = lenient.client.namespace(layout).store_profile(profile)
    assert (result.stored, result.rejected) == (0, len(refs_of(profile)))
    assert lenient.counted("rejected_chunks", reason="unavailable") == result.rejected
    lenient = caller("127.0.0.1:9", deadline=1.0)  # one that does not hold it
    assert lenient.client.namespace(layout).load_profile(profile.profile_id) is None
    strict = caller("127.0.0.1:9", deadline=1.0, strict=True).client.namespace(layout)
    for call in (lambda: strict.load_profile(profile.profile_id), lambda: strict.store_profile(profile)):
        with pytest.raises(Unavailable):
            call()


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


# Time


def objects_with(layout: KVLayout, tokens: list[int], kv: Any, profile: Profile) -> list[bytes]:
    return [
        codec.encode(
            codec.token_slice(kv, ref.first_token, ref.first_token + CHUNK), layout, quality="high",
            first_position=ref.first_token, chunk_hash=ref.hash, profile=profile,
        )
        for ref in codec.chunk_refs(layout, tokens)
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["Lookup", "Fetch"])
def test_a_profile_that_does_not_come_keeps_no_get_beyond_its_deadline(
    caller: Callable[..., Caller], layout: KVLayout, profile: Profile, where: str
) -> None:
    """The load itself goes on: once the node is quick again, the profile is there."""
    tokens, kv = prompt(layout, 2)
    blobs = objects_with(layout, tokens, kv, profile)
    rows = pack(profile.to_bytes())
    profile_blobs = [
        codec.encode(
            as_kv(rows[ref.first_token : ref.first_token + CHUNK]), PROFILE_LAYOUT, quality="raw",
            first_position=ref.first_token, chunk_hash=ref.hash,
        )
        for ref in refs_of(profile)
    ]  # fmt: skip
    quick = threading.Event()

    def held(namespace_id: bytes) -> list[bytes]:
        return profile_blobs if namespace_id == PROFILE_LAYOUT.namespace_id else blobs

    def delay(name: str, namespace_id: bytes) -> None:
        if name == where and namespace_id == PROFILE_LAYOUT.namespace_id:
            quick.wait(DEADLINE_S)

    def lookup(request: pb.LookupRequest, context: Context) -> pb.LookupResponse:
        delay("Lookup", request.namespace_id)
        headers = [codec.parse_header(blob) for blob in held(request.namespace_id)]
        return kv_objects.answer_of(
            kv_objects.ChunkStatus(h.tokens, h.quality, h.provenance, h.object_bytes)
            for h in headers[: len(request.chunk_hashes) // 32]
        )

    def fetch(request: pb.FetchRequest, context: Context) -> Iterator[Answer]:
        delay("Fetch", request.namespace_id)
        asked = [request.chunk_hashes[at : at + 32] for at in range(0, len(request.chunk_hashes), 32)]
        mine = {codec.parse_header(blob).chunk_hash: blob for blob in held(request.namespace_id)}
        for index, chunk_hash in enumerate(asked):
            blob = mine[chunk_hash]
            yield Framed(pb.FetchResponse(chunk_index=index, object_bytes=len(blob)), blob)

    with HostileServer(lookup=lookup, fetch=fetch) as server:
        lenient, strict = caller(server.address, deadline=0.5), caller(server.address, deadline=0.5, strict=True)
        began = time.monotonic()
        assert lenient.client.namespace(layout).get(tokens)[1] == 0
        with pytest.raises(DeadlineExceeded):
            strict.client.namespace(layout).get(tokens)
        assert lenient.client.namespace(layout).load_profile(profile.profile_id) is None
        assert time.monotonic() - began < 3 * 0.5 + 1.0
        assert lenient.counted("misses", reason="deadline") == 1
        quick.set()
        wait_until(lambda: lenient.events("loaded") == 1, "the load went on")
        got, n = lenient.client.namespace(layout).get(tokens, deadline=DEADLINE_S)
        assert (n, bits(got)) == (2 * CHUNK, expected(layout, kv, "high", profile))
        assert lenient.events("loaded") == 1


def hangs_on_profiles(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
    first = next(requests)
    if first.head.offer.namespace_id == PROFILE_LAYOUT.namespace_id:
        hang(context)
    yield from takes_all(itertools.chain([first], requests), context)


def refuses_profiles(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
    first = next(requests)
    if first.head.offer.namespace_id != PROFILE_LAYOUT.namespace_id:
        yield from takes_all(itertools.chain([first], requests), context)
        return
    count = len(first.head.offer.objects)
    yield verdicts([pb.VERDICT_REFUSED] * count)
    next(requests)
    yield results([pb.OUTCOME_REJECTED] * count)


def test_a_profile_that_cannot_be_stored_in_time_rejects_its_put(
    caller: Callable[..., Caller], layout: KVLayout, profile: Profile
) -> None:
    tokens, kv = prompt(layout, 2)
    with HostileServer(lookup=holds_nothing, put=hangs_on_profiles) as server:
        lenient, strict = caller(server.address, deadline=0.5), caller(server.address, deadline=0.5, strict=True)
        began = time.monotonic()
        result = lenient.client.namespace(layout, profile=profile).put(tokens, kv)
        with pytest.raises(DeadlineExceeded):
            strict.client.namespace(layout, profile=profile).put(tokens, kv)
        assert time.monotonic() - began < 2 * 0.5 + 1.0
        assert (result.stored, result.rejected) == (0, 2)
        assert lenient.counted("rejected_chunks", reason="deadline") == 2
        for each in (lenient, strict):
            each.client.close()  # with a transfer under way


def test_a_profile_that_is_refused_rejects_its_put(
    caller: Callable[..., Caller], layout: KVLayout, profile: Profile
) -> None:
    tokens, kv = prompt(layout, 2)
    with HostileServer(lookup=holds_nothing, put=refuses_profiles) as server:
        lenient, strict = caller(server.address), caller(server.address, strict=True)
        result = lenient.client.namespace(layout, profile=profile).put(tokens, kv)
        assert (result.stored, result.rejected) == (0, 2)
        assert "does not store the profile" in result.reasons[0]
        assert lenient.client.namespace(layout).store_profile(profile).rejected == len(refs_of(profile))
        with pytest.raises(RequestRefused, match="does not store the profile"):
            strict.client.namespace(layout, profile=profile).put(tokens, kv)


# Learned statistics


def pages(layout: KVLayout, count: int, seed: int) -> tuple[list[int], Any]:
    """KV whose channels have one and the same mean and scale in every prompt."""
    rng = np.random.default_rng(0)
    shape = (layout.num_layers, 2, 1, layout.layers[0].kv_heads, 16)
    mean, scale = rng.standard_normal(shape), np.exp2(rng.uniform(-3, 1, shape))
    kv = codec.empty(layout, count * CHUNK)
    values = np.random.default_rng(seed).standard_normal(kv.shape)
    kv[...] = (mean + scale * values).astype(kv.dtype)
    return [seed * 100_000 + position for position in range(count * CHUNK)], kv


def learning(caller: Caller, layout: KVLayout, chunks: int = 64) -> Namespace:
    """A namespace that has learned from puts of four prompts."""
    cache = caller.client.namespace(layout, learn_statistics=True)
    for seed in range(4):
        assert caller.events("learned") == 0
        assert cache.put(*pages(layout, chunks // 4, seed)).stored == chunks // 4
    return cache


def learned(caller: Caller) -> None:
    wait_until(lambda: caller.events("learned") == 1, "the profile is learned")


def test_a_namespace_learns_from_its_first_puts(
    shared: NodeProcess, caller: Callable[..., Caller], layout: KVLayout
) -> None:
    writer, reader = caller(shared.address, strict=True), caller(shared.address, strict=True)
    cache = learning(writer, layout)
    learned(writer)
    assert writer.events("stored") == 0, "nobody needs it yet"
    sizes = []
    for seed in (0, 4, 5):
        tokens, kv = pages(layout, 16, seed)
        put = cache.put(tokens, kv)
        assert put.have == (16 if seed == 0 else 0)
        hit = cache.lookup(tokens)
        assert {chunk.quality for chunk in hit.chunks} == {Quality.HIGH}
        sizes.append(sum(chunk.stored_bytes for chunk in hit.chunks))
        got, n = reader.client.namespace(layout).get(tokens)
        assert n == len(tokens)
        error = np.abs(got.astype(np.float32) - kv.astype(np.float32)).max()
        assert error < 0.5 * np.abs(kv.astype(np.float32)).max() / 9
    assert max(sizes[1:]) < 0.95 * sizes[0]
    assert (writer.events("stored"), reader.events("loaded")) == (1, 1)
    found = [codec.parse_header(blob) for blob in kv_objects.fetch(
        shared.store, layout, [ref.hash for ref in codec.chunk_refs(layout, pages(layout, 16, 5)[0])]
    )]  # fmt: skip
    (profile_id,) = {header.profile_id for header in found}
    profile = reader.client.namespace(layout).load_profile(profile_id)
    assert profile is not None
    assert (profile.kind, profile.metadata["tokens"]) == (codec.ProfileKind.STATISTICS, 1024)
    seen = [pages(layout, 16, seed)[1] for seed in range(4)]
    same = codec.learn_statistics(
        [(kv[:, :, at : at + CHUNK], at) for kv in seen for at in range(0, 16 * CHUNK, CHUNK)], layout
    )
    assert same.profile_id == profile_id


def test_it_learns_of_lossy_puts_that_are_new_and_copies_what_it_learns_of(
    shared: NodeProcess, caller: Callable[..., Caller], layout: KVLayout
) -> None:
    writer = caller(shared.address, strict=True)
    cache = writer.client.namespace(layout, learn_statistics=True)
    cache.put(*pages(layout, 70, 10), quality="lossless")
    for _ in range(3):
        cache.put(*pages(layout, 30, 11))  # the same: 480 tokens
    tokens, kv = pages(layout, 40, 12)
    engine = kv.copy()
    assert writer.events("learned") == 0
    cache.put(tokens, engine, first_token=0)
    engine[...] = 0
    learned(writer)
    cache.put(*pages(layout, 1, 13))
    (blob,) = kv_objects.fetch(
        shared.store, layout, [ref.hash for ref in codec.chunk_refs(layout, pages(layout, 1, 13)[0])]
    )
    sample = [(pages(layout, 30, 11)[1], 30), (kv, 34)]
    chunks = [(made[:, :, i : i + CHUNK], i) for made, n in sample for i in range(0, n * CHUNK, CHUNK)]
    assert codec.parse_header(blob).profile_id == codec.learn_statistics(chunks, layout).profile_id


def test_what_teaches_nothing_is_counted_and_done_without(
    shared: NodeProcess, caller: Callable[..., Caller], layout: KVLayout, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def learn_nothing(chunks: Any, layout: KVLayout) -> Profile:
        raise codec.ProfileError("no token to learn from")

    monkeypatch.setattr(codec, "learn_statistics", learn_nothing)
    writer = caller(shared.address, strict=True)
    cache = learning(writer, layout)
    wait_until(lambda: writer.counted("failures", call="learn", reason="structure") == 1, "it gave up")
    assert cache.put(*pages(layout, 64, 9)).stored == 64
    assert writer.events("learned") == 0
    assert [line.split(": ")[:2] for line in logged(caplog)] == [["learn", "structure"]]


def test_learned_statistics_that_are_refused_are_done_without(
    caller: Callable[..., Caller], layout: KVLayout, caplog: pytest.LogCaptureFixture
) -> None:
    with HostileServer(lookup=holds_nothing, put=refuses_profiles) as server:
        lenient = caller(server.address)
        cache = learning(lenient, layout)
        learned(lenient)
        for _ in range(2):
            assert cache.put(*pages(layout, 4, 9)).stored == 4
        assert [line.split(": ")[:2] for line in logged(caplog)] == [["put", "refused"]]
        strict = caller(server.address, strict=True)
        cache = learning(strict, layout)
        learned(strict)
        with pytest.raises(RequestRefused, match="does not store the profile"):
            cache.put(*pages(layout, 4, 9))


def test_large_objects_wait_while_their_profile_is_loaded(start_node: StartNode, caller: Callable[..., Caller]) -> None:
    """Both travel on one connection: what has been sent of the objects must not keep the profile from coming."""
    node = start_node("--host-capacity", "256MiB")
    layout = KVLayout.uniform(
        model=next(names), revision="r", num_layers=8, kv_heads=8, head_dim=128, dtype="float16", chunk_tokens=64
    )
    tokens, kv = [*range(40 * 64)], random_kv(layout, 40 * 64, 1)
    writer, reader = caller(node.address, strict=True), caller(node.address, strict=True)
    cache = writer.client.namespace(layout, learn_statistics=True)
    cache.put(tokens[: 16 * 64], kv[:, :, : 16 * 64])
    learned(writer)
    put = cache.put([5, *tokens[1:]], kv)
    assert (put.stored, put.bytes > 8 << 20) == (40, True)
    assert reader.client.namespace(layout).get([5, *tokens[1:]])[1] == len(tokens)
    assert reader.events("loaded") == 1


def test_no_line_is_logged_where_nothing_is_wrong(
    shared: NodeProcess, caller: Callable[..., Caller], layout: KVLayout, profile: Profile,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with caplog.at_level(logging.INFO):
        tokens, kv = prompt(layout, 2)
        caller(shared.address).client.namespace(layout, profile=profile).put(tokens, kv)
        assert caller(shared.address).client.namespace(layout).get(tokens)[1] == len(tokens)
    assert logged(caplog) == []
