"""Views of a caller's KV, as the calls need them."""

from __future__ import annotations

import kvstore_codec as codec
from kvstore_client.putting import Source
from kvstore_codec import ChunkRef, KVArray, KVLayout
from kvstore_codec.arrays import PagedKV, PagedPlane, planes


def of_chunk(source: Source, ref: ChunkRef) -> tuple[KVArray, int]:
    """(kv, first position) of one of the source's chunks."""
    first = ref.first_token - source.first_token
    return codec.token_slice(source.kv, first, first + ref.tokens), ref.first_token


def sliceable(kv: KVArray, layout: KVLayout) -> KVArray:
    """`kv`; or (k, v) views of its memory where it has no way to take some of its tokens, as bare DLPack has not."""
    arrays = [array for pair in kv for array in pair] if isinstance(kv, list | tuple) else [kv]
    if isinstance(kv, PagedKV) or all(hasattr(array, "__getitem__") for array in arrays):
        return kv
    like = codec.empty(layout, 0)
    dtype = like[0][0].dtype if isinstance(like, list) else like.dtype
    views = [plane.view(dtype) for plane in planes(kv, layout) if not isinstance(plane, PagedPlane)]
    return list(zip(views[::2], views[1::2], strict=True))
