"""Pages of every known order against index arithmetic written down here, and chunks that cross from one to another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvstore_codec as codec
from kvstore_client import InvalidArgument, KVLayout, RoPE
from kvstore_client.integrations.vllm.pages import PageOrder, PageShape, found_order, views
from kvstore_client.integrations.vllm.staging import Staging
from kvstore_codec.arrays import PagedKV

#: (declared shape, place in that page's flat memory) of element (plane, token, head, channel), by order
Place = Callable[[int, int, int, int], int]


def declared(order: PageOrder, blocks: int, shape: PageShape) -> tuple[int, ...]:
    t, h, d = shape.page_tokens, shape.kv_heads, shape.dim
    return {
        PageOrder.NHD: (blocks, 2, t, h, d),
        PageOrder.HND: (blocks, 2, h, t, d),
        PageOrder.PACKED_NHD: (blocks, t, h, 2 * d),
        PageOrder.PACKED_HND: (blocks, h, t, 2 * d),
        PageOrder.CPU_VEC: (blocks, h, t, 2 * d),
        PageOrder.CPU_AMX: (blocks, h, t, 2 * d),
    }[order]


def place(order: PageOrder, shape: PageShape) -> Place:
    t, h, d = shape.page_tokens, shape.kv_heads, shape.dim
    places: dict[PageOrder, Place] = {
        PageOrder.NHD: lambda p, i, j, c: ((p * t + i) * h + j) * d + c,
        PageOrder.HND: lambda p, i, j, c: ((p * h + j) * t + i) * d + c,
        PageOrder.PACKED_NHD: lambda p, i, j, c: (i * h + j) * 2 * d + p * d + c,
        PageOrder.PACKED_HND: lambda p, i, j, c: (j * t + i) * 2 * d + p * d + c,
        PageOrder.CPU_VEC: lambda p, i, j, c: j * 2 * t * d + (t * d + i * d + c if p else c * t + i),
        PageOrder.CPU_AMX: lambda p, i, j, c: j * 2 * t * d + (
            t * d + (c // 16) * 16 * t + (i // 2) * 32 + (c % 16) * 2 + i % 2 if p
            else (i // 16) * 16 * d + (c // 2) * 32 + (i % 16) * 2 + c % 2
        ),
    }  # fmt: skip
    return places[order]


def write_page(pages: torch.Tensor, order: PageOrder, shape: PageShape, block: int, k: Any, v: Any) -> None:
    """As an engine with that order would: element by element into the page's memory."""
    flat, at = pages[block].view(-1).view(torch.int16).numpy(), place(order, shape)
    for plane, values in enumerate((k, v)):
        for index, bits in np.ndenumerate(values.view(torch.int16).numpy()):
            flat[at(plane, *index)] = bits


