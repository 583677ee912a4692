"""The ways by which `bench.transfer` moves the same objects: memory, bare gRPC, a node's raw protocol, the SDK."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

import kvstore_codec as codec
from bench.bare_socket import BareSocket
from bench.bare_stream import BareClient
from kvstore_client import Client
from kvstore_proto.v1 import admin_pb2, admin_pb2_grpc
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import DATA_BYTES_MAX, Framed, FramedStoreStub

DEADLINE_S = 120.0
LOSS_MAX = 0.05  # mean error of lossy KV, as a part of its mean magnitude, that tells it from other KV
MEMCPY, BARE, SOCKET, TLS_SOCKET = "memcpy", "bare stream", "bare socket", "bare TLS socket"


@dataclass(frozen=True)
class Objects:
    """What one round moves: the objects of one prompt's chunks, in order.

    `kv`: bfloat16 [layers, 2, tokens, kv_heads, head_dim], the whole chunks that `blobs` hold.
    """

    layout: codec.KVLayout
    token_ids: npt.NDArray[np.int64]
    kv: npt.NDArray[Any]
    refs: tuple[codec.ChunkRef, ...]
    blobs: tuple[bytes, ...]

    @property
    def total_bytes(self) -> int:
        return sum(map(len, self.blobs))

    def are(self, came: Sequence[bytes | bytearray | memoryview]) -> bool:
        return len(came) == len(self.blobs) and all(a == b for a, b in zip(came, self.blobs, strict=True))


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Route:
    """`put` and `fetch` are timed; `settle` comes between them and `clear` after them. `intact` looks at what
    `fetch` gave."""

    name: str
    put: Callable[[], None]
    fetch: Callable[[], Any]
    intact: Callable[[Any], bool]
    settle: Callable[[], None] = _nothing
    clear: Callable[[], None] = _nothing


def memcpy_route(objects: Objects) -> Route:
    """One copy each way, into memory that exists already."""
    sources = [np.frombuffer(blob, np.uint8) for blob in objects.blobs]
    stored, fetched = [np.zeros_like(source) for source in sources], [np.zeros_like(source) for source in sources]

    def put() -> None:
        for target, source in zip(stored, sources, strict=True):
            np.copyto(target, source)

    def fetch() -> list[memoryview]:
        for target, source in zip(fetched, stored, strict=True):
            np.copyto(target, source)
        return [target.data for target in fetched]

    return Route(MEMCPY, put, fetch, objects.are)


def bare_route(channel: grpc.Channel, objects: Objects) -> Route:
    """As many bytes in messages of 1 MiB, cut beforehand; what comes is counted and dropped."""
    client = BareClient(channel, timeout_s=DEADLINE_S)
    joined = b"".join(objects.blobs)
    pieces = [joined[offset : offset + DATA_BYTES_MAX] for offset in range(0, len(joined), DATA_BYTES_MAX)]

    def put() -> None:
        counted = client.sink(pieces)
        assert counted == len(joined), counted

    def fetch() -> int:
        return sum(map(len, client.send(len(joined))))

    return Route(BARE, put, fetch, lambda came: came == len(joined))


def socket_route(bare: BareSocket, objects: Objects, name: str = SOCKET) -> Route:
    """As many bytes in blocks of an object's size over a bare socket, into memory that exists already."""
    blocks = list(objects.blobs)
    targets = [memoryview(bytearray(len(block))) for block in blocks]
    return Route(name, lambda: bare.send(blocks), lambda: bare.receive(targets), lambda came: came is None)


def node_route(channel: grpc.Channel, objects: Objects) -> Route:
    """The raw protocol to a node that holds the objects in RAM."""
    raw = _RawProtocol(channel, objects)
    return Route("node, RAM", lambda: raw.put(pb.DURABILITY_MEMORY), raw.fetch, objects.are, clear=raw.delete)


def disk_route(channel: grpc.Channel, objects: Objects) -> Route:
    """The raw protocol to a node that syncs every put to disk and reads every fetch from there.

    The system's page cache is left as it is: right after a put it holds the objects.
    """
    raw = _RawProtocol(channel, objects)
    return Route(
        "node, disk", lambda: raw.put(pb.DURABILITY_DISK), raw.fetch, objects.are,
        settle=raw.evict_from_host, clear=raw.delete,
    )  # fmt: skip


