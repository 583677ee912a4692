"""Requests over the bulk path of a real node: gets of places and objects, what is held for whom and how long, puts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from bulk_peer import KV, LAYOUT, TOKENS, gauge, let_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_strategies import bits
from node_process import NodeProcess
from polling import wait_until
from prometheus_client import CollectorRegistry

import kvstore_codec as codec
from kvstore_client import Client
from kvstore_codec.raw_chunks import RawChunks
from kvstore_proto.v1 import admin_pb2, store_pb2, transfer_pb2
from kvstore_proto.v1.bulk import Kind, frame
from kvstore_proto.v1.bulk_socket import BulkSocket, ConnectionEnded

WAITING = "kvstore_host_waiting_bytes"
pytestmark = pytest.mark.usefixtures("nothing_stored")


def fetch_request(*, places: bool, hold_ms: int = 60_000) -> bytes:
    refs = codec.chunk_refs(LAYOUT, TOKENS)
    request = store_pb2.FetchRequest(
        namespace_id=LAYOUT.namespace_id, chunk_hashes=b"".join(ref.hash for ref in refs)
    )  # fmt: skip
    return transfer_pb2.BulkFetch(request=request, places=places, hold_ms=hold_ms).SerializeToString()


# A get: lookup and objects in one request


def get_request(*, places: bool, min_quality: str = "low", quality: str = "raw", lease_ms: int = 60_000) -> bytes:
    refs = codec.chunk_refs(LAYOUT, TOKENS)
    lookup = store_pb2.LookupRequest(
        namespace_id=LAYOUT.namespace_id, chunk_hashes=b"".join(ref.hash for ref in refs), lease_ms=lease_ms
    )
    return transfer_pb2.BulkGet(
        lookup=lookup, quality=codec.Quality.parse(quality), min_quality=codec.Quality.parse(min_quality),
        places=places, hold_ms=60_000,
    ).SerializeToString()  # fmt: skip


def frames(connection: BulkSocket) -> list[tuple[Kind, int, bytes]]:
    """Of one answer, up to its END."""
    came: list[tuple[Kind, int, bytes]] = []
    while not came or came[-1][0] is not Kind.END:
        found = connection.receive(Kind.FOUND, Kind.OBJECT, Kind.PLACES, Kind.END)
        came.append((found.kind, found.index, connection.payload(found)))
    return came


def put_some(node: NodeProcess, tokens: int, quality: str = "raw") -> None:
    with Client(node.address, strict=True, deadline=20.0, registry=CollectorRegistry()) as client:
        kv = codec.token_slice(KV, 0, tokens)
        client.namespace(LAYOUT).put(TOKENS[:tokens], kv, quality=quality, durable=True)


def test_a_get_answers_what_there_is_and_brings_it(bulk_node: NodeProcess) -> None:
    put_some(bulk_node, 64)
    for evict in (False, True):
        if evict:
            bulk_node.admin.Evict(admin_pb2.EvictRequest(tier="host"), timeout=10)
        with let_in(bulk_node) as connection:
            connection.send(Kind.GET, 0, get_request(places=False))
            (kind, _, payload), *objects, (_, _, ended) = frames(connection)
            found = store_pb2.LookupResponse.FromString(payload)
            assert kind is Kind.FOUND
            assert list(found.tokens) == [16] * 4
            assert found.lease_id
            assert [(kind, index) for kind, index, _ in objects] == [(Kind.OBJECT, index) for index in range(4)]
            assert [len(blob) for _, _, blob in objects] == list(found.stored_bytes)
            assert ended == b""
            connection.send(Kind.GET, 0, get_request(places=False))
            assert len(frames(connection)) == 6, "the connection is good for more"
    wait_until(lambda: gauge(bulk_node, "kvstore_leases") == 0, "a get's lease ends with it")


def test_a_get_brings_no_more_than_is_good_enough(bulk_node: NodeProcess) -> None:
    put_some(bulk_node, 32, "raw")
    put_some(bulk_node, 64, "medium")
    with let_in(bulk_node) as connection:
        for floor, objects in (("raw", 2), ("high", 2), ("medium", 4), ("low", 4)):
            connection.send(Kind.GET, 0, get_request(places=False, min_quality=floor))
            (_, _, payload), *came = frames(connection)
            assert len(store_pb2.LookupResponse.FromString(payload).tokens) == 4
            assert [kind for kind, _, _ in came] == [Kind.OBJECT] * objects + [Kind.END]


def test_a_get_of_nothing_finds_nothing(bulk_node: NodeProcess) -> None:
    with let_in(bulk_node) as connection:
        connection.send(Kind.GET, 0, get_request(places=False))
        assert frames(connection) == [(Kind.FOUND, 0, b""), (Kind.END, 0, b"")]


def test_all_places_of_a_get_are_one_frame(bulk_node: NodeProcess) -> None:
    put_some(bulk_node, 256)
    with let_in(bulk_node, local=True) as connection:
        connection.send(Kind.MAP, 0)
        os.close(connection.receive_descriptor(Kind.MAPPED)[1])
        connection.send(Kind.GET, 0, get_request(places=True))
        (_, _, payload), (kind, index, told), (ended, _, _) = frames(connection)
        places = transfer_pb2.Places.FromString(told)
        assert (kind, index, ended) == (Kind.PLACES, 0, Kind.END)
        assert list(places.object_bytes) == list(store_pb2.LookupResponse.FromString(payload).stored_bytes)
        bulk_node.admin.Evict(admin_pb2.EvictRequest(tier="host"), timeout=10)
        assert gauge(bulk_node, WAITING) > 0, "they are held"
        release(connection)
    wait_until(lambda: gauge(bulk_node, WAITING) == 0, "the memory is free")


@pytest.mark.parametrize(
    "lies",
    [{"namespace_id": b"short"}, {"chunk_hashes": b"x"}, {"part": 1 << 30}, {"first_chunk_hash": b"x"}],
    ids=["namespace", "hashes", "part", "first chunk"],
)
def test_a_get_that_asks_for_nonsense_is_refused(bulk_node: NodeProcess, lies: dict[str, Any]) -> None:
    asked = transfer_pb2.BulkGet.FromString(get_request(places=False))
    for name, value in lies.items():
        setattr(asked.lookup, name, value)
    with let_in(bulk_node) as connection:
        connection.send(Kind.GET, 0, asked.SerializeToString())
        ended = transfer_pb2.Ended.FromString(connection.payload(connection.receive(Kind.END)))
        assert ended.code == "invalid_request"
    for name in ("quality", "min_quality"):
        asked = transfer_pb2.BulkGet.FromString(get_request(places=False))
        setattr(asked, name, 99)
        with let_in(bulk_node) as connection:
            connection.send(Kind.GET, 0, asked.SerializeToString())
            assert connection.receive(Kind.END)


# What is read in place


def test_what_is_read_in_place_stays_until_it_is_released(bulk_node: NodeProcess) -> None:
    with places(bulk_node, hold_ms=60_000) as connection:
        assert gauge(bulk_node, WAITING) > 0
        release(connection)
        wait_until(lambda: gauge(bulk_node, WAITING) == 0, "the memory is free")
        connection.send(Kind.FETCH, 0, fetch_request(places=True))
        assert connection.receive(Kind.PLACES, Kind.OBJECT), "and the connection is good for more"


def test_a_reader_that_goes_away_holds_nothing(bulk_node: NodeProcess) -> None:
    with places(bulk_node, hold_ms=60_000):
        assert gauge(bulk_node, WAITING) > 0
    wait_until(lambda: gauge(bulk_node, WAITING) == 0, "the memory is free")


@pytest.mark.parametrize("hold_ms", [300, 3_600_000])
def test_a_reader_that_forgets_holds_nothing_past_its_lease(bulk_node: NodeProcess, hold_ms: int) -> None:
    """Its own limit or the node's, whichever is shorter; and what it reads later is not confirmed."""
    with places(bulk_node, hold_ms) as connection:
        wait_until(lambda: gauge(bulk_node, WAITING) == 0, "the memory is free")
        with pytest.raises(ConnectionEnded):
            release(connection)


