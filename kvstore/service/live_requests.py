"""Turns the Live service's requests into checked values, as `requests.py` does the Store's."""

from __future__ import annotations

from kvstore.engine.live import Asked, LiveOpening, Piece
from kvstore.errors import InvalidRequest
from kvstore.service import requests
from kvstore_codec.layout import LAYERS_MAX
from kvstore_proto.v1 import live_pb2 as pb
from kvstore_proto.v1.framing import DATA_BYTES_MAX, Framed

WAIT_MS_MAX = 600_000


def opening(first: pb.LiveWriteRequest) -> LiveOpening:
    """What a live write opens with."""
    if first.WhichOneof("kind") != "open":
        raise InvalidRequest("a live write starts with its opening")
    opened = first.open
    if not 0 < opened.layers <= LAYERS_MAX:
        raise InvalidRequest(f"layers must be 1–{LAYERS_MAX}", layers=opened.layers)
    return LiveOpening(
        requests.namespace(opened.namespace_id), requests.part(opened.part),
        requests.some_hashes(opened.chunk_hashes), opened.layers,
        requests.quality(opened.quality), requests.quality(opened.provenance),
    )  # fmt: skip


def piece(message: Framed[pb.LiveWriteRequest]) -> Piece:
    """A message after the opening."""
    if message.head.WhichOneof("kind") is not None:
        raise InvalidRequest("a live write is opened once, at its start")
    if not 0 < len(message.data) <= DATA_BYTES_MAX:
        raise InvalidRequest(f"a piece has 1–{DATA_BYTES_MAX} bytes of data", bytes=len(message.data))
    return Piece(message.head.layer, message.head.offset, tuple(message.head.object_bytes), message.data)


def asked(request: pb.FollowRequest) -> Asked:
    hashes = requests.some_hashes(request.chunk_hashes)
    if request.stored_chunks >= len(hashes):
        raise InvalidRequest("stored_chunks must be fewer than the chunks", stored_chunks=request.stored_chunks)
    return Asked(
        requests.namespace(request.namespace_id), requests.part(request.part), hashes, request.stored_chunks,
        requests.quality(request.min_quality),
    )  # fmt: skip


def wait_s(request: pb.FollowRequest) -> float:
    return min(request.wait_ms, WAIT_MS_MAX) / 1000
