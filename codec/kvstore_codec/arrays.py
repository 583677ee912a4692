"""Arrays from the outside world as planes, without copies where their memory allows.

A *plane* is one layer's K or V of one chunk: an unsigned-integer view `[tokens, kv_heads, dim]` of the array's
own memory (the codec works on bits; dtype is the layout's business), or the same in an engine's pages. Accepted: numpy
(ml_dtypes included), torch CPU tensors, anything with DLPack; one array `[layers, 2, tokens, kv_heads, head_dim]`, a
list of (k, v), or `PagedKV`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from kvstore_codec import _native
from kvstore_codec.errors import LayoutError
from kvstore_codec.layout import KVLayout

#: one array, a list of (k, v) pairs or a PagedKV; see the module's docstring
KVArray = Any
Bits = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, eq=False)
class PagedKV:
    """KV that lies in an engine's pages, read and written in place.

    `caches`: one (k, v) a layer, each `[blocks, page_tokens, kv_heads, dim]` (any strides), or where an engine lays
    pages out for a matrix unit, with tokens and dim in groups: `[blocks, token_groups, group_tokens, kv_heads,
    dim_groups, group_dim]`. `block_ids`: the pages that hold the sequence, in its order. Token i of the KV is token
    (first_token + i) of those pages; there are `tokens`.
    """

    caches: Sequence[tuple[Any, Any]]
    block_ids: Sequence[int]
    tokens: int
    first_token: int = 0

    def part(self, layers: slice, heads: slice) -> PagedKV:
        """Some layers' some heads, in the same pages."""
        return replace(self, caches=[(_heads(k, heads), _heads(v, heads)) for k, v in self.caches[layers]])


