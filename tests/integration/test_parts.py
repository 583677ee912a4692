"""Several parts of a layout as one: workers that hold different shares of a model's heads and layers read each other's
chunks."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kv_objects import small_layout
from kv_strategies import bits, random_kv

from kvstore_client import (
    AsyncPartsNamespace,
    Client,
    Hit,
    InvalidArgument,
    KVLayout,
    LayoutError,
    Lease,
    Partition,
    PutResult,
    Quality,
    Restored,
    Unavailable,
)
from kvstore_codec.arrays import PagedKV

TOKENS = list(range(80))  # five chunks
HEADS = 4


def layout_of(name: str, layer_groups: int, head_groups: int) -> KVLayout:
    base = small_layout(name, layers=4, head_dim=32)
    return replace(
        base, layers=tuple(replace(layer, kv_heads=HEADS) for layer in base.layers),
        partition=Partition(layer_groups, head_groups),
    )  # fmt: skip


def whole(seed: int = 1) -> Any:
    return random_kv(layout_of("any", 1, 1), len(TOKENS), seed)


@pytest.mark.parametrize("quality", ["raw", "lossless", "high"])
def test_one_worker_reads_what_two_wrote_and_two_what_one_wrote(client: Client, quality: str) -> None:
    layout, kv = layout_of(f"one-two {quality}", 1, 4), whole()
    for half in range(2):
        mine = client.parts(layout, [2 * half, 2 * half + 1])
        assert mine.put(TOKENS, kv[:, :, :, 2 * half : 2 * half + 2], quality=quality).stored == 5
    alone = client.parts(layout)
    assert alone.lookup(TOKENS).tokens == 80
    got, n = alone.get(TOKENS)
    assert n == 80
    assert quality == "high" or bits(got) == bits(kv)

    other = layout_of(f"two-one {quality}", 1, 2)
    assert client.parts(other).put(TOKENS, kv, quality=quality).stored == 5
    for half in range(2):
        part, n = client.namespace(other, part=half).get(TOKENS)
        again, m = client.parts(other, [half]).get(TOKENS)
        assert (n, m) == (80, 80)
        assert bits(part) == bits(again)
        assert quality == "high" or bits(part) == bits(kv[:, :, :, 2 * half : 2 * half + 2])


def test_layers_and_heads_cut_at_once_into_pages(client: Client) -> None:
    """A pipeline's stage of a tensor-parallel engine reads its own layers and heads, into pages of its own."""
    layout, kv = layout_of("pages", 2, 4), whole()
    assert client.parts(layout).put(TOKENS, kv, quality="raw").stored == 5
    caches = [(np.zeros((9, 16, 2, 32), np.float16), np.zeros((9, 16, 2, 32), np.float16)) for _ in range(2)]
    blocks = [7, 2, 5, 1, 8]
    room = PagedKV(caches, blocks[1:], 64)
    _, n = client.parts(layout, [6, 7]).get(TOKENS, out=room, first_token=16)
    assert n == 64
    got = np.stack([np.stack([plane[blocks[1:]].reshape(64, 2, 32) for plane in pair]) for pair in caches])
    assert bits(got) == bits(kv[2:, :, 16:, 2:])
    assert not any(plane[[0, 3, 4, 6, 7]].any() for pair in caches for plane in pair)
    pairs = [(pair[0], pair[1]) for pair in whole(2)[2:, :, :, 2:]]
    assert client.parts(layout, [6, 7]).put(range(100, 180), pairs, quality="lossless").tokens == 80
    assert client.parts(layout, [4, 5]).lookup(range(100, 180)).tokens == 0


def test_a_prefix_is_as_long_as_its_shortest_part(client: Client) -> None:
    layout, kv = layout_of("shortest", 1, 2), whole()
    cache = client.parts(layout)
    assert cache.put(TOKENS, kv, quality="lossless").rejected == 0
    client.namespace(layout, part=1).delete(TOKENS[48:])  # other hashes: nothing
    assert cache.lookup(TOKENS).tokens == 80
    client.namespace(layout, part=1).delete(TOKENS)
    assert cache.lookup(TOKENS).tokens == 0
    again = cache.put(TOKENS[:48], kv[:, :, :48], quality="lossless")
    assert (again.stored, again.have, again.tokens) == (3, 0, 48)
    hit = cache.lookup(TOKENS)
    assert (hit.tokens, len(hit.chunks)) == (48, 3)
    got, n = cache.get(TOKENS)
    assert n == 48
    assert bits(got) == bits(kv[:, :, :48])
    room = np.zeros_like(kv)  # one part of it comes to its end
    got, n = cache.get(TOKENS, out=room)
    assert n == 48
    assert bits(got) == bits(kv[:, :, :48])
    assert cache.put(TOKENS[:48], kv[:, :, :48], quality="lossless").have == 3


