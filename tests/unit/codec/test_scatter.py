"""A raw object received straight into the caller's array: the same values as decoding, the same faults found."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import xxhash
from kv_strategies import bits, random_kv

import kvstore_codec as codec
from kvstore_codec import HEADER_BYTES, scatter
from kvstore_codec.scatter import RawDestination, raw_destination

TOKENS, HASH = 32, bytes(range(32))
LAYOUT = codec.KVLayout.uniform(
    model="m", revision="r", num_layers=3, kv_heads=8, head_dim=128, dtype="bfloat16", chunk_tokens=TOKENS
)
KV = random_kv(LAYOUT, TOKENS, 1)
BLOB = codec.encode(KV, LAYOUT, quality="raw", chunk_hash=HASH)
HEADER = codec.parse_header(BLOB)
HEAD, PAYLOAD = BLOB[: HEADER.table_end], BLOB[HEADER.table_end :]


def arrays_of(kind: str) -> tuple[Any, Any]:
    """(an array to receive into, the same memory as one array [layers, 2, tokens, heads, dim])."""
    whole = np.zeros((3, 2, 3 * TOKENS, 8, 128), KV.dtype)
    if kind == "part of an array":
        return whole[:, :, TOKENS : 2 * TOKENS], whole[:, :, TOKENS : 2 * TOKENS]
    if kind == "pairs":
        return [(layer[0], layer[1]) for layer in whole[:, :, :TOKENS]], whole[:, :, :TOKENS]
    pages = np.zeros((3, 2, 6, 16, 8, 128), KV.dtype)  # 6 pages of 16 tokens
    paged = codec.PagedKV([(layer[0], layer[1]) for layer in pages], [4, 0, 3], TOKENS, first_token=5)
    tokens = pages[:, :, [4, 0, 3]].reshape(3, 2, 48, 8, 128)
    assert kind == "pages"
    return paged, tokens[:, :, 5 : 5 + TOKENS]


def destination_of(out: Any, head: bytes = HEAD, layout: codec.KVLayout = LAYOUT) -> RawDestination:
    found = raw_destination(head, layout, out, chunk_hash=HASH)
    assert found is not None
    return found


def receive(destination: RawDestination, payload: bytes, seed: int = 1) -> None:
    """In pieces of any size, as a socket gives them, verifying on the way."""
    rng, at = random.Random(seed), 0
    while at < len(payload):
        last = min(len(payload), at + rng.choice([1, 100, 5000, 20000, len(payload)]))
        for buffer in destination.buffers(at, last):
            buffer[:] = payload[at : at + len(buffer)]
            at += len(buffer)
        assert at == last
        destination.verify(at)


@pytest.mark.parametrize("kind", ["part of an array", "pairs", "pages"])
def test_what_is_received_is_what_decoding_gives(kind: str) -> None:
    out, _ = arrays_of(kind)
    destination = destination_of(out)
    assert (destination.header, destination.payload_bytes) == (HEADER, len(PAYLOAD))
    assert not destination.verified
    receive(destination, PAYLOAD)
    assert destination.verified
    destination.verify()
    copy, plain = arrays_of(kind)
    codec.decode(BLOB, LAYOUT, out=copy)
    if kind == "pages":
        for (k, v), (other_k, other_v) in zip(out.caches, copy.caches, strict=True):
            assert bits(k) == bits(other_k)
            assert bits(v) == bits(other_v)
    else:
        assert bits(np.array(list(out))) == bits(KV) == bits(plain)


def test_pieces_are_the_payload_in_order() -> None:
    out, _ = arrays_of("pages")
    pieces = destination_of(out).pieces
    assert [at for at, _ in pieces] == [sum(len(each) for _, each in pieces[:n]) for n in range(len(pieces))]
    assert sum(len(piece) for _, piece in pieces) == len(PAYLOAD)


@pytest.mark.parametrize("at", [0, 1, len(PAYLOAD) // 2, len(PAYLOAD) - 1])
def test_a_flipped_bit_anywhere_is_found(at: int) -> None:
    out, _ = arrays_of("part of an array")
    destination = destination_of(out)
    damaged = bytearray(PAYLOAD)
    damaged[at] ^= 1
    with pytest.raises(codec.DamagedObject, match="checksum"):
        receive(destination, bytes(damaged))
    assert not destination.verified


def test_bytes_that_never_came_are_found() -> None:
    out, _ = arrays_of("part of an array")
    destination = destination_of(out)
    with pytest.raises(codec.DamagedObject, match="checksum"):
        destination.verify()


def test_what_is_better_decoded_is_not_received_in_place() -> None:
    out, _ = arrays_of("part of an array")
    lossless = codec.encode(KV, LAYOUT, quality="lossless", chunk_hash=HASH)
    assert raw_destination(lossless, LAYOUT, out, chunk_hash=HASH) is None
    by_heads = np.zeros((3, 2, 8, TOKENS, 128), KV.dtype).transpose(0, 1, 3, 2, 4)
    assert raw_destination(HEAD, LAYOUT, by_heads, chunk_hash=HASH) is None
    backwards = np.zeros((3, 2, TOKENS, 8, 128), KV.dtype)[::-1]
    assert raw_destination(HEAD, LAYOUT, backwards, chunk_hash=HASH) is None
    tiny = codec.KVLayout.uniform(model="m", revision="r", num_layers=2, kv_heads=1, head_dim=16, chunk_tokens=16)
    blob = codec.encode(random_kv(tiny, 16, 1), tiny, quality="raw")
    assert len(blob) < 4 * scatter.RUN_BYTES_MIN
    assert raw_destination(blob, tiny, codec.empty(tiny, 32)[:, :, :16]) is None
    assert raw_destination(blob, tiny, codec.empty(tiny, 16)) is not None  # the payload as it is


def test_planes_that_follow_one_another_are_one_run() -> None:
    whole = codec.empty(LAYOUT, TOKENS)
    assert [len(piece) for _, piece in destination_of(whole).pieces] == [len(PAYLOAD)]
    receive(destination_of(whole), PAYLOAD)
    assert bits(whole) == bits(KV)


def test_strangers_heads_are_refused() -> None:
    out, _ = arrays_of("part of an array")
    with pytest.raises(codec.ForeignObject):
        raw_destination(HEAD, LAYOUT, out, chunk_hash=bytes(32))
    with pytest.raises(codec.LayoutError, match="tokens"):
        raw_destination(HEAD, LAYOUT, codec.empty(LAYOUT, TOKENS - 1))
    for length in range(len(HEAD)):
        with pytest.raises(codec.DamagedObject):
            raw_destination(HEAD[:length], LAYOUT, out)
    for at in range(len(HEAD)):
        flipped = bytearray(HEAD)
        flipped[at] ^= 1
        with pytest.raises(codec.ObjectError):
            raw_destination(bytes(flipped), LAYOUT, out)


@pytest.mark.parametrize("changes", [{0: -1}, {0: 1 << 62}, {0: 2, 1: -2}, {0: 2**63, 1: -(2**63)}])
def test_lengths_that_are_not_the_planes_are_found(changes: dict[int, int]) -> None:
    """With checksums of table and header that are right: by the lengths' sum, or segment by segment."""
    assert HEADER.segments == 2
    out, _ = arrays_of("part of an array")
    head = bytearray(HEAD)
    for segment, change in changes.items():
        place = slice(HEADER_BYTES + 24 * segment + 8, HEADER_BYTES + 24 * segment + 16)
        head[place] = ((int.from_bytes(head[place], "little") + change) % 2**64).to_bytes(8, "little")
    head[168:176] = xxhash.xxh3_64_intdigest(head[HEADER_BYTES:]).to_bytes(8, "little")
    head[184:192] = xxhash.xxh3_64_intdigest(head[:184]).to_bytes(8, "little")
    with pytest.raises(codec.DamagedObject, match="length"):
        destination_of(out, bytes(head)).verify()


def test_ranges_outside_the_payload_are_refused() -> None:
    out, _ = arrays_of("part of an array")
    destination = destination_of(out)
    for first, last in [(-1, 1), (2, 1), (0, len(PAYLOAD) + 1)]:
        with pytest.raises(ValueError, match="no \\["):
            destination.buffers(first, last)
    assert destination.buffers(7, 7) == []