def sdk_route(name: str, client: Client, objects: Objects, quality: str = "raw") -> Route:
    """The synchronous client, from the caller's array and into it; objects are made and checked on the way. At a lossy
    `quality` fewer bytes travel; the rate is still of the KV that is stored and restored."""
    cache = client.namespace(objects.layout)
    target = np.zeros_like(objects.kv)
    chunks = len(objects.refs)

    def put() -> None:
        answer = cache.put(objects.token_ids, objects.kv, quality=quality, deadline=DEADLINE_S)
        assert (answer.stored, answer.tokens) == (chunks, len(objects.token_ids)), answer

    def fetch() -> int:
        _, tokens = cache.get(objects.token_ids, out=target, deadline=DEADLINE_S)
        return tokens

    def intact(tokens: int) -> bool:
        if tokens != len(objects.token_ids):
            return False
        if quality == "raw":
            return bool((target.view(np.uint16) == objects.kv.view(np.uint16)).all())
        restored, original = target.astype(np.float32), objects.kv.astype(np.float32)
        return bool(np.abs(restored - original).mean() < LOSS_MAX * np.abs(original).mean())

    def clear() -> None:
        deleted = cache.delete(deadline=DEADLINE_S)
        assert deleted.objects == chunks, deleted
        target.fill(0)

    return Route(name, put, fetch, intact, clear=clear)


class _RawProtocol:
    """All objects in one Put and in one Fetch, received into memory that exists already."""

    def __init__(self, channel: grpc.Channel, objects: Objects) -> None:
        self._store = FramedStoreStub(channel)
        self._admin = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
        self._objects = objects
        self._hashes = b"".join(ref.hash for ref in objects.refs)
        self._targets = [bytearray(len(blob)) for blob in objects.blobs]

    def put(self, durability: pb.Durability) -> None:
        outgoing: queue.SimpleQueue[Framed[pb.PutRequest] | None] = queue.SimpleQueue()
        answers = self._store.Put(iter(outgoing.get, None), timeout=DEADLINE_S)
        try:
            outgoing.put(Framed(pb.PutRequest(offer=self._offer(durability))))
            verdicts = list(next(answers).verdicts.verdicts)
            assert verdicts == [pb.VERDICT_SEND] * len(verdicts), verdicts
            for index, blob in enumerate(self._objects.blobs):
                view = memoryview(blob)
                for offset in range(0, len(blob), DATA_BYTES_MAX):
                    head = pb.PutRequest(object_index=index, offset=offset)
                    outgoing.put(Framed(head, view[offset : offset + DATA_BYTES_MAX]))
            outgoing.put(Framed(pb.PutRequest(commit=pb.PutCommit())))
            results = next(answers).results.results
        finally:
            outgoing.put(None)
        assert all(result.outcome == pb.OUTCOME_STORED for result in results), results
        assert durability == pb.DURABILITY_MEMORY or all(result.durable for result in results), results

    def fetch(self) -> list[bytearray]:
        request = pb.FetchRequest(namespace_id=self._objects.layout.namespace_id, chunk_hashes=self._hashes)
        for piece in self._store.Fetch(request, timeout=DEADLINE_S):
            offset = piece.head.offset
            self._targets[piece.head.chunk_index][offset : offset + len(piece.data)] = piece.data
        return self._targets

    def evict_from_host(self) -> None:
        evicted = self._admin.Evict(admin_pb2.EvictRequest(tier="host", chunk_hashes=self._hashes), timeout=DEADLINE_S)
        assert evicted.objects == len(self._objects.refs), evicted

    def delete(self) -> None:
        """So that the next put sends again, and that a fetch cannot pass on the last one's bytes."""
        request = pb.DeleteRequest(namespace_id=self._objects.layout.namespace_id)
        deleted = self._store.Delete(request, timeout=DEADLINE_S)
        assert deleted.objects == len(self._objects.refs), deleted
        for target in self._targets:
            target[:] = bytes(len(target))

    def _offer(self, durability: pb.Durability) -> pb.PutOffer:
        layout = self._objects.layout
        offers = [
            pb.ObjectOffer(
                chunk_hash=ref.hash, parent_hash=ref.parent, object_bytes=len(blob), quality=codec.Quality.RAW
            )
            for ref, blob in zip(self._objects.refs, self._objects.blobs, strict=True)
        ]
        return pb.PutOffer(
            namespace_id=layout.namespace_id, layout=layout.canonical_bytes, durability=durability, objects=offers
        )
