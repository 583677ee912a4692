"""Streams from a node that lies, babbles or stalls: what was handed over before is good, then the typed error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import kv_objects
import pytest
from hostile_server import Answer, Context, Held, HostileServer, hang, wire
from kv_strategies import bits
from prometheus_client import CollectorRegistry

import kvstore_codec as codec
from kvstore_client import (
    Client,
    DeadlineExceeded,
    KvClientError,
    ObjectDamaged,
    ObjectForeign,
    ProtocolViolation,
    RequestRefused,
    Stream,
    Unavailable,
)
from kvstore_proto.v1 import live_pb2 as pb
from kvstore_proto.v1.framing import DATA_BYTES_MAX, Framed
from kvstore_proto.v1.live_framing import SERVICE

LAYOUT = kv_objects.small_layout("hostile-live", layers=4)
CHUNKS, BAD = 3, 2  # BAD: the layer that something is wrong with
HELD = Held.of(LAYOUT, CHUNKS, seed=1)
DEADLINE_S, SLACK_S = 1.0, 5.0
Follow = Callable[[pb.FollowRequest, Context], Iterator[Answer]]


class LyingNode(HostileServer):
    """Whose Follow is a function of the test."""

    def __init__(self, follow: Follow, **others: Any) -> None:
        super().__init__(**others)
        handlers = {"Follow": grpc.unary_stream_rpc_method_handler(follow, pb.FollowRequest.FromString, wire)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def objects(layer: int, *, quality: str = "lossless", held: Held = HELD) -> list[bytes]:
    """The layer's objects, as an honest writer makes them."""
    return [
        codec.encode(
            [codec.token_slice(held.kv, ref.first_token, ref.first_token + ref.tokens)[layer]],
            codec.layout_by_layers(LAYOUT), quality=quality, first_position=ref.first_token, chunk_hash=ref.hash,
            part=codec.layer_part(LAYOUT, 0, layer),
        )
        for ref in held.refs
    ]  # fmt: skip


def found(**lies: int) -> Framed[pb.FollowResponse]:
    honest = {"first_chunk": 0, "chunks": CHUNKS, "layers": LAYOUT.num_layers, "quality": codec.Quality.LOSSLESS}
    return Framed(pb.FollowResponse(found=pb.LiveFound(**(honest | lies))))


def piece(
    layer: int, blobs: list[bytes], *, offset: int = 0, lengths: list[int] | None = None
) -> Framed[pb.FollowResponse]:  # fmt: skip
    head = pb.FollowResponse(layer=layer, offset=offset, object_bytes=map(len, blobs) if lengths is None else lengths)
    return Framed(head, b"".join(blobs))


def follows(bad: Callable[[], Iterator[Answer]]) -> Follow:
    """Honest up to layer BAD."""

    def follow(request: pb.FollowRequest, context: Context) -> Iterator[Answer]:
        yield found()
        for layer in range(BAD):
            yield piece(layer, objects(layer))
        yield from bad()

    return follow


def lies() -> dict[str, tuple[Callable[[], Iterator[Answer]], type[KvClientError]]]:
    good = objects(BAD)
    damaged = [good[0], good[1][:-1] + bytes([good[1][-1] ^ 1]), good[2]]
    other = Held.of(LAYOUT, CHUNKS, seed=2)

    def one(answer: Answer) -> Callable[[], Iterator[Answer]]:
        return lambda: iter([answer])

    wrong: dict[str, Answer] = {
        "another layer": piece(BAD + 1, good),
        "a layer again": piece(BAD - 1, objects(BAD - 1)),
        "a gap": piece(BAD, good, offset=1),
        "no lengths": piece(BAD, good, lengths=[]),
        "too few lengths": piece(BAD, good, lengths=[len(good[0])]),
        "an object of no length": piece(BAD, good, lengths=[0, len(good[0]) + len(good[1]), len(good[2])]),
        "an object beyond reason": piece(BAD, good, lengths=[1 << 30, 1, 1]),
        "more than declared": piece(BAD, good, lengths=[1, 1, 1]),
        "nothing": piece(BAD, [], lengths=list(map(len, good))),
        "found again": found(),
        "stored in between": Framed(pb.FollowResponse(stored=pb.LiveStored())),
        "babble": b"\xff\xff\xff",
    }
    cases: dict[str, tuple[Callable[[], Iterator[Answer]], type[KvClientError]]] = {
        name: (one(answer), ProtocolViolation) for name, answer in wrong.items()
    }
    cases["lengths twice"] = (
        lambda: iter([piece(BAD, [good[0]], lengths=list(map(len, good))), piece(BAD, good[1:], offset=len(good[0]))]),
        ProtocolViolation,
    )
    cases["damaged"] = (one(piece(BAD, damaged)), ObjectDamaged)
    cases["another layer's objects"] = (one(piece(BAD, objects(BAD - 1))), ObjectForeign)
    cases["another prompt's objects"] = (one(piece(BAD, objects(BAD, held=other))), ObjectForeign)
    cases["objects in another order"] = (one(piece(BAD, good[::-1])), ObjectForeign)
    cases["objects of less quality than is asked for"] = (one(piece(BAD, objects(BAD, quality="low"))), ObjectForeign)
    return cases


