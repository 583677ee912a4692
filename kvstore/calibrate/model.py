"""The model to calibrate: any local causal language model that transformers loads, from a folder or a GGUF file.

It computes in float32, for gradients; what it caches is rounded to the dtype in which it is served, which is the
layout's. Both KV and rounding are then those of the cache that will be stored, up to the model's own rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kvstore.calibrate.options import CalibrationFailed, Options
from kvstore.local_model import ModelUnusable, load_model
from kvstore_client import KvClientError
from kvstore_client.integrations.transformers import layout_for, passed_cache
from kvstore_codec import KVLayout

CHUNK_TOKENS = 256
TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """`model`: in float32, eval mode, without gradients of its parameters. `layout`: of the cache as it is served."""

    model: Any
    tokenizer: Any
    layout: KVLayout

    def prefill(self, tokens: list[int]) -> DynamicCache:
        """The cache of `tokens`, rounded to the layout's dtype."""
        computed = DynamicCache()
        with torch.no_grad():
            self._forward(computed, tokens, logits_to_keep=1)
        rounded = DynamicCache()
        dtype = TORCH_DTYPES[self.layout.dtype]
        for index, layer in enumerate(computed.layers):
            rounded.update(layer.keys.to(dtype), layer.values.to(dtype), index)
        return rounded

    def log_probabilities(self, cache: DynamicCache, tokens: list[int]) -> torch.Tensor:
        """float32 [tokens, vocabulary]: of what follows each of `tokens`, which follow `cache` (float32; it grows)."""
        logits: torch.Tensor = self._forward(cache, tokens).logits[0]
        return logits.log_softmax(-1)

    def _forward(self, cache: DynamicCache, tokens: list[int], **arguments: Any) -> Any:
        """The model over `tokens` on top of `cache`, which grows by them."""
        arguments |= passed_cache(self.model, cache)
        return self.model(torch.tensor([tokens]), use_cache=True, **arguments)


def load(options: Options) -> LoadedModel:
    """Raises CalibrationFailed for what is no such model, or one whose cache has no layout here."""
    try:
        model, tokenizer = load_model(options.model, options.dtype)
    except ModelUnusable as error:
        raise CalibrationFailed(str(error)) from None
    try:
        layout = layout_for(model, chunk_tokens=CHUNK_TOKENS, model_id=options.model_id, revision=options.revision)
    except KvClientError as error:
        raise CalibrationFailed(f"{options.model}: {error}") from None
    return LoadedModel(model.float().eval().requires_grad_(False), tokenizer, layout)
