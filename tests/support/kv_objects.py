"""Small but real objects, and the raw protocol to store and read them: what a client does, without the client."""

from __future__ import annotations

import dataclasses
import itertools
import queue
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import kvstore_codec as codec
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import DATA_BYTES_MAX, Framed, FramedStoreStub

DEADLINE_S = 30.0


def small_layout(model: str = "test-model", *, layers: int = 2, head_dim: int = 16) -> codec.KVLayout:
    return codec.KVLayout.uniform(
        model=model, revision="r1", num_layers=layers, kv_heads=2, head_dim=head_dim, dtype="float16",
        chunk_tokens=16, rope=codec.RoPE(theta=10000.0),
    )  # fmt: skip


@dataclass(frozen=True)
class StoredChunk:
    ref: codec.ChunkRef
    blob: bytes
    quality: codec.Quality = codec.Quality.RAW

    @property
    def hash(self) -> bytes:
        return self.ref.hash

    def offer(self) -> pb.ObjectOffer:
        return pb.ObjectOffer(
            chunk_hash=self.ref.hash, parent_hash=self.ref.parent, object_bytes=len(self.blob), quality=self.quality
        )


def chunks(layout: codec.KVLayout, count: int, seed: int, quality: str = "raw") -> list[StoredChunk]:
    """One prompt of `count` chunks whose tokens and values follow from `seed`."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 50_000, count * layout.chunk_tokens)
    made = []
    for ref in codec.chunk_refs(layout, tokens):
        kv = codec.empty(layout, ref.tokens)
        kv[...] = rng.standard_normal(kv.shape).astype(kv.dtype)
        blob = codec.encode(
            kv, layout, quality=quality, first_position=ref.first_token, chunk_hash=ref.hash
        )  # fmt: skip
        made.append(StoredChunk(ref, bytes(blob), codec.Quality.parse(quality)))
    return made


class PutStream:
    """One Put, message by message. Close it by `results()` or `cancel()`."""

    def __init__(self, stub: FramedStoreStub, *, timeout: float = DEADLINE_S) -> None:
        self._outgoing: queue.SimpleQueue[Framed[pb.PutRequest] | None] = queue.SimpleQueue()
        self.call: Any = stub.Put(iter(self._outgoing.get, None), timeout=timeout)

    def send(self, head: pb.PutRequest, data: bytes | memoryview = b"") -> None:
        self._outgoing.put(Framed(head, data))

    def end(self) -> None:
        """Half-closes the stream."""
        self._outgoing.put(None)

    def offer(self, layout: codec.KVLayout, offered: Sequence[StoredChunk], *, durable: bool = False) -> list[int]:
        """The verdicts."""
        self.send(put_offer(layout, [chunk.offer() for chunk in offered], durable=durable))
        return list(self.receive().verdicts.verdicts)

    def piece(self, index: int, offset: int, data: bytes | memoryview) -> None:
        self.send(pb.PutRequest(object_index=index, offset=offset), data)

    def whole(self, index: int, blob: bytes) -> None:
        for offset in range(0, len(blob), DATA_BYTES_MAX):
            self.piece(index, offset, memoryview(blob)[offset : offset + DATA_BYTES_MAX])

    def commit(self) -> None:
        self.send(pb.PutRequest(commit=pb.PutCommit()))

    def results(self) -> list[pb.ObjectResult]:
        self.commit()
        self.end()
        return list(self.receive().results.results)

    def receive(self) -> pb.PutResponse:
        """The node's next message; raises grpc.RpcError."""
        try:
            response: pb.PutResponse = next(self.call)
        except BaseException:
            self.end()
            raise
        return response

    def cancel(self) -> None:
        self.call.cancel()
        self.end()


def put_offer(layout: codec.KVLayout, objects: Sequence[pb.ObjectOffer], *, durable: bool = False) -> pb.PutRequest:
    return pb.PutRequest(
        offer=pb.PutOffer(
            namespace_id=layout.namespace_id,
            layout=layout.canonical_bytes,
            durability=pb.DURABILITY_DISK if durable else pb.DURABILITY_MEMORY,
            objects=objects,
        )
    )


def put(
    stub: FramedStoreStub, layout: codec.KVLayout, offered: Sequence[StoredChunk], *, durable: bool = False
) -> list[pb.ObjectResult]:
    """Stores what the node wants of `offered`."""
    stream = PutStream(stub)
    verdicts = stream.offer(layout, offered, durable=durable)
    for index, (verdict, chunk) in enumerate(zip(verdicts, offered, strict=True)):
        if verdict == pb.VERDICT_SEND:
            stream.whole(index, chunk.blob)
    return stream.results()


@dataclass(frozen=True)
class ChunkStatus:
    """A chunk of a LookupResponse."""

    tokens: int = 0
    quality: int = 0
    provenance: int = 0
    stored_bytes: int = 0
    tier: int = 0


def answer_of(statuses: Iterable[ChunkStatus]) -> pb.LookupResponse:
    response = pb.LookupResponse()
    for status in statuses:
        for name, value in dataclasses.asdict(status).items():
            getattr(response, name).append(value)
    return response


def statuses_of(response: pb.LookupResponse) -> list[ChunkStatus]:
    columns = (response.tokens, response.quality, response.provenance, response.stored_bytes, response.tier)
    return [ChunkStatus(*values) for values in zip(*columns, strict=True)]


def lookup(stub: FramedStoreStub, layout: codec.KVLayout, hashes: Sequence[bytes]) -> list[ChunkStatus]:
    request = pb.LookupRequest(namespace_id=layout.namespace_id, chunk_hashes=b"".join(hashes))
    return statuses_of(stub.Lookup(request, timeout=DEADLINE_S))


def fetch(
    stub: FramedStoreStub, layout: codec.KVLayout, hashes: Sequence[bytes], *, quality: int = 0,
    held: Sequence[int] = (),
) -> list[bytes]:  # fmt: skip
    """The objects that came, each checked to be complete and in order; without the first `held` bytes of each."""
    request = pb.FetchRequest(
        namespace_id=layout.namespace_id, chunk_hashes=b"".join(hashes), quality=quality, held_bytes=held
    )
    stream: Iterator[Framed[pb.FetchResponse]] = stub.Fetch(request, timeout=DEADLINE_S)
    objects: list[bytes] = []
    for index, pieces in itertools.groupby(stream, key=lambda piece: piece.head.chunk_index):
        assert index == len(objects), "objects come in order"
        blob = bytearray()
        declared = 0
        for piece in pieces:
            assert len(piece.data) <= DATA_BYTES_MAX
            assert piece.head.offset == len(blob)
            declared = declared or piece.head.object_bytes
            blob += piece.data
        assert len(blob) == declared, "an object is complete"
        objects.append(bytes(blob))
    return objects


def stat(stub: FramedStoreStub) -> pb.StatResponse:
    response: pb.StatResponse = stub.Stat(pb.StatRequest(), timeout=DEADLINE_S)
    return response