def test_a_reader_killed_while_it_reads_holds_nothing(bulk_node: NodeProcess) -> None:
    script = """
        import os, signal, sys
        sys.path[:0] = sys.argv[2:]
        from bulk_peer import LAYOUT, TOKENS
        from kvstore_client import Client
        from kvstore_codec.raw_chunks import RawChunks
        def dies(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        RawChunks.read = dies
        with Client(sys.argv[1], transport="shm", deadline=20.0) as client:
            client.namespace(LAYOUT).get(TOKENS[:256])
    """
    with Client(bulk_node.address, strict=True, deadline=20.0, registry=CollectorRegistry()) as client:
        client.namespace(LAYOUT).put(TOKENS[:256], codec.token_slice(KV, 0, 256), quality="raw", durable=True)
    support = Path(__file__).parents[1] / "support"
    command = [sys.executable, "-c", textwrap.dedent(script), bulk_node.address, str(support)]
    ended = subprocess.run(command, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    bulk_node.admin.Evict(admin_pb2.EvictRequest(tier="host"), timeout=10)
    wait_until(lambda: gauge(bulk_node, WAITING) == 0, "the memory is free")
    wait_until(lambda: gauge(bulk_node, "kvstore_bulk_connections") == 0, "its connections have ended")


def test_what_was_read_too_slowly_is_a_miss(bulk_node: NodeProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node took the memory back while the client, stopped for a while, was reading it."""
    with Client(bulk_node.address, deadline=20.0, transport="shm", registry=CollectorRegistry()) as client:
        cache = client.namespace(LAYOUT)
        cache.put(TOKENS[:256], codec.token_slice(KV, 0, 256), quality="raw")
        assert cache.get(TOKENS[:256])[1] == 256

        read = RawChunks.read

        def slowly(*arguments: Any) -> int:
            threading.Event().wait(2.0)
            return read(*arguments)

        monkeypatch.setattr(RawChunks, "read", slowly)
        assert cache.get(TOKENS[:256])[1] == 0
        monkeypatch.undo()
        assert cache.get(TOKENS[:256])[1] == 256


def release(connection: BulkSocket) -> None:
    connection.send(Kind.RELEASE, 0)
    connection.receive(Kind.RELEASED)


@contextmanager
def places(node: NodeProcess, hold_ms: int) -> Iterator[BulkSocket]:
    """A connection that has been told where objects are, and has not let go; they have been evicted since."""
    with Client(node.address, strict=True, deadline=20.0, registry=CollectorRegistry()) as client:
        client.namespace(LAYOUT).put(TOKENS[:256], codec.token_slice(KV, 0, 256), quality="raw", durable=True)
    with let_in(node, local=True) as connection:
        connection.send(Kind.MAP, 0)
        os.close(connection.receive_descriptor(Kind.MAPPED)[1])
        connection.send(Kind.FETCH, 0, fetch_request(places=True, hold_ms=hold_ms))
        while (found := connection.receive(Kind.PLACES, Kind.END)).kind is Kind.PLACES:
            connection.payload(found)
        connection.payload(found)
        node.admin.Evict(admin_pb2.EvictRequest(tier="host"), timeout=10)
        yield connection


# Puts


def offer_of(tokens: int) -> tuple[store_pb2.PutOffer, list[bytes]]:
    """Of a prompt's first tokens, with the objects."""
    refs = codec.chunk_refs(LAYOUT, TOKENS[:tokens])
    blobs = [
        codec.encode(codec.token_slice(KV, ref.first_token, ref.first_token + 16), LAYOUT, quality="raw",
                     first_position=ref.first_token, chunk_hash=ref.hash)
        for ref in refs
    ]  # fmt: skip
    offer = store_pb2.PutOffer(
        namespace_id=LAYOUT.namespace_id, layout=LAYOUT.canonical_bytes,
        objects=[
            store_pb2.ObjectOffer(chunk_hash=ref.hash, parent_hash=ref.parent, object_bytes=len(blob))
            for ref, blob in zip(refs, blobs, strict=True)
        ],
    )  # fmt: skip
    return offer, blobs


def test_a_put_that_breaks_off_leaves_nothing(bulk_node: NodeProcess) -> None:
    offer, blobs = offer_of(32)
    offered = frame(Kind.OFFER, 0, store_pb2.PutRequest(offer=offer).SerializeToString())
    first = frame(Kind.OBJECT, 0, blobs[0])
    for sent in (
        b"", first, first + frame(Kind.OBJECT, 1, blobs[1])[:-1], first + first, frame(Kind.OBJECT, 1, blobs[1]),
        frame(Kind.OBJECT, 0, blobs[0] + b"x"), first + b"\xff" * 16,
    ):  # fmt: skip
        with let_in(bulk_node) as connection:
            connection.send_bytes(offered)
            connection.payload(connection.receive(Kind.VERDICTS))
            connection.send_bytes(sent)
        wait_until(lambda: gauge(bulk_node, "kvstore_staged_bytes") == 0, "nothing is staged")
    with Client(bulk_node.address, strict=True, registry=CollectorRegistry()) as client:
        assert client.stat().objects == 0
        assert client.stat().tiers[0].used_bytes == 0
    with let_in(bulk_node) as connection:
        connection.send_bytes(offered)
        connection.payload(connection.receive(Kind.VERDICTS))
        connection.send_bytes(first + frame(Kind.COMMIT))
        answer = store_pb2.PutResponse.FromString(connection.payload(connection.receive(Kind.RESULTS)))
    outcomes = [result.outcome for result in answer.results.results]
    assert outcomes == [store_pb2.OUTCOME_STORED, store_pb2.OUTCOME_REJECTED], "what came counts"


def test_a_put_of_a_damaged_object_stores_the_others(bulk_node: NodeProcess) -> None:
    offer, blobs = offer_of(48)
    blobs[1] = blobs[1][:-1] + bytes([blobs[1][-1] ^ 1])
    with let_in(bulk_node) as connection:
        connection.send(Kind.OFFER, 0, store_pb2.PutRequest(offer=offer).SerializeToString())
        connection.payload(connection.receive(Kind.VERDICTS))
        for index, blob in enumerate(blobs):
            connection.send(Kind.OBJECT, index, blob)
        connection.send(Kind.COMMIT, 0)
        answer = store_pb2.PutResponse.FromString(connection.payload(connection.receive(Kind.RESULTS)))
    outcomes = [result.outcome for result in answer.results.results]
    assert outcomes == [store_pb2.OUTCOME_STORED, store_pb2.OUTCOME_REJECTED, store_pb2.OUTCOME_STORED]
    assert "checksum" in answer.results.results[1].reason
    assert gauge(bulk_node, 'kvstore_integrity_failures_total{code="checksum_mismatch",tier="put"}') == 1
    assert gauge(bulk_node, "kvstore_staged_bytes") == gauge(bulk_node, WAITING) == 0
    with Client(bulk_node.address, strict=True, registry=CollectorRegistry()) as client:
        kv, tokens = client.namespace(LAYOUT).get(TOKENS[:48])
        assert client.stat().objects == 2
    assert tokens == 16
    assert bits(kv) == bits(codec.token_slice(KV, 0, 16))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=300), kind=st.sampled_from(Kind), index=st.integers(0, 2**32 - 1))
def test_no_bytes_of_a_peer_end_the_node(bulk_node: NodeProcess, noise: bytes, kind: Kind, index: int) -> None:
    for sent in (noise, frame(kind, index, noise)):
        with let_in(bulk_node) as connection:
            connection.send_bytes(sent)
    assert bulk_node.process.poll() is None
    with Client(bulk_node.address, strict=True, deadline=20.0, registry=CollectorRegistry()) as client:
        assert client.stat().staged_bytes == 0
