"""KV in memory that does not lie as the codec's own arrays do."""

from __future__ import annotations

from typing import Any

import numpy as np

import kvstore_codec as codec

HOWS = ["heads before tokens", "dims before tokens", "every other token, backwards", "odd addresses", "pages", "tiles"]


def scattered(kv: Any, layout: codec.KVLayout, how: str) -> Any:
    """`kv`'s values in memory of another shape; `kv` is an array or pairs."""
    pairs = [(layer[0], layer[1]) for layer in kv]
    tokens = len(pairs[0][0])
    if how == "heads before tokens":
        return [
            tuple(np.array(each.transpose(1, 0, 2), order="C").transpose(1, 0, 2) for each in pair) for pair in pairs
        ]
    if how == "dims before tokens":
        return [
            tuple(np.array(each.transpose(2, 1, 0), order="C").transpose(2, 1, 0) for each in pair) for pair in pairs
        ]
    if how == "every other token, backwards":
        return [tuple(np.repeat(each, 2, axis=0)[::-2][::-1] for each in pair) for pair in pairs]
    if how == "odd addresses":
        return [tuple(_at_odd_address(each) for each in pair) for pair in pairs]
    page_tokens, first = (4, 2) if how == "tiles" else (3, 2)
    blocks = [*range(1, (first + tokens) // page_tokens + 2)][::-1]
    caches = []
    for pair in pairs:
        pages = [np.zeros((len(blocks) + 1, page_tokens, *each.shape[1:]), each.dtype) for each in pair]
        for each, cache in zip(pair, pages, strict=True):
            for token in range(tokens):
                cache[blocks[(first + token) // page_tokens], (first + token) % page_tokens] = each[token]
        caches.append((pages[0], pages[1]) if how == "pages" else (_in_tiles(pages[0]), _in_tiles(pages[1])))
    assert how in ("pages", "tiles")
    return codec.PagedKV(caches, blocks, tokens, first)


def _in_tiles(pages: Any) -> Any:
    """Of two tokens by two elements, head by head."""
    blocks, tokens, heads, dim = pages.shape
    groups = pages.reshape(blocks, tokens // 2, 2, heads, dim // 2, 2)
    return np.array(groups.transpose(0, 3, 1, 4, 2, 5), order="C").transpose(0, 2, 4, 1, 3, 5)


def _at_odd_address(values: Any) -> Any:
    memory = np.zeros(values.nbytes + 1, np.uint8)
    found = memory[1:].view(values.dtype).reshape(values.shape)
    found[...] = values
    return found
