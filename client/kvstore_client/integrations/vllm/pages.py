"""How an engine's KV lies in its pages, as views in the order in which kvstore knows KV.

An engine keeps one tensor a layer, cut into pages (*blocks*). `views` gives each as (k, v), both
`[blocks, page_tokens, kv_heads, dim]` whatever the order in memory, with tokens and dim split in two where no strides
say it otherwise: nothing is copied, and what is written to a view is written to the page. They are what `PagedKV`
takes, so the codec reads and writes pages in place, and chunks of engines with different pages are the same chunks.

`PageOrder` names what is known:

- NHD   `[2, blocks, page_tokens, kv_heads, dim]` or `[blocks, 2, page_tokens, kv_heads, dim]`
- HND   the same with kv_heads before page_tokens
- PACKED_NHD, PACKED_HND   `[blocks, page_tokens, kv_heads, 2·dim]`, `[blocks, kv_heads, page_tokens, 2·dim]`: the K and
  the V of a token and head side by side
- CPU_VEC   declared as PACKED_HND, but the memory of each (block, head) is K transposed, `[dim, page_tokens]`, followed
  by V, `[page_tokens, dim]`: what vLLM's vectorised CPU attention makes of it
- CPU_AMX   declared as PACKED_HND, but K and V of each (block, head) are tiles for Intel's matrix unit, in which pairs
  lie together that it multiplies at once: of K two elements of a token, `[page_tokens/16, dim/2, 16, 2]`, of V two
  tokens, `[dim/16, page_tokens/2, 16, 2]`; vLLM takes it for bfloat16 where the CPU has AMX

The order cannot be read from a tensor's shape or strides: `found_order` lets the engine write a page and looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kvstore_client.errors import InvalidArgument


class PageOrder(str, Enum):
    NHD = "nhd"
    HND = "hnd"
    PACKED_NHD = "packed-nhd"
    PACKED_HND = "packed-hnd"
    CPU_VEC = "cpu-vec"
    CPU_AMX = "cpu-amx"


#: A tile of CPU_AMX: so many columns of pairs.
_TILE, _PAIR = 16, 2


@dataclass(frozen=True)
class PageShape:
    """What one layer's pages hold: `page_tokens` tokens of `kv_heads` keys and values of `dim` elements."""

    page_tokens: int
    kv_heads: int
    dim: int


def views(pages: Any, order: PageOrder, shape: PageShape) -> tuple[Any, Any]:
    """(k, v) of one layer's `pages`, a torch tensor: views `[blocks, page_tokens, kv_heads, dim]` of its memory; of
    CPU_AMX `[blocks, token_groups, group_tokens, kv_heads, dim_groups, group_dim]`.

    Raises InvalidArgument where the tensor is not what `order` and `shape` say, or its pages have gaps inside.
    """
    tokens, heads, dim = shape.page_tokens, shape.kv_heads, shape.dim
    if order in (PageOrder.NHD, PageOrder.HND):
        inner = (tokens, heads, dim) if order is PageOrder.NHD else (heads, tokens, dim)
        planes = _kv_axis_first(pages, inner)
        k, v = (plane if order is PageOrder.NHD else plane.transpose(1, 2) for plane in planes)
        return k, v
    if order is PageOrder.PACKED_NHD:
        _check(pages, (tokens, heads, 2 * dim))
        return pages[..., :dim], pages[..., dim:]
    _check(pages, (heads, tokens, 2 * dim))
    if order is PageOrder.PACKED_HND:
        return pages[..., :dim].transpose(1, 2), pages[..., dim:].transpose(1, 2)
    if pages.stride(2) != 2 * dim or pages.stride(3) != 1:
        raise InvalidArgument("the page of a head must be one piece of memory", strides=tuple(pages.stride()))
    blocks = pages.shape[0]
    halves = pages.flatten(2).unflatten(2, (2, tokens * dim))
    if order is PageOrder.CPU_AMX:
        if tokens % _TILE or dim % _TILE:
            raise InvalidArgument("pages are cut into tiles of 16 tokens and 16 elements", page_tokens=tokens, dim=dim)
        k = halves[:, :, 0].unflatten(2, (tokens // _TILE, dim // _PAIR, _TILE, _PAIR)).permute(0, 2, 4, 1, 3, 5)
        v = halves[:, :, 1].unflatten(2, (dim // _TILE, tokens // _PAIR, _TILE, _PAIR)).permute(0, 3, 5, 1, 2, 4)
        return k, v
    k = halves[:, :, 0].unflatten(2, (dim, tokens)).permute(0, 3, 1, 2)
    v = halves[:, :, 1].unflatten(2, (tokens, dim)).permute(0, 2, 1, 3)
    assert k.shape == v.shape == (blocks, tokens, heads, dim)
    return k, v


def found_order(pages: Any, shape: PageShape, write: Callable[[Any, Any], None]) -> PageOrder:
    """In which order the engine lays KV down, by its own hand: `write(k, v)` must make it write these tokens, torch
    tensors `[page_tokens, kv_heads, dim]`, to block 0 of `pages`, which is put back as it was.

    Raises InvalidArgument where no known order has the tokens where they should be.
    """
    import torch  # not before: the module's other functions need none

    fitting = [(order, pair) for order in PageOrder if (pair := _views_or_none(pages, order, shape)) is not None]
    before = [plane[0].clone() for _, pair in fitting for plane in pair]
    generator = torch.Generator().manual_seed(0)
    k, v = (
        torch.randn((shape.page_tokens, shape.kv_heads, shape.dim), generator=generator).to(pages.dtype)
        for _ in range(2)
    )
    try:
        write(k.to(pages.device), v.to(pages.device))
        found = [
            order
            for order, pair in fitting
            if all(
                torch.equal(plane[0].cpu().reshape(want.shape), want) for plane, want in zip(pair, (k, v), strict=True)
            )
        ]
    finally:
        for plane, held in zip([plane for _, pair in fitting for plane in pair], before, strict=True):
            plane[0].copy_(held)
    if len(found) != 1:
        raise InvalidArgument(
            "the engine's pages lie in no order that is known here", shape=tuple(pages.shape),
            strides=tuple(pages.stride()), tried=",".join(order.value for order, _ in fitting),
        )  # fmt: skip
    return found[0]


def _views_or_none(pages: Any, order: PageOrder, shape: PageShape) -> tuple[Any, Any] | None:
    try:
        return views(pages, order, shape)
    except InvalidArgument:
        return None


def _kv_axis_first(pages: Any, inner: Sequence[int]) -> Any:
    """`pages` as `[2, blocks, *inner]`."""
    found = tuple(pages.shape)
    if len(found) != 5 or found[2:] != tuple(inner) or 2 not in found[:2]:
        raise InvalidArgument(
            "pages must be [2, blocks, …] or [blocks, 2, …]", got=found, inner=tuple(inner)
        )  # fmt: skip
    if found[:2] == (2, 2):
        raise InvalidArgument("two pages: which of the first axes is K and V cannot be told", got=found)
    return pages if found[0] == 2 else pages.transpose(0, 1)


def _check(pages: Any, inner: Sequence[int]) -> None:
    if len(pages.shape) != 4 or tuple(pages.shape[1:]) != tuple(inner):
        raise InvalidArgument("pages have another shape", got=tuple(pages.shape), expected=("blocks", *inner))