class PagedPlane(NamedTuple):
    """A plane in pages: `pages` as `PagedKV` has them, `block_ids` int64 of those that hold it."""

    pages: Bits
    block_ids: npt.NDArray[np.int64]
    tokens: int
    first_token: int

    @property
    def shape(self) -> tuple[int, int, int]:
        _, _, heads, dim = page_shape(self.pages)
        return self.tokens, heads, dim

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.pages.dtype

    @property
    def itemsize(self) -> int:
        return int(self.pages.itemsize)

    @property
    def nbytes(self) -> int:
        return self.itemsize * int(np.prod(self.shape))

    @property
    def places(self) -> tuple[npt.NDArray[np.int64], ...]:
        """(page, token in it), or (page, group, token in it), of every token."""
        at = np.arange(self.first_token, self.first_token + self.tokens)
        page_tokens, token_axes = page_shape(self.pages)[1], self.pages.shape[1 : self.pages.ndim // 2]
        return self.block_ids[at // page_tokens], *np.unravel_index(at % page_tokens, token_axes)


Plane = Bits | PagedPlane
#: one array `[layers, 2, tokens, kv_heads, head_dim]` of all planes, or each plane
Places = Bits | list[Plane]


def page_shape(pages: npt.NDArray[Any]) -> tuple[int, int, int, int]:
    """(blocks, page_tokens, kv_heads, dim) of one layer's K or V as `PagedKV` has them: in 4 or 6 axes."""
    if pages.ndim == 6:
        blocks, groups, tokens, heads, dim_groups, dim = pages.shape
        return blocks, groups * tokens, heads, dim_groups * dim
    blocks, tokens, heads, dim = pages.shape
    return blocks, tokens, heads, dim


def _heads(pages: Any, heads: slice) -> Any:
    return pages[(slice(None),) * (pages.ndim // 2) + (heads,)]


def read(plane: Plane) -> Bits:
    """A contiguous copy, `[tokens, heads, dim]`."""
    return (
        plane.pages[plane.places].reshape(plane.shape) if isinstance(plane, PagedPlane) else np.array(plane, order="C")
    )


def write(plane: Plane, bits: Bits) -> None:
    """Copies `bits` into the plane's memory."""
    if isinstance(plane, PagedPlane):
        groups = plane.pages.shape[plane.pages.ndim // 2 + 1 :]
        plane.pages[plane.places] = bits.reshape(*bits.shape[:2], *groups)
    else:
        plane[...] = bits


_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
}
_BITS: dict[int, np.dtype[Any]] = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


def empty(layout: KVLayout, tokens: int) -> KVArray:
    """A new array for `tokens` tokens of `layout`: numpy, or a list of (k, v) where layers differ in shape."""
    dtype = _NUMPY_DTYPES[layout.dtype]
    first = layout.layers[0]
    if layout.is_uniform:
        return np.empty((layout.num_layers, 2, tokens, first.kv_heads, first.k_dim), dtype)
    return [
        (
            np.empty((tokens, layer.kv_heads, layer.k_dim), dtype),
            np.empty((tokens, layer.kv_heads, layer.v_dim), dtype),
        )
        for layer in layout.layers
    ]


def token_slice(kv: KVArray, first: int, last: int) -> KVArray:
    """Tokens [first, last) of `kv`, as views, in the form in which `kv` came."""
    if isinstance(kv, PagedKV):
        first, last, _ = slice(first, last).indices(kv.tokens)
        return replace(kv, first_token=kv.first_token + first, tokens=max(0, last - first))
    if isinstance(kv, list | tuple):
        return [(k[first:last], v[first:last]) for k, v in kv]
    return kv[:, :, first:last]


def token_count(kv: KVArray, layout: KVLayout) -> int:
    """Tokens in `kv`; raises LayoutError, naming the axis, when it does not fit `layout`."""
    return tokens_of(places(kv, layout))


def planes(kv: KVArray, layout: KVLayout) -> list[Plane]:
    """K₀, V₀, K₁, V₁, … as views of `kv`'s memory. Raises LayoutError when shapes or dtype do not fit."""
    return planes_of(places(kv, layout))


def places(kv: KVArray, layout: KVLayout) -> Places:
    """`kv`'s memory in as few arrays as it came in. Raises LayoutError when shapes or dtype do not fit."""
    if isinstance(kv, PagedKV):
        return _paged(kv, layout)
    if isinstance(kv, list | tuple):
        return _pairs(kv, layout)
    whole = _bits(kv, layout.dtype)
    first = layout.layers[0]
    if not layout.is_uniform:
        raise LayoutError("layers of this layout differ in shape: pass a list of (k, v) pairs")
    expected = (layout.num_layers, 2, whole.shape[2] if whole.ndim == 5 else -1, first.kv_heads, first.k_dim)
    if whole.shape != expected:
        raise LayoutError(
            "kv must be [layers, 2, tokens, kv_heads, head_dim]", got=whole.shape,
            expected=(layout.num_layers, 2, "tokens", first.kv_heads, first.k_dim),
        )  # fmt: skip
    return whole


def places_to_write(kv: KVArray, layout: KVLayout) -> Places:
    """`places` of an array to decode into. Raises LayoutError also where its memory is read-only."""
    found = places(kv, layout)
    some = found if isinstance(found, list) else [found]
    if not all((array.pages if isinstance(array, PagedPlane) else array).flags.writeable for array in some):
        raise LayoutError("out is read-only: pass an array that may be written")
    return found


def planes_of(places: Places) -> list[Plane]:
    """K₀, V₀, K₁, V₁, …"""
    return places if isinstance(places, list) else [plane for layer in places for plane in layer]


def tokens_of(places: Places) -> int:
    return int(places[0].shape[0] if isinstance(places, list) else places.shape[2])


def _paged(kv: PagedKV, layout: KVLayout) -> list[Plane]:
    if len(kv.caches) != layout.num_layers or any(len(pair) != 2 for pair in kv.caches):
        raise LayoutError("caches must be one (k, v) pair a layer", got=len(kv.caches), expected=layout.num_layers)
    if kv.tokens < 0 or kv.first_token < 0:
        raise LayoutError("tokens and first_token must not be negative", tokens=kv.tokens, first_token=kv.first_token)
    block_ids = np.asarray(kv.block_ids)
    if block_ids.ndim != 1 or (block_ids.size and block_ids.dtype.kind not in "iu"):
        raise LayoutError("block_ids must be a list of page numbers", got=block_ids.dtype)
    block_ids = np.ascontiguousarray(block_ids, np.int64)
    planes: list[Plane] = []
    for index, array in enumerate(_bits(array, layout.dtype) for pair in kv.caches for array in pair):
        layer = layout.layers[index // 2]
        name = f"{'v' if index % 2 else 'k'} pages of layer {index // 2}"
        blocks, page_tokens, *row = page_shape(array) if array.ndim in (4, 6) else (0, 0)
        if row != [layer.kv_heads, layer.v_dim if index % 2 else layer.k_dim]:
            raise LayoutError(f"{name} must be [blocks, page_tokens, kv_heads, dim]", got=array.shape)
        if kv.first_token + kv.tokens > len(block_ids) * page_tokens:
            raise LayoutError(f"{name}: block_ids hold fewer than first_token + tokens", pages=len(block_ids))
        if block_ids.size and not 0 <= block_ids.min() <= block_ids.max() < blocks:
            raise LayoutError(f"{name}: a block id is out of range", blocks=blocks)
        planes.append(PagedPlane(array, block_ids, kv.tokens, kv.first_token))
    return planes


def _pairs(kv: Sequence[Any], layout: KVLayout) -> list[Plane]:
    if len(kv) != layout.num_layers or any(len(pair) != 2 for pair in kv):
        raise LayoutError("kv must be one (k, v) pair a layer", got=len(kv), expected=layout.num_layers)
    arrays = [_bits(array, layout.dtype) for pair in kv for array in pair]
    tokens = arrays[0].shape[0] if arrays[0].ndim else 0
    for index, array in enumerate(arrays):
        layer = layout.layers[index // 2]
        expected = (tokens, layer.kv_heads, layer.v_dim if index % 2 else layer.k_dim)
        if array.shape != expected:
            raise LayoutError(
                f"{'v' if index % 2 else 'k'} of layer {index // 2} must be [tokens, kv_heads, dim]",
                got=array.shape, expected=expected,
            )  # fmt: skip
    return list(arrays)


def _bits(array: Any, dtype: str) -> Bits:
    """The array's memory as unsigned integers of its element size."""
    if not isinstance(array, np.ndarray):
        array = _to_numpy(array)
    wanted = _NUMPY_DTYPES[dtype]
    if array.dtype != wanted:
        raise LayoutError(f"kv is {array.dtype} but the layout says {dtype}: cast it, or change the layout's dtype")
    bits: Bits = array.view(_BITS[wanted.itemsize])
    return bits


def _to_numpy(array: Any) -> npt.NDArray[Any]:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        if array.device.type != "cpu":
            raise LayoutError("kv lies on an accelerator: pass kv.cpu()", device=array.device)
        array = array.detach()
    elif not hasattr(array, "__dlpack__"):
        raise LayoutError("kv must be a numpy array, a torch tensor or support DLPack", got=type(array).__name__)
    try:
        name, bits = _native.view_bits(array)
    except (TypeError, BufferError) as error:
        reason = " ".join(str(error).split())
        raise LayoutError(f"kv's memory cannot be read: {reason}") from error
    if name not in _NUMPY_DTYPES:
        raise LayoutError("kv has a dtype that kvstore does not store", dtype=name)
    return np.asarray(bits).view(_NUMPY_DTYPES[name])
