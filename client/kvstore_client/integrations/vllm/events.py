"""KV events: which blocks' KV the node has taken, for routers that listen to vLLM's publisher.

What the node evicts nobody tells: an event is a hint, and a lookup is what counts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore_client.integrations.vllm.work import Save

#: Saves that are waited for; those that fail are never heard of again.
SAVES_MAX = 4096


@dataclass(frozen=True)
class StoredBlocks:
    """Blocks in a row of one request, by vLLM's own hashes. `parent`: that of the block before them."""

    hashes: Sequence[bytes]
    parent: bytes | None
    tokens: Sequence[int]
    adapter: str | None


class StoredEvents:
    """`page_tokens`: of a block. `workers`: how many have to have stored their part."""

    def __init__(self, page_tokens: int, workers: int) -> None:
        self._page_tokens, self._workers = page_tokens, workers
        self._coming: OrderedDict[int, tuple[StoredBlocks, int]] = OrderedDict()  # with the workers that are lacking
        self._stored: list[StoredBlocks] = []

    def saving(self, save: Save, request: Any) -> None:
        """A save that was begun. Content and salts are part of a block's hash, but not of what is published: whoever
        hashes by himself would take such blocks for everybody's, so there is no event for them."""
        first, last = save.first_token // self._page_tokens, len(save.tokens) // self._page_tokens
        if save.key.salt is not None or save.key.content or len(request.block_hashes) < last:
            return  # the last: the engine caches no prefixes
        blocks = StoredBlocks(
            list(request.block_hashes[first:last]), request.block_hashes[first - 1] if first else None,
            [int(token) for token in save.tokens[save.first_token :]],
            save.key.adapter[0] if save.key.adapter else None,
        )  # fmt: skip
        self._coming[save.save_id] = (blocks, self._workers)
        if len(self._coming) > SAVES_MAX:
            self._coming.popitem(last=False)

    def stored(self, workers_by_save: Mapping[int, int]) -> None:
        """How many workers have heard of the node that it has a save."""
        for save_id, workers in workers_by_save.items():
            blocks, lacking = self._coming.pop(save_id, (None, 0))
            if blocks is not None and lacking > workers:
                self._coming[save_id] = (blocks, lacking - workers)
            elif blocks is not None:
                self._stored.append(blocks)

    def take(self) -> list[StoredBlocks]:
        """Since the last call."""
        stored, self._stored = self._stored, []
        return stored
