"""What the transformers integration refuses, and what makes a model another model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import cache_of, tiny
from transformers import DynamicCache, StaticCache

from kvstore_client.errors import InvalidArgument
from kvstore_client.integrations import transformers as integration
from kvstore_client.integrations.transformers import cache_from_kv, kv_from_cache, layout_for, weights_revision

pytestmark = pytest.mark.model


def test_the_revision_is_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    revision = weights_revision(model)
    assert revision.startswith("blake2b:")
    assert len(revision) == len("blake2b:") + 64
    assert weights_revision(tiny("llama", dtype=torch.bfloat16)) == revision
    assert weights_revision(tiny("llama")) != revision
    with monkeypatch.context() as patch:
        patch.setattr(integration, "_HASHED_BYTES", 256)
        assert weights_revision(model) == revision

    weight = model.model.layers[1].mlp.down_proj.weight
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0, dtype=torch.bfloat16))
    tampered = weights_revision(model)
    assert tampered != revision
    weight.copy_(tiny("llama", dtype=torch.bfloat16).model.layers[1].mlp.down_proj.weight)
    assert weights_revision(model) == revision
    model.register_buffer("scratch", torch.tensor(1.0), persistent=False)
    assert weights_revision(model) == revision
    model.register_buffer("scale", torch.tensor(1.0))
    assert weights_revision(model) != revision
    assert layout_for(model).namespace_id != layout_for(model, revision=tampered).namespace_id


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("mistral", {"sliding_window": 128}, "full attention in every layer"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1}, "full attention"),
        ("deepseek_v3", {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8}, "MLA"),
        ("mamba", {}, "no layout is known for model type mamba"),
        ("cohere", {}, "no layout is known for model type cohere"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope type yarn"),
    ],
)
def test_a_model_of_another_kind_is_refused(model_type: str, changes: dict[str, Any], message: str) -> None:
    with torch.device("meta"):  # its weights are never looked at
        model = tiny(model_type, **changes)
    with pytest.raises(InvalidArgument, match=message) as raised:
        layout_for(model)
    assert "\n" not in str(raised.value)


def test_a_model_in_another_state_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="float64: load it with dtype="):
        layout_for(tiny("llama", dtype=torch.float64))
    with pytest.raises(InvalidArgument, match="other frequencies than its config says"):
        layout_for(tiny("llama").to(torch.bfloat16))
    with torch.device("meta"), pytest.raises(InvalidArgument, match="a weight is not loaded"):
        weights_revision(tiny("llama"))
    quantised = tiny("llama")
    quantised.generation_config.cache_implementation = "quantized"
    with pytest.raises(InvalidArgument, match="the model's cache is quantised"):
        layout_for(quantised)


def test_a_cache_that_does_not_fit_is_refused() -> None:
    model = tiny("llama")
    layout, cache = layout_for(model), cache_of(model)
    with pytest.raises(InvalidArgument, match="holds a batch"):
        kv_from_cache(cache_of(model, batch=2), layout)
    static = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(InvalidArgument, match="only a DynamicCache"):
        kv_from_cache(cache_of(model, past=static), layout)
    with pytest.raises(InvalidArgument, match=r"only a DynamicCache.*DynamicSlidingWindowLayer"):
        kv_from_cache(cache_of(tiny("mistral", sliding_window=4)), layout)
    with pytest.raises(InvalidArgument, match=r"another dtype \(got=torch.float32, expected=torch.bfloat16"):
        kv_from_cache(cache, replace(layout, dtype="bfloat16"))
    with pytest.raises(InvalidArgument, match="differ in layers"):
        kv_from_cache(cache, replace(layout, layers=layout.layers[:1]))
    with pytest.raises(InvalidArgument, match="keys of layer 0: another shape"):
        kv_from_cache(cache, replace(layout, layers=(replace(layout.layers[0], kv_heads=1),) * 2))
    for first, last in ((0, 9), (3, 3), (-1, 4)):
        with pytest.raises(InvalidArgument, match="does not hold these tokens"):
            kv_from_cache(cache, layout, first, last)
    with pytest.raises(InvalidArgument, match="does not hold these tokens"):
        kv_from_cache(DynamicCache(), layout)


def test_a_kv_that_does_not_fit_is_refused() -> None:
    model = tiny("llama")
    kv = kv_from_cache(cache_of(model), layout_for(model))
    refuse: Callable[..., Any] = functools.partial(cache_from_kv, model_or_config=model)
    for bad in (kv[:1], kv[0][0], None, [(k, v, v) for k, v in kv], np.zeros((2, 3, 8, 2, 16), np.float32)):
        with pytest.raises(InvalidArgument, match="kv must be"):
            refuse(bad)
    for tokens in (0, 9):
        with pytest.raises(InvalidArgument, match="does not hold that many tokens"):
            refuse(kv, tokens)
    with pytest.raises(InvalidArgument, match="v of layer 0: another shape"):
        refuse([(k, v[:, :1]) for k, v in kv])
    with pytest.raises(InvalidArgument, match="kv and model differ in dtype"):
        refuse([(k.half(), v.half()) for k, v in kv])
    with pytest.raises(InvalidArgument, match="a dtype that no model caches in"):
        refuse(np.zeros((2, 2, 8, 2, 16), np.int8))
