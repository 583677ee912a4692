"""Raw objects of many chunks into one array: what `decode` writes, whole or in pieces; or nothing of them is read."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_strategies import bits, layouts, random_kv
from scattered import HOWS, scattered

import kvstore_codec as codec
from kvstore_codec import Quality, _native, arrays, container
from kvstore_codec.container import HEADER_BYTES
from kvstore_codec.raw_chunks import RawChunkReader, RawChunks

LAYOUT = codec.KVLayout.uniform(
    model="m", revision="r", num_layers=3, kv_heads=12, head_dim=128, dtype="float16", chunk_tokens=32
)  # fmt: skip


def objects(
    layout: codec.KVLayout, kv: Any, tokens: int, *, first: int = 0, provenance: str = "raw", part: int = 0
) -> tuple[list[codec.ChunkRef], list[memoryview]]:
    """Of all chunks of a prompt from `first` on, whose KV begins there too."""
    refs = [ref for ref in codec.chunk_refs(layout, np.arange(tokens), tail=True) if ref.first_token >= first]
    blobs = [
        codec.encode(
            codec.token_slice(kv, ref.first_token - first, ref.first_token - first + ref.tokens), layout,
            quality="raw", first_position=ref.first_token, chunk_hash=ref.hash, provenance=provenance, part=part,
        )
        for ref in refs
    ]  # fmt: skip
    return refs, [memoryview(blob) for blob in blobs]


def feed(reader: RawChunkReader, blob: memoryview, sizes: list[int], room: int) -> bool:
    """As a receiver does: what was left over comes again, before as many bytes as the next of `sizes`."""
    here, left, turn = memoryview(b""), blob, 0
    while len(left) and not reader.done and not reader.other:
        some = min(len(left), room if len(here) else sizes[turn % len(sizes)])
        here, left, turn = memoryview(bytes(here) + bytes(left[:some])), left[some:], turn + 1
        here = here[reader.take(here) :]
    return reader.done


@pytest.mark.parametrize("how", ["as it is", *HOWS])
@given(layout=layouts(), tokens=st.integers(1, 100), seed=st.integers(0, 2**32 - 1), data=st.data())
@settings(deadline=None, max_examples=15)
def test_chunks_are_read_into_any_memory(
    how: str, layout: codec.KVLayout, tokens: int, seed: int, data: st.DataObject
) -> None:
    kv = random_kv(layout, tokens, seed)
    refs, blobs = objects(layout, kv, tokens)
    for pieces in (False, True):
        target = (
            codec.empty(layout, tokens) if how == "as it is" else scattered(codec.empty(layout, tokens), layout, how)
        )
        chunks = RawChunks(target, layout, 0, Quality.RAW, 0)
        assert [len(blob) for blob in blobs] == [chunks.object_bytes(ref.tokens) for ref in refs]
        if pieces:
            sizes = data.draw(st.lists(st.integers(1, 3000), min_size=1, max_size=5))
            assert all(
                feed(chunks.reader(ref), blob, sizes, chunks.piece_bytes_min)
                for ref, blob in zip(refs, blobs, strict=True)
            )
        else:
            assert chunks.read(blobs, refs) == len(refs)
        found = arrays.planes(target, layout)
        assert [arrays.read(plane).tobytes() for plane in found] == [
            np.ascontiguousarray(plane).tobytes() for plane in arrays.planes(kv, layout)
        ]


def test_a_window_begins_where_it_is_told_to_and_others_are_left_alone() -> None:
    kv = random_kv(LAYOUT, 96, 1)
    refs, blobs = objects(LAYOUT, kv, 128, first=32)
    target = np.zeros_like(codec.empty(LAYOUT, 200))
    chunks = RawChunks(target, LAYOUT, 0, Quality.LOW, 32)
    assert chunks.read(blobs[1:2], refs[1:2]) == 1
    assert bits(target[:, :, 32:64]) == bits(kv[:, :, 32:64])
    assert not target[:, :, :32].any()
    assert not target[:, :, 64:].any()
    earlier = replace(refs[0], first_token=0)
    for outside in (earlier, replace(refs[0], first_token=32 + 190), replace(refs[0], hash=b"short")):
        with pytest.raises((ValueError, TypeError)):
            chunks.read(blobs[:1], [outside])
        with pytest.raises((ValueError, TypeError)):
            chunks.reader(outside)


def test_parts_are_read_as_their_own() -> None:
    layout = replace(LAYOUT, partition=codec.Partition(layer_groups=3))
    kv = random_kv(layout.part_layout(1), 64, 1)
    refs, blobs = objects(layout, kv, 64, part=1)
    target = codec.empty(layout.part_layout(1), 64)
    assert RawChunks(target, layout, 1, Quality.LOW, 0).read(blobs, refs) == 2
    assert bits(target) == bits(kv)
    assert RawChunks(target, layout, 2, Quality.LOW, 0).read(blobs, refs) == 0


def test_prompts_longer_than_any_object_are_read() -> None:
    layout = codec.KVLayout.uniform(model="m", revision="r", num_layers=1, kv_heads=1, head_dim=4, chunk_tokens=2048)
    kv = random_kv(layout, 70_000, 1)
    refs, blobs = objects(layout, kv, 70_000)
    pages = scattered(codec.empty(layout, 70_000), layout, "pages")
    for target in (codec.empty(layout, 70_000), pages):
        assert RawChunks(target, layout, 0, Quality.RAW, 0).read(blobs, refs) == len(refs)
        assert b"".join(arrays.read(plane).tobytes() for plane in arrays.planes(target, layout)) == bits(kv)


@pytest.mark.parametrize(("floor", "read"), [("raw", 0), ("high", 0), ("medium", 2), ("low", 2)])
def test_a_worse_provenance_than_the_floor_is_not_read(floor: str, read: int) -> None:
    refs, blobs = objects(LAYOUT, random_kv(LAYOUT, 64, 1), 64, provenance="medium")
    assert RawChunks(codec.empty(LAYOUT, 64), LAYOUT, 0, Quality.parse(floor), 0).read(blobs, refs) == read


def test_what_begins_otherwise_touches_nothing() -> None:
    """Every byte of header and table, damaged; and with checksums that hold, as who lies writes them."""
    refs, blobs = objects(LAYOUT, random_kv(LAYOUT, 32, 1), 32)
    target = np.zeros_like(codec.empty(LAYOUT, 32))
    chunks = RawChunks(target, LAYOUT, 0, Quality.LOW, 0)
    head_bytes = codec.parse_header(blobs[0]).table_end
    checksums = {*range(168, 176), *range(184, 192)}
    entries = range(HEADER_BYTES, head_bytes)
    payload_checksums = {at for at in entries if (at - HEADER_BYTES) % 24 >= 16}
    for at in range(head_bytes):
        for sealed in (False, True):
            changed = bytearray(blobs[0])
            changed[at] ^= 0x80
            if sealed:
                if at in checksums | payload_checksums:
                    continue
                changed[168:176] = xxhash.xxh3_64_intdigest(changed[HEADER_BYTES:head_bytes]).to_bytes(8, "little")
                changed[184:192] = xxhash.xxh3_64_intdigest(changed[:184]).to_bytes(8, "little")
            assert chunks.read([memoryview(changed)], refs) == 0, (at, sealed)
            reader = chunks.reader(refs[0])
            assert reader.take(memoryview(changed)) == 0
            assert reader.other
            assert reader.take(blobs[0]) == 0, "for good"
    assert not target.any()
    assert chunks.read([blobs[0][:-1]], refs) == 0
    assert chunks.read([memoryview(bytes(blobs[0]) + b"x")], refs) == 0
    assert chunks.read([blobs[0][:100]], refs) == 0
    assert chunks.read(blobs, refs) == 1


def test_another_grouping_of_segments_is_for_decode() -> None:
    """All planes in one segment: a valid object, of another encoder."""
    kv = random_kv(LAYOUT, 32, 1)
    refs, blobs = objects(LAYOUT, kv, 32)
    header = codec.parse_header(blobs[0])
    payload = bytes(blobs[0][header.table_end :])
    table = struct.pack("<BBHHHQQ", 0, 3, 0, 3, 0, len(payload), xxhash.xxh3_64_intdigest(payload))
    head = container.header_bytes(header, [HEADER_BYTES + len(table) + len(payload)], table)
    other = memoryview(head + table + payload)
    assert bits(codec.decode(other, LAYOUT)) == bits(kv)
    assert RawChunks(codec.empty(LAYOUT, 32), LAYOUT, 0, Quality.LOW, 0).read([other], refs) == 0


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_damage_ends_what_is_read_and_names_the_layer(bad: int) -> None:
    kv = random_kv(LAYOUT, 96, 1)
    refs, blobs = objects(LAYOUT, kv, 96)
    segments = codec.inspect(blobs[bad]).segments
    assert {segment.layer_first for segment in segments} == {0, 1, 2}
    for segment in segments:
        changed = bytearray(blobs[bad])
        changed[segment.offset + segment.length - 1] ^= 1
        damaged = [*blobs[:bad], memoryview(changed), *blobs[bad + 1 :]]
        target = codec.empty(LAYOUT, 96)
        chunks = RawChunks(target, LAYOUT, 0, Quality.LOW, 0)
        assert chunks.read(damaged, refs) == bad
        assert bits(target[:, :, : 32 * bad]) == bits(kv[:, :, : 32 * bad])
        with pytest.raises(codec.DamagedObject, match=f"checksum.*layer={segment.layer_first}"):
            feed(chunks.reader(refs[bad]), memoryview(changed), [700], chunks.piece_bytes_min)


def test_out_that_does_not_fit_is_refused() -> None:
    with pytest.raises(codec.LayoutError):
        RawChunks(np.zeros((1, 2, 32, 12, 128), np.float16), LAYOUT, 0, Quality.LOW, 0)
    fixed = codec.empty(LAYOUT, 32)
    fixed.flags.writeable = False
    with pytest.raises(codec.LayoutError, match="read-only"):
        RawChunks(fixed, LAYOUT, 0, Quality.LOW, 0)
    plane: Any = np.zeros((3, 2, 32, 12, 128), np.uint16)
    for provenance in (-1, 256):
        with pytest.raises(ValueError, match="provenance"):
            _native.RawChunks(plane, 2, provenance, 0)
