"""What Hugging Face's model configurations say of a cache's keys; needs neither torch nor transformers."""

from __future__ import annotations

from typing import Any

from kvstore_client.errors import InvalidArgument
from kvstore_codec import RoPE, RopeScaling

#: `config.model_type` of the families whose cached keys a test un-rotates with the layout made here
MODEL_TYPES = frozenset({
    "arcee", "gemma", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "seed_oss", "stablelm", "starcoder2",
})  # fmt: skip
OTHERS = "describe the cache with a KVLayout of your own, or use another model"


def rope_of(config: Any, head_dim: int) -> RoPE:
    """How keys rotate by `config.rope_parameters`. Raises InvalidArgument for a rule that a layout cannot name."""
    given = getattr(config, "rope_parameters", None) or {}
    kind = given.get("rope_type", "missing")
    if kind not in ("default", "linear", "llama3"):
        raise InvalidArgument(f"rope type {kind} is not known: {OTHERS}")
    scaling = None
    if kind == "linear":
        scaling = RopeScaling("linear", given["factor"])
    elif kind == "llama3":
        scaling = RopeScaling(
            "llama3", given["factor"], given["low_freq_factor"], given["high_freq_factor"],
            int(given["original_max_position_embeddings"]),
        )  # fmt: skip
    rotary_dims = int(head_dim * given.get("partial_rotary_factor", 1.0))
    return RoPE(given["rope_theta"], None if rotary_dims == head_dim else rotary_dims, scaling=scaling)
