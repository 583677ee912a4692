"""A node that lies: a real gRPC server on a real socket whose Lookup, Fetch and Put are functions of the test.

`Held` answers as an honest node would from objects in memory; a test replaces what is to be wrong. Functions may
answer messages, or bytes that go on the wire as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
import kv_objects
from google.protobuf.message import Message
from kv_strategies import random_kv

import kvstore_codec as codec
from kvstore_proto.v1 import framing, transfer_pb2
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import CHANNEL_OPTIONS, DATA_BYTES_MAX, Framed

if TYPE_CHECKING:
    from typing_extensions import Self

Context = grpc.ServicerContext
Answer = Message | Framed[Any] | bytes
Lookup = Callable[[pb.LookupRequest, Context], Answer]
Fetch = Callable[[pb.FetchRequest, Context], Iterable[Answer]]
Put = Callable[[Iterator[Framed[pb.PutRequest]], Context], Iterable[Answer]]
Delete = Callable[[pb.DeleteRequest, Context], Answer]
Connect = Callable[[transfer_pb2.ConnectRequest, Context], Answer]
Stat = Callable[[pb.StatRequest, Context], Answer]
Renew = Callable[[pb.RenewRequest, Context], Answer]

CALLS_MAX = 32  # at a time; more would wait for one that hangs
HANG_S_MAX = 60.0


@dataclass(frozen=True)
class Held:
    """A prompt, its KV and its objects; and what an honest node answers about them."""

    layout: codec.KVLayout
    tokens: list[int]
    kv: Any
    refs: list[codec.ChunkRef]
    blobs: list[bytes]

    @classmethod
    def of(
        cls, layout: codec.KVLayout, chunks: int, *, seed: int, quality: str = "raw", provenance: str = "raw"
    ) -> Held:
        count = chunks * layout.chunk_tokens
        tokens = [seed + position for position in range(count)]
        kv = random_kv(layout, count, seed)
        refs = codec.chunk_refs(layout, tokens)
        blobs = [
            codec.encode(
                codec.token_slice(kv, ref.first_token, ref.first_token + ref.tokens), layout, quality=quality,
                first_position=ref.first_token, chunk_hash=ref.hash, provenance=provenance,
            )
            for ref in refs
        ]  # fmt: skip
        return cls(layout, tokens, kv, refs, blobs)

    def status(self, index: int, **lies: int) -> kv_objects.ChunkStatus:
        header = codec.parse_header(self.blobs[index])
        honest: dict[str, Any] = {
            "tokens": header.tokens, "quality": int(header.quality), "provenance": int(header.provenance),
            "stored_bytes": len(self.blobs[index]), "tier": pb.TIER_HOST,
        }  # fmt: skip
        return kv_objects.ChunkStatus(**(honest | lies))

    def lookup(self, request: pb.LookupRequest, context: Context) -> pb.LookupResponse:
        return kv_objects.answer_of(map(self.status, range(self._asked(request.chunk_hashes))))

    def fetch(self, request: pb.FetchRequest, context: Context) -> Iterator[Answer]:
        for index in range(self._asked(request.chunk_hashes)):
            yield from pieces(index, self.blobs[index])

    def _asked(self, hashes: bytes) -> int:
        """How many of the hashes asked for are a prefix of the prompt's."""
        asked = [hashes[at : at + 32] for at in range(0, len(hashes), 32)]
        same = (mine.hash == theirs for mine, theirs in zip(self.refs, asked, strict=False))
        return next((index for index, equal in enumerate(same) if not equal), min(len(asked), len(self.refs)))


def pieces(
    index: int, blob: bytes, *, size: int = DATA_BYTES_MAX, object_bytes: int | None = None
) -> Iterator[Framed[pb.FetchResponse]]:
    """An object as a fetch sends it. `object_bytes`: what is declared, if not the truth."""
    declared = len(blob) if object_bytes is None else object_bytes
    for offset in range(0, len(blob), size):
        head = pb.FetchResponse(chunk_index=index, offset=offset, object_bytes=0 if offset else declared)
        yield Framed(head, blob[offset : offset + size])