def stream_of(client: Client, wait: float = 1.0) -> Stream:
    return client.namespace(LAYOUT).stream(HELD.tokens, wait=wait, min_quality="lossless")


def connected(node: HostileServer, *, strict: bool) -> Client:
    return Client(node.address, deadline=DEADLINE_S, strict=strict, registry=CollectorRegistry())


@pytest.mark.parametrize("name", lies())
def test_a_lie_ends_the_stream_behind_what_is_good(name: str) -> None:
    bad, error = lies()[name]
    with LyingNode(follows(bad)) as node:
        with connected(node, strict=True) as client:
            stream = stream_of(client)
            layers = [next(stream) for _ in range(BAD)]
            with pytest.raises(error):
                next(stream)
            assert next(stream, None) is None
        assert all(bits([(k, v)]) == bits([HELD.kv[layer]]) for layer, k, v in layers)
        with connected(node, strict=False) as client:
            stream = stream_of(client)
            assert [layer for layer, _, _ in stream] == list(range(BAD))
            assert (stream.complete, stream.reason) == (False, error.code.value)


@pytest.mark.parametrize(
    "lie",
    [
        {"layers": 5}, {"first_chunk": 1}, {"first_chunk": 1, "chunks": 2}, {"chunks": 4}, {"chunks": 0},
        {"quality": 9}, {"quality": codec.Quality.HIGH}, {"provenance": codec.Quality.LOW},
    ],
)  # fmt: skip
def test_an_impossible_live_write_is_not_followed(lie: dict[str, int]) -> None:
    def follow(request: pb.FollowRequest, context: Context) -> Iterator[Answer]:
        yield found(**lie)
        for layer in range(LAYOUT.num_layers):
            yield piece(layer, objects(layer))

    with LyingNode(follow) as node, connected(node, strict=True) as client, pytest.raises(ProtocolViolation):
        next(stream_of(client))


@pytest.mark.parametrize("came", [None, 0, BAD])
def test_a_node_that_stalls_is_waited_for_no_longer_than_the_deadline(came: int | None) -> None:
    """Before it says anything, before the first layer, and after some."""

    def follow(request: pb.FollowRequest, context: Context) -> Iterator[Answer]:
        if came is not None:
            yield found()
        for layer in range(came or 0):
            yield piece(layer, objects(layer))
        hang(context)

    with LyingNode(follow) as node, connected(node, strict=True) as client:
        stream, began = stream_of(client, wait=0.2), time.monotonic()
        for _ in range(came or 0):
            next(stream)
        with pytest.raises(DeadlineExceeded):
            next(stream)
        assert time.monotonic() - began < 2 * DEADLINE_S + SLACK_S


def test_a_node_that_says_stored_again_and_again_is_asked_twice() -> None:
    def follow(request: pb.FollowRequest, context: Context) -> Iterator[Answer]:
        yield Framed(pb.FollowResponse(stored=pb.LiveStored()))

    with LyingNode(follow) as node, connected(node, strict=True) as client:
        stream = stream_of(client, wait=60)
        assert next(stream, None) is None
        assert node.calls == ["Lookup", "Lookup"]


def test_what_is_stored_is_streamed_by_a_node_that_knows_no_live_writes() -> None:
    tokens = [*HELD.tokens, *HELD.tokens[: LAYOUT.chunk_tokens]]
    with HostileServer(lookup=HELD.lookup, fetch=HELD.fetch) as node:
        with connected(node, strict=False) as client:
            stream = client.namespace(LAYOUT).stream(tokens, wait=1.0)
            layers = list(stream)
            assert (stream.tokens, stream.complete, stream.reason) == (len(HELD.tokens), True, "refused")
        assert all(bits([(k, v)]) == bits([HELD.kv[layer]]) for layer, k, v in layers)
        with connected(node, strict=True) as client, pytest.raises(RequestRefused):
            next(client.namespace(LAYOUT).stream(tokens, wait=1.0))


def test_a_layer_in_many_pieces_is_a_layer() -> None:
    def follow(request: pb.FollowRequest, context: Context) -> Iterator[Answer]:
        yield found()
        for layer in range(LAYOUT.num_layers):
            whole = b"".join(objects(layer))
            for offset in range(0, len(whole), 777):
                lengths = list(map(len, objects(layer))) if not offset else []
                yield piece(layer, [whole[offset : offset + 777]], offset=offset, lengths=lengths)

    assert DATA_BYTES_MAX > 777
    with LyingNode(follow) as node, connected(node, strict=True) as client:
        stream = stream_of(client)
        assert all(bits([(k, v)]) == bits([HELD.kv[layer]]) for layer, k, v in stream)
        assert stream.complete


def test_a_node_that_cannot_be_reached_is_a_miss() -> None:
    with HostileServer() as node:
        pass
    with connected(node, strict=False) as client:
        stream = stream_of(client, wait=0.5)
        assert list(stream) == []
        assert stream.reason in ("unavailable", "deadline")
    with connected(node, strict=True) as client, pytest.raises((Unavailable, DeadlineExceeded)):
        next(stream_of(client, wait=0.5))