def random_kv(shape: PageShape, blocks: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = (blocks, shape.page_tokens, shape.kv_heads, shape.dim)
    k, v = (torch.randn(size, generator=generator).to(torch.bfloat16) for _ in range(2))
    return k, v


def numpy_views(pages: torch.Tensor, order: PageOrder, shape: PageShape) -> tuple[Any, Any]:
    k, v = (plane.view(torch.int16).numpy().view(ml_dtypes.bfloat16) for plane in views(pages, order, shape))
    return k, v


def whole(plane: Any) -> Any:
    """Of one page or several, tokens and elements as one axis each."""
    if plane.ndim < 5:
        return plane
    *blocks, groups, tokens, heads, dim_groups, dim = plane.shape
    return plane.reshape(*blocks, groups * tokens, heads, dim_groups * dim)


#: of each order, and what is cut into tiles of 16
SMALL = (range(1, 6), [2, 4, 8])
TILES = ([16, 32], [16, 48])


def fitting(order: PageOrder, at_least: int = 1) -> st.SearchStrategy[PageShape]:
    """`at_least`: tokens and heads."""
    tokens, dims = TILES if order is PageOrder.CPU_AMX else SMALL
    counts = st.sampled_from([count for count in tokens if count >= at_least])
    return st.builds(PageShape, counts, st.integers(at_least, 3), st.sampled_from(dims))


@settings(max_examples=15, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
@pytest.mark.parametrize("order", list(PageOrder))
def test_views_are_where_the_engine_writes(order: PageOrder, data: st.DataObject, seed: int) -> None:
    shape = data.draw(fitting(order))
    pages = torch.zeros(declared(order, 3, shape), dtype=torch.bfloat16)
    wanted = random_kv(shape, 3, seed)
    for block in range(3):
        write_page(pages, order, shape, block, wanted[0][block], wanted[1][block])
    found = views(pages, order, shape)
    for plane, values in zip(found, wanted, strict=True):
        assert torch.equal(whole(plane), values)
        assert plane.untyped_storage().data_ptr() == pages.untyped_storage().data_ptr()


@settings(max_examples=10, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("order", list(PageOrder))
def test_the_order_is_found_and_the_page_put_back(order: PageOrder, data: st.DataObject) -> None:
    shape = data.draw(fitting(order, at_least=2))
    layers = torch.arange(4 * torch.Size(declared(order, 3, shape)).numel()).to(torch.bfloat16)
    pages = layers.view(3, 4, *declared(order, 3, shape)[1:])[:, 1]  # blocks of one layer, others between them
    before = layers.clone()
    assert found_order(pages, shape, lambda k, v: write_page(pages, order, shape, 0, k, v)) is order
    assert torch.equal(layers, before)


def test_kv_axis_before_blocks() -> None:
    shape = PageShape(4, 2, 8)
    pages = torch.zeros((2, 3, 4, 2, 8))
    k, v = views(pages, PageOrder.NHD, shape)
    assert k.data_ptr() == pages[0].data_ptr()
    assert v.data_ptr() == pages[1].data_ptr()
    assert tuple(k.shape) == (3, 4, 2, 8)


def test_an_order_that_is_not_known_is_refused_with_what_was_seen() -> None:
    shape = PageShape(4, 2, 8)
    pages = torch.zeros((3, 2, 4, 16))

    def backwards(k: Any, v: Any) -> None:
        pages[0] = torch.cat([v, k], 2).transpose(0, 1)

    with pytest.raises(InvalidArgument, match=r"no order that is known.*shape=\(3, 2, 4, 16\)"):
        found_order(pages, shape, backwards)
    assert not pages.any()


@pytest.mark.parametrize(
    ("pages", "order", "message"),
    [
        (torch.zeros((3, 4, 2, 8)), PageOrder.PACKED_NHD, "another shape"),
        (torch.zeros((3, 4, 2, 8)), PageOrder.NHD, "must be"),
        (torch.zeros((2, 2, 4, 2, 8)), PageOrder.NHD, "two pages"),
        (torch.zeros((3, 2, 4, 32))[..., ::2], PageOrder.CPU_VEC, "one piece of memory"),
        (torch.zeros((3, 2, 4, 16)), PageOrder.CPU_AMX, "tiles"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(pages: torch.Tensor, order: PageOrder, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        views(pages, order, PageShape(4, 2, 8))


@pytest.mark.parametrize("reader", [PageOrder.CPU_VEC, PageOrder.CPU_AMX])
@pytest.mark.parametrize("writer", list(PageOrder))
@pytest.mark.parametrize("quality", ["raw", "lossless", "high"])
def test_engines_with_other_pages_read_each_others_chunks(writer: PageOrder, reader: PageOrder, quality: str) -> None:
    """Blocks of 16 in one order, of 32 in another: one object, the same bytes, the same values."""
    layout = KVLayout.uniform(
        model="m", revision="r", num_layers=2, kv_heads=2, head_dim=32, chunk_tokens=64, rope=RoPE(1e4)
    )
    written, read = PageShape(16, 2, 32), PageShape(32, 2, 32)
    kv = [random_kv(PageShape(64, 2, 32), 1, seed) for seed in range(2)]
    ours, theirs = [4, 1, 3, 6], [2, 0]
    caches = []
    for k, v in kv:
        pages = torch.zeros(declared(writer, 7, written), dtype=torch.bfloat16)
        plane_k, plane_v = numpy_views(pages, writer, written)
        for at, block in enumerate(ours):
            for plane, each in ((plane_k, k), (plane_v, v)):
                bits = each[0, at * 16 : at * 16 + 16].view(torch.int16).numpy().view(ml_dtypes.bfloat16)
                plane[block] = bits.reshape(plane[block].shape)
        caches.append((plane_k, plane_v))
    blob = bytes(codec.encode(PagedKV(caches, ours, 64), layout, quality=quality, first_position=64))
    plain = [(k[0], v[0]) for k, v in kv]
    assert blob == bytes(codec.encode(plain, layout, quality=quality, first_position=64))
    memory = [torch.zeros(declared(reader, 3, read), dtype=torch.bfloat16) for _ in kv]
    room = [numpy_views(pages, reader, read) for pages in memory]
    codec.decode(blob, layout, out=PagedKV(room, theirs, 64))
    expected = codec.decode(blob, layout)
    for layer, (k, v) in enumerate(room):
        for plane, values in enumerate((k, v)):
            assert np.array_equal(np.concatenate([whole(values[block]) for block in theirs]), expected[layer, plane])
    assert not any(pages[1].any() for pages in memory), "a page that was not asked for"


@pytest.mark.parametrize("order", [PageOrder.CPU_VEC, PageOrder.CPU_AMX])
def test_staging_copies_pages_and_refuses_what_has_no_room(order: PageOrder) -> None:
    shape = PageShape(32, 2, 16)
    memory = [random_kv(PageShape(32, 2, 32), 5, seed)[0].transpose(1, 2).contiguous() for seed in range(3)]
    engine = [numpy_views(pages, order, shape) for pages in memory]
    staging = Staging(engine, 3)
    assert np.argsort(staging.caches[0][0].strides).tolist() == np.argsort(engine[0][0].strides).tolist()
    taken = staging.take([4, 2])
    assert taken is not None
    for ours, theirs in zip(staging.caches, engine, strict=True):
        for plane, source in zip(ours, theirs, strict=True):
            assert np.array_equal(plane[taken], source[[4, 2]])
    assert staging.take([0, 1]) is None
    staging.give_back(taken)
    assert staging.take([0, 1, 3]) is not None