def holds_nothing(request: pb.LookupRequest, context: Context) -> pb.LookupResponse:
    return pb.LookupResponse()


def receive_data(requests: Iterator[Framed[pb.PutRequest]]) -> int:
    """Bytes of a put's data, read up to its commit."""
    received = 0
    for request in requests:
        if request.head.WhichOneof("kind") == "commit":
            break
        received += len(request.data)
    return received


def verdicts(given: Iterable[int]) -> pb.PutResponse:
    return pb.PutResponse(verdicts=pb.PutVerdicts(verdicts=given))  # type: ignore[arg-type]


def results(given: Iterable[int]) -> pb.PutResponse:
    outcomes = [pb.ObjectResult(outcome=outcome) for outcome in given]  # type: ignore[arg-type]
    return pb.PutResponse(results=pb.PutResults(results=outcomes))


def takes_all(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
    count = len(next(requests).head.offer.objects)
    yield verdicts([pb.VERDICT_SEND] * count)
    receive_data(requests)
    yield results([pb.OUTCOME_STORED] * count)


def hang(context: Context) -> None:
    """Until the other side ends the call."""
    ended = threading.Event()
    if context.add_callback(ended.set):
        ended.wait(HANG_S_MAX)


def never(request: Any, context: Context) -> pb.LookupResponse:
    """A lookup that is not answered while the other side waits."""
    hang(context)
    return pb.LookupResponse()


class HostileServer:
    """Listens at `address` until the `with` block ends. `calls` counts what was called."""

    def __init__(
        self, *, lookup: Lookup = holds_nothing, fetch: Fetch | None = None, put: Put = takes_all,
        delete: Delete = lambda request, context: pb.DeleteResponse(),
        stat: Stat = lambda request, context: pb.StatResponse(), connect: Connect | None = None,
        renew: Renew = lambda request, context: pb.RenewResponse(),
    ) -> None:  # fmt: skip
        self.calls: list[str] = []
        self._server = grpc.server(ThreadPoolExecutor(CALLS_MAX, "hostile-server"), options=CHANNEL_OPTIONS)
        self._server.add_generic_rpc_handlers((
            grpc.method_handlers_generic_handler("kvstore.v1.Store", {
                "Lookup": grpc.unary_unary_rpc_method_handler(
                    self._counted("Lookup", lookup), pb.LookupRequest.FromString, wire
                ),
                "Fetch": grpc.unary_stream_rpc_method_handler(
                    self._counted("Fetch", fetch or _fetches_nothing), pb.FetchRequest.FromString, wire
                ),
                "Put": grpc.stream_stream_rpc_method_handler(
                    self._counted("Put", put), framing.parse_put_request, wire
                ),
                "Delete": grpc.unary_unary_rpc_method_handler(
                    self._counted("Delete", delete), pb.DeleteRequest.FromString, wire
                ),
                "Renew": grpc.unary_unary_rpc_method_handler(
                    self._counted("Renew", renew), pb.RenewRequest.FromString, wire
                ),
                "Stat": grpc.unary_unary_rpc_method_handler(
                    self._counted("Stat", stat), pb.StatRequest.FromString, wire
                ),
            }),
        ))  # fmt: skip
        if connect is not None:
            self._server.add_generic_rpc_handlers((
                grpc.method_handlers_generic_handler("kvstore.v1.Transfer", {
                    "Connect": grpc.unary_unary_rpc_method_handler(
                        self._counted("Connect", connect), transfer_pb2.ConnectRequest.FromString, wire
                    ),
                }),
            ))  # fmt: skip
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(None).wait()

    def _counted(self, name: str, behaviour: Callable[[Any, Context], Any]) -> Callable[[Any, Context], Any]:
        def answer(request: Any, context: Context) -> Any:
            self.calls.append(name)
            return behaviour(request, context)

        return answer


def _fetches_nothing(request: pb.FetchRequest, context: Context) -> Sequence[Answer]:
    return ()


def wire(answer: Answer) -> bytes:
    if isinstance(answer, bytes):
        return answer
    if isinstance(answer, Framed):
        return framing.serialize(answer)
    return answer.SerializeToString()
