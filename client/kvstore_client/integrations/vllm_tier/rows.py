"""How KV lies in the rows of vLLM's CPU tier, as views in the order in which kvstore knows KV.

A row is an *offload chunk*: of each layer in turn, `blocks_per_chunk` pages as the accelerator has them, K and V of a
token and head side by side. With one worker, and with any number of them where vLLM's `canonical_layout` is on, a page
holds all heads:

- LBNHC   `[layers, blocks_per_chunk, page_tokens, kv_heads, 2·dim]`
- LBHNC   `[layers, blocks_per_chunk, kv_heads, page_tokens, 2·dim]`

Nothing is copied: the codec reads and writes rows in place. What lies otherwise is refused here, and that the pages
are what their declared order says, `KVStoreOffloadingConnector` tries out where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import kvstore_codec as codec
from kvstore_client.errors import InvalidArgument
from kvstore_client.integrations.vllm.engine import layer_numbers
from kvstore_codec import KVLayout
from kvstore_codec.arrays import PagedKV

TOKENS_FIRST, HEADS_FIRST = "LBNHC", "LBHNC"  # vLLM's names


class Rows:
    """`view`: vLLM's, `[rows, bytes]`. `config`: its OffloadingConfig. `layout`: of what the rows hold, a row a chunk.
    Raises InvalidArgument where they do not hold just that, in an order that is known."""

    def __init__(self, view: memoryview, config: Any, layout: KVLayout) -> None:
        order, numbers = _checked(config, layout)
        spec, layers = layout.layers[0], layout.num_layers
        page_tokens, pages = config.groups[0].tokens_per_block, config.cache.blocks_per_chunk
        page = page_tokens * spec.kv_heads * 2 * spec.k_dim  # elements
        rows, row = len(view), view.nbytes // max(1, len(view)) // layout.itemsize
        if row < layers * pages * page:
            raise InvalidArgument("rows are too short for a chunk", got=row, expected=layers * pages * page)
        # Tokens of a row's pages follow each other, if heads do not come first: then it is one page for the codec.
        self._per_row = 1 if order == TOKENS_FIRST else pages
        if self._per_row > 1 and row % page:
            raise InvalidArgument("rows are no multiple of a page: leave blocks_per_chunk at 1", row=row, page=page)
        # Not before all is known to be right: vLLM takes back what nobody has a view of.
        flat = np.asarray(view).reshape(-1).view(codec.empty(layout, 0).dtype)
        self._pages_a_row = row // page if self._per_row > 1 else 1
        blocks = (rows - 1) * self._pages_a_row + self._per_row
        tokens = page_tokens * pages // self._per_row
        self.chunk_bytes = pages * layers * page * flat.itemsize
        slot, inner = 2 * spec.k_dim, page_tokens if order == HEADS_FIRST else spec.kv_heads
        strides = [row if self._per_row == 1 else page, slot, inner * slot, 1]
        if order == TOKENS_FIRST:
            strides[1], strides[2] = strides[2], strides[1]
        self._caches: list[tuple[Any, Any]] = [(None, None)] * layers
        for place, number in enumerate(numbers):
            first = place * pages * page
            k, v = (
                np.lib.stride_tricks.as_strided(
                    flat[first + offset :], (blocks, tokens, spec.kv_heads, spec.k_dim),
                    [stride * flat.itemsize for stride in strides],
                )
                for offset in (0, spec.k_dim)
            )  # fmt: skip
            self._caches[number] = (k, v)
        self._chunk_tokens = layout.chunk_tokens

    def kv(self, chunk_ids: Sequence[int]) -> PagedKV:
        """The KV in these rows, one chunk after the other, in place."""
        first = np.asarray(chunk_ids, np.int64)[:, None] * self._pages_a_row
        block_ids: npt.NDArray[np.int64] = (first + np.arange(self._per_row)).reshape(-1)
        return PagedKV(self._caches, block_ids, len(chunk_ids) * self._chunk_tokens)  # type: ignore[arg-type]

    def release(self) -> None:
        """Lets go of vLLM's memory. Nobody may use what `kv` gave any more."""
        self._caches = []


def _checked(config: Any, layout: KVLayout) -> tuple[str, list[int]]:
    """(order, layer number of each place in a row)."""
    parallel, groups, order = config.parallel, config.groups, config.kv_cache_layout
    if order not in (TOKENS_FIRST, HEADS_FIRST):
        raise InvalidArgument(
            f"rows in this order are not known: set VLLM_KV_CACHE_LAYOUT to {TOKENS_FIRST} or {HEADS_FIRST}", got=order
        )
    if len(groups) != 1:
        raise InvalidArgument("only models with one KV cache group are supported", groups=len(groups))
    for name in ("pp_size", "pcp_size", "dcp_size"):
        if getattr(parallel, name) != 1:
            raise InvalidArgument(f"{name} must be 1: rows of such workers are not known", got=getattr(parallel, name))
    if parallel.world_size > 1 and not config.canonical_layout:
        raise InvalidArgument(
            'each worker has a part of its own in a row: set "canonical_layout": true in kv_connector_extra_config',
            workers=parallel.world_size,
        )  # fmt: skip
    group, pages = groups[0], config.cache.blocks_per_chunk
    if group.tokens_per_block * pages != layout.chunk_tokens:
        raise InvalidArgument(
            "a row is not a chunk of the layout", got=group.tokens_per_block * pages, expected=layout.chunk_tokens
        )
    numbers = layer_numbers(group.layer_names)
    held = config.worker_kv_bytes_per_block * parallel.world_size
    expected = group.tokens_per_block * layout.bytes_per_token
    if sorted(numbers) != list(range(layout.num_layers)) or held != expected or not layout.is_uniform:
        raise InvalidArgument(
            "rows hold something else than the layout's KV: padded pages, or layers without a cache of their own",
            got=held, expected=expected, layers=len(numbers),
        )  # fmt: skip
    return order, numbers