def test_a_chunk_is_as_good_as_its_worst_part(client: Client) -> None:
    layout, kv = layout_of("worst", 1, 2), whole()
    for part, quality, provenance in ((0, "high", "low"), (1, "medium", "raw")):
        half = kv[:, :, :, 2 * part : 2 * part + 2]
        assert client.namespace(layout, part=part).put(TOKENS, half, quality=quality, provenance=provenance).stored == 5
    found = [client.namespace(layout, part=part).lookup(TOKENS).chunks for part in range(2)]
    for chunk, first, second in zip(client.parts(layout).lookup(TOKENS).chunks, *found, strict=True):
        assert (chunk.quality, chunk.provenance) == (Quality.MEDIUM, Quality.LOW)
        assert chunk.stored_bytes == first.stored_bytes + second.stored_bytes


class Answering:
    """One part, whose calls answer so."""

    layout = layout_of("answering", 1, 2)

    def __init__(self, part: int, *, hit: Hit | None = None, result: PutResult | None = None) -> None:
        self.part, self._hit, self._result = part, hit, result

    async def lookup(self, *_: Any, **__: Any) -> Hit | None:
        return self._hit

    async def put(self, *_: Any, **__: Any) -> PutResult | None:
        return self._result


async def test_a_put_counts_what_became_of_every_part() -> None:
    one = PutResult(stored=3, have=2, tokens=80, bytes=30, durable=True)
    other = PutResult(stored=3, rejected=2, tokens=48, bytes=20, reasons=("it is full",))
    parts = AsyncPartsNamespace([Answering(0, result=one), Answering(1, result=other)])  # type: ignore[list-item]
    assert await parts.put(TOKENS, whole()) == PutResult(
        stored=3, have=0, rejected=2, tokens=48, bytes=50, durable=False, reasons=("it is full",)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("leases", "expected"),
    [
        ([Lease((b"1",), 900, "a:1"), Lease((b"2", b"3"), 500, "a:1")], Lease((b"1", b"2", b"3"), 500, "a:1")),
        ([Lease((b"1",), 900, "a:1"), Lease((b"2",), 500, "b:1")], None),  # no call renews leases of two nodes
        ([Lease((b"1",), 900, "a:1"), None], None),
    ],
)
async def test_the_lease_of_a_hit_is_that_of_every_part(leases: list[Lease | None], expected: Lease | None) -> None:
    namespaces: Any = [Answering(part, hit=Hit(lease=lease)) for part, lease in enumerate(leases)]
    assert (await AsyncPartsNamespace(namespaces).lookup(TOKENS)).lease == expected


def test_a_planned_get_of_parts_and_what_it_measures(client: Client) -> None:
    layout, kv = layout_of("planned", 1, 2), whole()
    cache = client.parts(layout)
    cache.put(TOKENS, kv, quality="lossless")
    for rate, expected in ((1.0, 80), (1e12, 0)):  # an engine that computes a token a second, and one without cost
        got, n = cache.get(TOKENS, ttft=10.0, prefill_tokens_per_s=rate)
        assert n == expected
        assert bits(got) == bits(kv[:, :, :n])
    assert len(cache.speeds()) == 1


@pytest.mark.parametrize("parts", [[0, 3], [0, 1, 2], [1, 2], [0, 4]])
def test_parts_that_are_no_rectangle_are_refused(client: Client, parts: list[int]) -> None:
    with pytest.raises(InvalidArgument, match="neighbouring head groups of neighbouring layer groups"):
        client.parts(layout_of("refused", 4, 2), parts)


def test_wrong_arrays_and_parts_are_refused(client: Client) -> None:
    layout = layout_of("refused", 1, 2)
    with pytest.raises(LayoutError, match="layers, 2, tokens, kv_heads"):
        client.parts(layout).put(TOKENS, whole()[:, :, :, :2])
    with pytest.raises(LayoutError, match="layers, 2, tokens, kv_heads"):
        client.parts(layout).get(TOKENS, out=whole()[:, :, :, :2])
    with pytest.raises(InvalidArgument, match="no such part"):
        client.parts(layout, [1, 2])
    with pytest.raises(InvalidArgument, match="name a part"):
        client.parts(layout, [])


async def test_a_part_that_fails_ends_the_call_when_the_others_have() -> None:
    """Strict, its error is raised; by then nothing writes to the caller's array any more."""
    room = np.zeros_like(whole())
    others_turn = asyncio.Event()

    class Failing:
        part = 0
        layout = layout_of("ended", 1, 2)

        async def get(self, *_: Any, **__: Any) -> Any:
            others_turn.set()
            raise Unavailable("the node is away")

    class Slow(Failing):
        part = 1

        async def get(self, *_: Any, out: Any, **__: Any) -> Any:
            await others_turn.wait()
            for _turn in range(5):
                await asyncio.sleep(0)
            out[...] = 1
            return Restored(out, len(TOKENS))

    with pytest.raises(Unavailable, match="away"):
        await AsyncPartsNamespace([Failing(), Slow()]).get(TOKENS, out=room)  # type: ignore[list-item]
    assert room[:, :, :, 2:].all()
    assert not room[:, :, :, :2].any()
