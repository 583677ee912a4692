"""A causal language model that computes in float32 on top of caches given as plain arrays.

The protocol of the whole evaluation: the forward pass is float32, and every cached key and value is rounded to the
dtype in which an engine would cache it (the model's own) before anything is computed on it. So the loss that is
measured is the codec's alone, and an exact codec gives the same floats, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from kvstore.evaluate.errors import CannotEvaluate
from kvstore.local_model import ModelUnusable, load_model
from kvstore_client import InvalidArgument, KVLayout
from kvstore_client.integrations.transformers import cache_from_kv, kv_from_cache, layout_for, passed_cache
from kvstore_codec import LayoutError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Engine:
    """`layout` describes the cache that is coded (chunks of 256 tokens); `name` is for people."""

    def __init__(self, model: Any, tokenizer: Any, model_id: str | None = None, revision: str | None = None) -> None:
        """`model`: in the dtype in which it caches, not yet in float32. Raises CannotEvaluate."""
        try:
            self.layout: KVLayout = layout_for(model, model_id=model_id, revision=revision)
        except (InvalidArgument, LayoutError) as error:
            raise CannotEvaluate(f"this model's cache cannot be evaluated: {error}") from None
        self.tokenizer = tokenizer
        self.context_tokens: int = int(getattr(model.config, "max_position_embeddings", 1 << 30))
        self._cached = DTYPES[self.layout.dtype]
        self._computed = dataclasses.replace(self.layout, dtype="float32")
        self._model = model.float().requires_grad_(False).eval()

    @property
    def name(self) -> str:
        return self.layout.model

    def tokens(self, text: str, *, beginning: bool = False) -> list[int]:
        """Token ids of `text`; `beginning`: after the token that this tokenizer begins a text with, if it has one."""
        ids = [int(token) for token in self.tokenizer(text, add_special_tokens=False).input_ids]
        if not beginning:
            return ids
        first = self.tokenizer("x").input_ids[0]
        return [first, *ids] if first == self.tokenizer.bos_token_id else ids

    def cache(self, kv: torch.Tensor) -> Any:
        """A new DynamicCache of `kv`, `[layers, 2, tokens, kv_heads, head_dim]` in the cached dtype."""
        return cache_from_kv(kv.float(), model_or_config=self._model)

    def logits(self, cache: Any, ids: Sequence[int], *, last: int = 0) -> torch.Tensor:
        """Runs `ids` on top of `cache`, which grows by them. float32 `[ids, vocabulary]`, or
        only the rows of the last `last` ids."""
        given = passed_cache(self._model, cache)
        answer = self._model(torch.tensor([list(ids)]), use_cache=True, logits_to_keep=last, **given)
        logits: torch.Tensor = answer.logits[0]
        return logits

    def on_top(self, cache: Any, ids: Sequence[int], *, last: int = 0) -> torch.Tensor:
        """As `logits`, and the cache is as before."""
        logits = self.logits(cache, ids, last=last)
        cache.crop(-len(ids))
        return logits

    def extend(self, kv: torch.Tensor | None, ids: Sequence[int]) -> torch.Tensor:
        """The KV of `kv`'s tokens followed by `ids`, computed in one pass on top of them and rounded as cached."""
        cache = DynamicCache() if kv is None else self.cache(kv)
        first = 0 if kv is None else int(kv.shape[2])
        self.logits(cache, ids, last=1)
        pairs = kv_from_cache(cache, self._computed, first)
        new = torch.stack([torch.stack(pair) for pair in pairs]).to(self._cached)
        return new if kv is None else torch.cat([kv, new], 2)


def load(path: Path, dtype: str = "auto", model_id: str | None = None, revision: str | None = None) -> Engine:
    """The engine of a local Hugging Face folder or GGUF file; `dtype`: in which it caches ("auto": as the weights are
    kept, bfloat16 for GGUF); `model_id`, `revision`: as in `layout_for`. Raises CannotEvaluate; nothing is
    downloaded."""
    try:
        model, tokenizer = load_model(path, dtype)
    except ModelUnusable as error:
        raise CannotEvaluate(str(error)) from None
    return Engine(model, tokenizer, model_id, revision)
