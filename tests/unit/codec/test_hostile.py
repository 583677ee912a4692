"""Bytes from strangers: a typed error or the exact result, never a crash, a hang, or memory by a forged number."""

from __future__ import annotations

import contextlib
import random
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xxhash
from coders import EVERY, NATIVE
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_strategies import bits, layouts, random_kv

import kvstore_codec as codec
from kvstore_codec.container import HEADER_BYTES, SEGMENT_ENTRY_BYTES

LAYOUT = codec.KVLayout.uniform(
    model="m", revision="r", num_layers=2, kv_heads=2, head_dim=16, chunk_tokens=32, rope=codec.RoPE(10000.0)
)
KV = random_kv(LAYOUT, 32, 1)
OBJECTS = {quality: codec.encode(KV, LAYOUT, quality=quality) for quality in ("raw", "lossless", "high")}
DECODED = {quality: bits(codec.decode(blob, LAYOUT)) for quality, blob in OBJECTS.items()}
CODERS = list(EVERY.values())
WIDE = codec.KVLayout.uniform(
    model="m", revision="r", num_layers=2, kv_heads=3, head_dim=48, dtype="float32", chunk_tokens=64
)
WIDE_OBJECTS = {
    quality: codec.encode(random_kv(WIDE, 64, 5), WIDE, quality=quality) for quality in ("low", "medium", "high")
}


def resealed(blob: bytes) -> bytes:
    """The object with every checksum made right again, as a hostile writer would."""
    data = bytearray(blob)
    segments = int.from_bytes(data[160:164], "little")
    table_end = HEADER_BYTES + segments * SEGMENT_ENTRY_BYTES
    at = table_end
    for entry in range(HEADER_BYTES, min(table_end, len(data) - SEGMENT_ENTRY_BYTES), SEGMENT_ENTRY_BYTES):
        length = int.from_bytes(data[entry + 8 : entry + 16], "little")
        data[entry + 16 : entry + 24] = xxhash.xxh3_64_intdigest(data[at : at + length]).to_bytes(8, "little")
        at += length
    data[168:176] = xxhash.xxh3_64_intdigest(data[HEADER_BYTES:table_end]).to_bytes(8, "little")
    data[184:192] = xxhash.xxh3_64_intdigest(data[:184]).to_bytes(8, "little")
    return bytes(data)


def read(blob: bytes, layout: codec.KVLayout = LAYOUT, coder: Any = CODERS[0]) -> bytes | None:
    """Decoded bits, or None where a typed ObjectError said no."""
    try:
        return bits(codec.decode(blob, layout, coder=coder))
    except codec.ObjectError:
        return None


@pytest.mark.parametrize("quality", OBJECTS)
def test_every_single_flipped_bit_of_the_header_and_table_is_found(quality: str) -> None:
    blob = OBJECTS[quality]
    for bit in range(8 * (HEADER_BYTES + 4 * SEGMENT_ENTRY_BYTES)):
        data = bytearray(blob)
        data[bit // 8] ^= 1 << bit % 8
        assert read(bytes(data)) is None


@given(st.sampled_from(list(OBJECTS)), st.data())
def test_flipped_bits_anywhere_are_found(quality: str, data: st.DataObject) -> None:
    blob = bytearray(OBJECTS[quality])
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] ^= data.draw(st.integers(1, 255))
    if bytes(blob) != OBJECTS[quality]:
        assert read(bytes(blob)) is None
        with pytest.raises(codec.ObjectError):
            codec.verify(bytes(blob))


@pytest.mark.parametrize("quality", OBJECTS)
def test_every_truncation_is_found_or_is_a_lower_quality(quality: str) -> None:
    blob = OBJECTS[quality]
    ends = set(codec.parse_header(blob).layer_bytes)
    for length in range(len(blob)):
        if length in ends:
            codec.verify(blob[:length])
        else:
            with pytest.raises(codec.ObjectError):
                codec.verify(blob[:length])
            assert read(blob[:length]) is None
    assert read(blob + b"\0") is None


@given(st.sampled_from(list(OBJECTS)), st.randoms(use_true_random=False), st.sampled_from(CODERS))
@settings(deadline=None, max_examples=400)
def test_forged_payloads_with_right_checksums(quality: str, rng: random.Random, coder: Any) -> None:
    """Past the checksums: whatever the payload says, decoding ends, and all coders say the same."""
    data = bytearray(OBJECTS[quality])
    start = HEADER_BYTES + SEGMENT_ENTRY_BYTES * codec.parse_header(bytes(data)).segments
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(start, len(data))
        if rng.random() < 0.5:
            at = rng.randrange(start, min(start + 200, len(data)))
        data[at : at + rng.choice([1, 2, 4])] = rng.randbytes(1) * 1 if rng.random() < 0.5 else b"\xff"
    forged = resealed(bytes(data))
    results = [read(forged, coder=each) for each in CODERS]
    assert all(result == results[0] for result in results)


