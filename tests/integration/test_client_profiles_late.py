"""Profiles that do not come, or cannot be stored, in time: no call takes longer than its deadline."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import kv_objects
import pytest
from hostile_server import Answer, Context, HostileServer, hang, holds_nothing, takes_all
from kv_strategies import bits
from polling import wait_until
from profile_callers import CHUNK, DEADLINE_S, Caller, expected, prompt, refs_of, refuses_profiles

import kvstore_codec as codec
from kvstore_client import DeadlineExceeded, KVLayout, Profile, RequestRefused
from kvstore_client.profiles import PROFILE_LAYOUT, as_kv, pack
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import Framed


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
