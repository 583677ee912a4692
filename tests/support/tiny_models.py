"""Models of transformers' own code, small enough to run in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvstore_client.integrations.transformers import passed_cache, returned_cache


def tiny(model_type: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Two layers with random weights that follow from a fixed seed; `changes` to the configuration."""
    sizes: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, **(sizes | changes))
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def cache_of(model: Any, tokens: int = 8, *, batch: int = 1, token: int = 7, past: Any = None) -> Any:
    """The cache after `tokens` times the same token."""
    given = {} if past is None else passed_cache(model, past)
    return returned_cache(model(torch.full((batch, tokens), token), use_cache=True, **given))