FIELDS = [
    (6, "<H"), (76, "<I"), (80, "<Q"), (88, "<B"), (89, "<B"), (90, "<B"), (91, "<B"), (92, "<B"), (93, "<B"),
    (94, "<H"), (128, "<Q"), (136, "<Q"), (144, "<Q"), (152, "<Q"), (160, "<I"), (164, "<I"), (176, "<Q"),
    *[(HEADER_BYTES + at, code) for at, code in [(0, "<B"), (1, "<B"), (2, "<H"), (4, "<H"), (6, "<H"), (8, "<Q")]],
]  # fmt: skip


@pytest.mark.parametrize("quality", OBJECTS)
@pytest.mark.parametrize(("offset", "code"), FIELDS)
def test_forged_fields_with_right_checksums(quality: str, offset: int, code: str) -> None:
    """Every number of the header and table, forged to every edge: refused, or the exact result."""
    blob = OBJECTS[quality]
    (was,) = struct.unpack_from(code, blob, offset)
    top = 256 ** struct.calcsize(code) - 1
    tracemalloc.start()
    for value in {0, 1, 2, 3, 4, 5, 15, 16, 31, 33, 255, 1 << 15, 1 << 31, 1 << 63, top, top - 1, was + 1, was - 1}:
        if value == was or not 0 <= value <= top:
            continue
        data = bytearray(blob)
        struct.pack_into(code, data, offset, value)
        result = read(resealed(bytes(data)))
        # first_position (80) and provenance (92) may be anything: they change meaning, not structure
        assert result is None or offset in (80, 92), (offset, value)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * len(OBJECTS["raw"])


@given(st.binary(max_size=600))
def test_random_bytes(data: bytes) -> None:
    for function in (codec.verify, codec.inspect, codec.parse_header, lambda b: codec.truncate(b, "low"), read):
        reader: Callable[[bytes], Any] = function
        with contextlib.suppress(codec.ObjectError):
            assert reader(data) is None


@given(layouts(), st.integers(0, 2**32), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=150)
def test_forged_payloads_of_any_layout(layout: codec.KVLayout, seed: int, rng: random.Random) -> None:
    kv = random_kv(layout, rng.randint(1, 16), seed)
    blob = codec.encode(kv, layout, quality=rng.choice(["high", "lossless"]), first_position=rng.choice([0, 50]))
    data = bytearray(blob)
    start = HEADER_BYTES + SEGMENT_ENTRY_BYTES * codec.parse_header(blob).segments
    for _ in range(rng.randint(1, 20)):
        data[rng.randrange(start, len(data))] = rng.randrange(256)
    forged = resealed(bytes(data))
    results = [read(forged, layout, coder) for coder in CODERS]
    assert all(result == results[0] for result in results)


@given(st.randoms(use_true_random=False), st.sampled_from(["low", "medium", "high"]))
@settings(deadline=None, max_examples=60)
def test_forged_payloads_of_whole_blocks(rng: random.Random, quality: str) -> None:
    """Enough lanes and words that vector code runs to a stream's last steps, wherever the forgery ends it."""
    blob = WIDE_OBJECTS[quality]
    data = bytearray(blob)
    start = HEADER_BYTES + SEGMENT_ENTRY_BYTES * codec.parse_header(blob).segments
    for _ in range(rng.randint(1, 6)):
        data[rng.randrange(start, len(data))] = rng.choice([0, 255, rng.randrange(256)])
    forged = resealed(bytes(data))
    assert len({read(forged, WIDE, coder) for coder in NATIVE.values()}) == 1


def test_a_table_cannot_claim_more_planes_than_there_are() -> None:
    """Many segments that each claim thousands of layers must not be written out one by one."""
    segments = 20_000
    body = b"".join(struct.pack("<BBHHHQQ", 0, 3, 0, 4096, 0, 0, 0) for _ in range(segments))
    header = bytearray(OBJECTS["raw"][:HEADER_BYTES])
    struct.pack_into("<H", header, 94, 4096)
    struct.pack_into("<Q", header, 136, HEADER_BYTES + len(body) + 1)
    struct.pack_into("<I", header, 160, segments)
    blob = resealed(bytes(header) + body + b"x")
    with pytest.raises(codec.DamagedObject, match="every plane once"):
        codec.inspect(blob)


def test_decoding_into_out_leaves_other_memory_alone() -> None:
    frame = np.full((2, 2, 96, 2, 16), 7, dtype=KV.dtype)
    for blob in OBJECTS.values():
        codec.decode(blob, LAYOUT, out=frame[:, :, 32:64])
    outside = np.concatenate([frame[:, :, :32], frame[:, :, 64:]], axis=2).astype(np.float32)
    assert (outside == 7).all()
