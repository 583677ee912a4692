"""An object that is verified while it arrives is found to be what `verify` finds it to be."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from kv_objects import chunks, small_layout

import kvstore_codec as codec

CUTS = 5
Found = codec.ObjectInfo | tuple[type[codec.ObjectError], codec.ErrorCode, str]


def whole(data: bytes) -> Found:
    try:
        return codec.verify(data)
    except codec.ObjectError as error:
        return type(error), error.code, str(error)


def arrived(data: bytes, ends: list[int]) -> Found:
    """What is found when the object comes in pieces that end there. What has not come yet is other than it will be."""
    buffer = np.full(len(data), 0xA5, np.uint8)
    arriving = codec.Arriving(buffer.data)
    found = None
    for start, end in pairwise([0, *ends, len(data)]):
        buffer[start:end] = np.frombuffer(data, np.uint8)[start:end]
        try:
            found = arriving.to(end)
        except codec.ObjectError as error:
            return type(error), error.code, str(error)
        assert (found is None) == (end < len(data))
    assert found is not None
    return found


def cuts(rng: random.Random, size: int) -> list[int]:
    return sorted(rng.sample(range(1, size), min(CUTS, size - 1)))


@pytest.fixture(
    params=[("raw", 2), ("lossless", 2), ("high", 2), ("raw", 40)], ids=lambda param: f"{param[0]}-{param[1]}"
)
def blob(request: pytest.FixtureRequest) -> bytes:
    """One segment a quality layer, and at last several."""
    quality, layers = request.param
    return chunks(small_layout(layers=layers, head_dim=16 if layers == 2 else 128), 1, seed=3, quality=quality)[0].blob


def test_an_intact_object_in_any_pieces(blob: bytes) -> None:
    rng = random.Random(1)
    assert isinstance(whole(blob), codec.ObjectInfo)
    for _ in range(50):
        assert arrived(blob, cuts(rng, len(blob))) == whole(blob)
    assert arrived(blob, list(range(1, min(len(blob), 2000)))) == whole(blob)


def test_a_damaged_object_in_any_pieces(blob: bytes) -> None:
    rng = random.Random(2)
    for at in [*range(codec.HEADER_BYTES + 64), *rng.sample(range(len(blob)), 200), len(blob) - 1]:
        damaged = bytearray(blob)
        damaged[at] ^= 1 << rng.randrange(8)
        assert not isinstance(whole(bytes(damaged)), codec.ObjectInfo)
        assert arrived(bytes(damaged), cuts(rng, len(blob))) == whole(bytes(damaged)), at


def test_an_object_of_another_length(blob: bytes) -> None:
    rng = random.Random(3)
    for size in [1, 2, codec.HEADER_BYTES - 1, codec.HEADER_BYTES, codec.HEADER_BYTES + 1, len(blob) - 1]:
        assert arrived(blob[:size], cuts(rng, size)) == whole(blob[:size])
    assert arrived(blob + b"x", cuts(rng, len(blob))) == whole(blob + b"x")


def test_a_prefix_of_lower_quality() -> None:
    blob = chunks(small_layout(), 1, seed=3, quality="high")[0].blob
    prefix = bytes(codec.truncate(blob, "low"))
    assert len(prefix) < len(blob)
    assert arrived(prefix, cuts(random.Random(4), len(prefix))) == whole(prefix)


def test_a_damaged_segment_is_known_before_the_rest_has_come() -> None:
    blob = bytearray(chunks(small_layout(), 1, seed=3, quality="high")[0].blob)
    first, second, *_ = codec.inspect(blob).segments
    blob[first.offset] ^= 1
    arriving = codec.Arriving(memoryview(blob))
    with pytest.raises(codec.DamagedObject):
        arriving.to(second.offset)
