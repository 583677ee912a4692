"""Profiles through real nodes: a reader needs no configuration; storing and loading one by its id."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import kv_objects
import pytest
from hostile_server import Answer, Context, HostileServer, holds_nothing, receive_data, verdicts
from kv_strategies import bits
from node_process import NodeProcess
from profile_callers import CHUNK, DEADLINE_S, Caller, expected, logged, names, prompt, refs_of
from prometheus_client import CollectorRegistry
from small_profiles import transform_profile

import kvstore_codec as codec
from kvstore_client import (
    AsyncClient,
    Client,
    InvalidArgument,
    KVLayout,
    Partition,
    Profile,
    ProfileDamaged,
    ProfileMissing,
    Unavailable,
)
from kvstore_client.profiles import PROFILE_LAYOUT, chunks_of
from kvstore_client.transports.bulk_path import Transport
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import Framed

StartNode = Callable[..., NodeProcess]


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


def test_no_line_is_logged_where_nothing_is_wrong(
    shared: NodeProcess, caller: Callable[..., Caller], layout: KVLayout, profile: Profile,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with caplog.at_level(logging.INFO):
        tokens, kv = prompt(layout, 2)
        caller(shared.address).client.namespace(layout, profile=profile).put(tokens, kv)
        assert caller(shared.address).client.namespace(layout).get(tokens)[1] == len(tokens)
    assert logged(caplog) == []
