"""Raw objects on every instruction set: the bytes of plain NumPy, the library's XXH3, wherever the memory lies."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_strategies import bits, layouts, random_kv
from scattered import HOWS, scattered

import kvstore_codec as codec
from kvstore_codec import _native, arrays, container, raw
from kvstore_codec.container import HEADER_BYTES

ISAS = list(raw.INSTRUCTION_SETS.values())
#: Around every border of XXH3: its short forms, blocks, what is held back; and where copies go around the caches.
LENGTHS = [*range(1, 300), 511, 512, 513, *range(1015, 1095), 2047, 2048, 2049, 8191, 8193, 70001, (1 << 19) + 5]
OK, CHECKSUM, LENGTH = 0, 14, 13


def table_of(length: int, kv: int = 3) -> bytes:
    return struct.pack("<BBHHHQQ", 0, kv, 0, 1, 0, length, 0)


@pytest.mark.parametrize("isa", ISAS)
def test_checksums_are_the_library_s_for_every_length(isa: int) -> None:
    """K and V of one layer, of bytes: their lengths together are the payload's."""
    rng = np.random.default_rng(1)
    for length in LENGTHS:
        v_bytes = int(rng.integers(0, min(length, 1200)))
        k, v = (rng.integers(0, 256, (1, 1, size), np.uint8) for size in (length - v_bytes, v_bytes))
        head: Any = bytes(HEADER_BYTES) + table_of(length)
        blob = _native.RawPlanes([k, v], 1, isa).seal(head, 1)
        room: Any = bytearray(len(blob))
        _native.RawPlanes([k, v], 1, isa).seal_into(room, head, 1)
        assert room == blob
        payload: Any = blob[HEADER_BYTES + 24 :]
        table: Any = blob[HEADER_BYTES : HEADER_BYTES + 24]
        assert payload == k.tobytes() + v.tobytes()
        assert int.from_bytes(table[16:], "little") == xxhash.xxh3_64_intdigest(payload), length
        assert int.from_bytes(blob[168:176], "little") == xxhash.xxh3_64_intdigest(table)
        assert int.from_bytes(blob[184:192], "little") == xxhash.xxh3_64_intdigest(blob[:184])
        found = np.zeros_like(k), np.zeros_like(v)
        planes = _native.RawPlanes(list(found), 1, isa)
        assert planes.write(table, payload)[0] == OK
        assert (found[0].tobytes(), found[1].tobytes()) == (k.tobytes(), v.tobytes())
        damaged: Any = bytes([payload[0] ^ 1]) + payload[1:]
        assert planes.write(table, damaged) == (CHECKSUM, 0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("how", HOWS)
@given(layout=layouts(), tokens=st.integers(1, 16), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=15)
def test_any_memory_is_read_and_written(isa: int, how: str, layout: codec.KVLayout, tokens: int, seed: int) -> None:
    kv = random_kv(layout, tokens, seed)
    blob = codec.encode(kv, layout, quality="raw")
    header, part = codec.parse_header(blob), layout.part_layout(0)
    assert codec.verify(blob).header == header
    payload = b"".join(np.ascontiguousarray(plane).tobytes() for plane in arrays.planes(kv, part))
    assert len(payload) == header.raw_bytes
    source = arrays.places(scattered(kv, part, how), part)
    assert raw.encode(source, part, header, isa) == blob
    target = scattered(codec.empty(part, tokens), part, how)
    raw.decode(memoryview(blob), header, arrays.places_to_write(target, part), part, isa)
    assert b"".join(arrays.read(plane).tobytes() for plane in arrays.planes(target, part)) == payload
    assert bits(codec.decode(blob, layout)) == bits(kv)


@pytest.mark.parametrize("isa", ISAS)
def test_large_objects_and_small_ones_are_alike(isa: int) -> None:
    """Around the caches or not, to aligned memory or not, rows in pieces or whole."""
    layout = codec.KVLayout.uniform(model="m", revision="r", num_layers=2, kv_heads=8, head_dim=64, chunk_tokens=2048)
    for tokens in (40, 700):
        kv = random_kv(layout, tokens, tokens)
        blob = codec.encode(kv, layout, quality="raw")
        header, last = codec.parse_header(blob), bytearray(blob)
        assert blob[header.table_end :] == kv.tobytes()
        for how in HOWS:
            target = scattered(codec.empty(layout, tokens), layout, how)
            places = arrays.places_to_write(target, layout)
            raw.decode(memoryview(blob), header, places, layout, isa)
            assert b"".join(arrays.read(plane).tobytes() for plane in arrays.planes_of(places)) == kv.tobytes()
            last[-1] ^= 1
            with pytest.raises(codec.DamagedObject, match="checksum"):
                raw.decode(memoryview(last), header, places, layout, isa)
            last[-1] ^= 1


def test_tables_that_the_planes_do_not_fit_touch_nothing() -> None:
    plane = np.zeros((2, 1, 4), np.uint16)
    planes = _native.RawPlanes([plane, plane], 2, raw.BEST)
    payload: Any = b"\1" * 32
    bad = [
        table_of(31), table_of(16), table_of(2**63), table_of(32, kv=0), table_of(32, kv=4),
        struct.pack("<BBHHHQQ", 1, 3, 0, 1, 0, 32, 0), struct.pack("<BBHHHQQ", 0, 3, 1, 1, 0, 32, 0),
        struct.pack("<BBHHHQQ", 0, 3, 0, 0, 0, 32, 0), struct.pack("<BBHHHQQ", 0, 3, 65535, 65535, 0, 32, 0),
    ]  # fmt: skip
    for entry in bad:
        table: Any = entry
        assert planes.write(table, payload) == (LENGTH, 0)
        head: Any = bytes(HEADER_BYTES) + entry
        with pytest.raises(ValueError, match="does not fit"):
            planes.seal(head, 1)
        small: Any = bytearray(len(head) + 31)
        with pytest.raises(ValueError, match="another size"):
            planes.seal_into(small, head, 1)
    short: Any = payload[:31]
    good: Any = table_of(32)
    assert planes.write(good, short) == (LENGTH, 0)
    assert not plane.any()


def test_headers_and_structures_are_remembered_not_trusted() -> None:
    """What was read once is not taken for other bytes, however alike."""
    layout = codec.KVLayout.uniform(model="m", revision="r", num_layers=2, kv_heads=2, head_dim=16, chunk_tokens=32)
    blob = codec.encode(random_kv(layout, 32, 1), layout, quality="raw")
    assert container.parse_header(blob) is container.parse_header(bytearray(blob))
    for at in range(HEADER_BYTES + 24):
        flipped = bytearray(blob)
        flipped[at] ^= 1
        with pytest.raises(codec.ObjectError):
            codec.inspect(flipped)
