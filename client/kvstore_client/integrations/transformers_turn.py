"""A turn of a conversation, an agent or a search with transformers: what is stored of a prompt is not computed again,
and what it adds is put.

    turn = Turn(store, model, tokens)                   # store: Client.namespace(layout_for(model))
    ids = torch.tensor([tokens])
    answer = model.generate(ids, max_new_tokens=64, **turn.passed)[0].tolist()
    turn.keep(answer)                                   # prompt and answer: the next turn starts behind them

The next prompt may go on from this one, or share only its beginning: an edited message, another question about the same
document. The store finds the longest prefix in whole chunks; where nothing is stored, the turn is an ordinary one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import DynamicCache

from kvstore_client.client import Namespace
from kvstore_client.errors import InvalidArgument
from kvstore_client.integrations.transformers import cache_from_kv, kv_from_cache, passed_cache
from kvstore_client.results import ChunkHit, PutResult
from kvstore_codec import Quality


class Turn:
    """One prompt on its way through `model`.

    `cache`: what the store held of the prompt, at most all but its last token, for one forward or generate, in which
    it grows. `reused`: tokens of it that were not computed. `provenance`: the worst quality among those, RAW where they
    are exact; what is kept is marked with it, so that no reader takes KV computed on a lossy prefix for better than it.
    """

    def __init__(
        self, store: Namespace, model: Any, tokens: Sequence[int], *, quality: str | Quality | None = None,
        min_quality: str | Quality = "low", deadline: float | None = None,
    ) -> None:  # fmt: skip
        """`tokens`: the whole prompt's ids. `quality`, `min_quality`, `deadline`: see `Namespace.get`; a miss is an
        empty cache. Raises InvalidArgument (what is stored is not of this model's shape; no tokens)."""
        if not tokens:
            raise InvalidArgument("a prompt has at least one token")
        self._store, self._model = store, model
        self.cache, self.reused, self.provenance = DynamicCache(), 0, Quality.RAW
        # Held, so that what is read has the quality that the lookup told.
        with store.held(tokens, deadline=deadline) as hit:
            if hit.tokens:
                kv, restored = store.get(
                    tokens[: hit.tokens], quality=quality, min_quality=min_quality, deadline=deadline
                )
                self.reused = min(restored, len(tokens) - 1)
        if self.reused:
            self.cache = cache_from_kv(kv, self.reused, model_or_config=model)
            read = (_read_quality(chunk, Quality.parse(quality or "raw")) for chunk in hit.chunks
                    if chunk.first_token < self.reused)  # fmt: skip
            self.provenance = max(read)

    @property
    def passed(self) -> dict[str, Any]:
        """The cache as the keyword argument of the model's forward and generate."""
        return passed_cache(self._model, self.cache)

    def keep(
        self, tokens: Sequence[int], *, quality: str | Quality = "high", durable: bool = False,
        retain: tuple[int, int] | None = None, deadline: float | None = None,
    ) -> PutResult:  # fmt: skip
        """Puts the whole chunks that this turn has added; only their KV is read.

        `tokens`: prompt and answer. The last ones may not be in the cache: a model has not computed the KV of the token
        that it has just chosen. `quality`, `durable`, `retain`, `deadline`: see `Namespace.put`.

        Raises InvalidArgument where the cache holds nothing new, or more than `tokens`.
        """
        held = int(self.cache.get_seq_length())
        if held > len(tokens):
            raise InvalidArgument("the cache holds more than these tokens", held=held, tokens=len(tokens))
        if held <= self.reused:
            raise InvalidArgument("nothing was computed: run the model with `passed` first", held=held)
        first = self.reused // self._store.layout.chunk_tokens * self._store.layout.chunk_tokens
        return self._store.put(
            tokens[:held], kv_from_cache(self.cache, self._store.layout, first), quality=quality, durable=durable,
            provenance=self.provenance, first_token=first, retain=retain, deadline=deadline,
        )  # fmt: skip


def _read_quality(chunk: ChunkHit, cap: Quality) -> Quality:
    """What a chunk's values are worth, read no better than `cap`; exact ones can only be read whole."""
    read = chunk.effective_quality if chunk.quality.exact else max(chunk.effective_quality, cap)
    return Quality.RAW if read.exact else read
