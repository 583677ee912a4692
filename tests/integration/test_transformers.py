"""A real model's cache to stored objects and back, bit for bit."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from smollm2 import TEXT
from tiny_models import cache_of, tiny
from transformers import DynamicCache

import kvstore_codec as codec
from kvstore_client.integrations import transformers as integration
from kvstore_client.integrations.transformers import (
    cache_from_kv,
    kv_from_cache,
    layout_for,
    passed_cache,
    returned_cache,
    weights_revision,
)
from kvstore_codec import arrays
from kvstore_codec.rope import rotation_for

pytestmark = pytest.mark.model

CHUNK = 256
PREFIX = 2 * CHUNK  # tokens of TEXT that go through the store; the rest, about 100, continues them


class Prefilled:
    """SmolLM2 with the first PREFIX tokens of TEXT in its cache."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.ids = tokenizer(TEXT, return_tensors="pt").input_ids
        self.layout = layout_for(model, chunk_tokens=CHUNK)
        cache = returned_cache(model(self.ids[:, :PREFIX], use_cache=True))
        self.kv = kv_from_cache(cache, self.layout)
        self.logits = self.next_logits(cache)

    @functools.cached_property
    def answer(self) -> list[int]:
        return self.greedy(cache_from_kv(self.kv, model_or_config=self.model))

    def next_logits(self, cache: DynamicCache) -> torch.Tensor:
        """float32 `[tokens, vocabulary]` of the tokens after the prefix."""
        return self.model(self.ids[:, PREFIX:], **passed_cache(self.model, cache)).logits[0].float()

    def greedy(self, cache: DynamicCache) -> list[int]:
        out = self.model.generate(
            self.ids, attention_mask=torch.ones_like(self.ids), do_sample=False, min_new_tokens=16,
            max_new_tokens=16, **passed_cache(self.model, cache),
        )  # fmt: skip
        return out[0, self.ids.shape[1] :].tolist()  # type: ignore[no-any-return]

    def stored(self, quality: str) -> np.ndarray[Any, Any]:
        """The prefix as it comes back from one object a chunk."""
        chunks = []
        for first in range(0, PREFIX, CHUNK):
            chunk = codec.token_slice(self.kv, first, first + CHUNK)
            blob = codec.encode(chunk, self.layout, quality=quality, first_position=first)
            chunks.append(codec.decode(blob, self.layout))
        return np.concatenate(chunks, axis=2)


@pytest.fixture(scope="module")
def prefilled(smollm2: tuple[Any, Any]) -> Prefilled:
    return Prefilled(*smollm2)


def unrotated(k: torch.Tensor, layer: codec.LayerSpec, first_position: int) -> np.ndarray[Any, Any]:
    """`k` `[tokens, kv_heads, dim]` turned back by the codec's own tables, in float64."""
    rotation = rotation_for(layer, first_position, k.shape[0])
    assert rotation is not None
    cos, sin, pairs = rotation.cos[:, None], rotation.sin[:, None], rotation.cos.shape[1]
    values = k.double().numpy()
    a, b = values[..., :pairs], values[..., pairs : 2 * pairs]
    return np.concatenate([a * cos + b * sin, b * cos - a * sin, values[..., 2 * pairs :]], axis=-1)


def spread(keys: np.ndarray[Any, Any]) -> float:
    """How far the keys of a repeated token are apart, relative to the largest component."""
    return float(np.abs(keys - keys[:1]).max() / np.abs(keys).max())


@pytest.mark.slow
def test_the_layout_of_a_real_model(prefilled: Prefilled) -> None:
    assert prefilled.layout == codec.KVLayout.uniform(
        model="SmolLM2-135M-Instruct", revision=weights_revision(prefilled.model), num_layers=30, kv_heads=3,
        head_dim=64, dtype="bfloat16", chunk_tokens=256, rope=codec.RoPE(theta=100000.0),
    )  # fmt: skip
    other = layout_for(prefilled.model, chunk_tokens=64, revision="r1", model_id="mine")
    assert (other.chunk_tokens, other.revision, other.model) == (64, "r1", "mine")


@pytest.mark.slow
@pytest.mark.parametrize("quality", ["raw", "lossless"])
def test_an_exact_quality_continues_to_the_bit(prefilled: Prefilled, quality: str) -> None:
    kv = prefilled.stored(quality)
    assert torch.equal(prefilled.next_logits(cache_from_kv(kv, model_or_config=prefilled.model)), prefilled.logits)
    assert prefilled.greedy(cache_from_kv(kv, model_or_config=prefilled.model)) == prefilled.answer
    assert len(prefilled.answer) == 16


@pytest.mark.slow
def test_high_quality_barely_moves_the_predictions(prefilled: Prefilled) -> None:
    """In float32: two ways to cut the prefill differ by KL 1.1e-3 in bfloat16, which would hide the codec's share."""
    model = copy.deepcopy(prefilled.model).float()

    def log_probabilities(kv: np.ndarray[Any, Any]) -> torch.Tensor:
        cache = cache_from_kv(kv.astype(np.float32), model_or_config=model)
        logits: torch.Tensor = model(prefilled.ids[:, PREFIX:], **passed_cache(model, cache)).logits[0]
        return logits.log_softmax(-1)

    exact, high = log_probabilities(prefilled.stored("raw")), log_probabilities(prefilled.stored("high"))
    kl = torch.nn.functional.kl_div(high, exact, log_target=True, reduction="none").sum(-1).mean().item()
    assert 0 < kl < 3e-4  # measured: 5.7e-5 (medium 6.8e-4, low 5.1e-3)


@pytest.mark.slow
def test_keys_are_unrotated_by_their_real_positions(prefilled: Prefilled) -> None:
    """One token, repeated: in front of the rotation every position has the same key, in every layer."""
    layout = prefilled.layout
    cache = cache_of(prefilled.model, PREFIX, token=int(prefilled.ids[0, 40]))
    chunk = kv_from_cache(cache, layout, CHUNK)
    for (k, _), (k0, _), layer in zip(chunk, kv_from_cache(cache, layout, 0, 1), layout.layers, strict=True):
        at_zero = unrotated(k0, layer, 0)
        right, wrong = (spread(np.concatenate([at_zero, unrotated(k, layer, CHUNK + off)])) for off in (0, 1))
        assert right < 0.01 < wrong  # measured: at most 0.0067, at least 0.015

    def error(rope: codec.RoPE | None) -> float:
        """Of keys at quality "low", whose step follows how much the un-rotated keys vary."""
        other = replace(layout, layers=tuple(replace(layer, rope=rope) for layer in layout.layers))
        blob = codec.encode(chunk, other, quality="low", first_position=CHUNK)
        low = codec.decode(blob, other)[:, 0].astype(np.float32)
        return max(float(np.abs(got - k.float().numpy()).max()) for got, (k, _) in zip(low, chunk, strict=True))

    assert 20 * error(codec.RoPE(theta=100000.0)) < error(None)  # measured: 0.0039 against 0.53
    assert 20 * error(codec.RoPE(theta=100000.0)) < error(codec.RoPE(theta=10000.0))  # and 0.69


@pytest.mark.parametrize("model_type", sorted(integration.MODEL_TYPES))
def test_every_known_model_type_is_unrotated(model_type: str) -> None:
    changes: dict[str, Any] = {"sliding_window": None} if model_type == "mistral" else {}
    model = tiny(model_type, **changes)
    layout = layout_for(model)
    kv = kv_from_cache(cache_of(model, 300), layout)
    assert len(kv) == layout.num_layers == 2
    for (k, _), layer in zip(kv, layout.layers, strict=True):
        assert spread(unrotated(k, layer, 0)) < 1e-4 < 0.1 < spread(k.double().numpy())
    restored = cache_of(model, 3, past=cache_from_kv(kv, model_or_config=model))
    assert torch.equal(restored.layers[1].keys, cache_of(model, 3, past=cache_of(model, 300)).layers[1].keys)


@pytest.mark.parametrize(
    ("model_type", "rope", "expected"),
    [
        ("llama", {"rope_type": "linear", "factor": 4.0}, codec.RoPE(5e5, scaling=codec.RopeScaling("linear", 4.0))),
        (
            "llama",
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 512},
            codec.RoPE(5e5, scaling=codec.RopeScaling("llama3", 8.0, 1.0, 4.0, 512)),
        ),
        ("stablelm", {"rope_type": "default", "partial_rotary_factor": 0.5}, codec.RoPE(5e5, rotary_dims=8)),
    ],
)  # fmt: skip
def test_scaled_and_partial_rope(model_type: str, rope: dict[str, Any], expected: codec.RoPE) -> None:
    model = tiny(model_type, rope_parameters={"rope_theta": 5e5, **rope})
    layout = layout_for(model)
    assert layout.layers[0].rope == expected
    for k, _ in kv_from_cache(cache_of(model, 900), layout):
        assert spread(unrotated(k, layout.layers[0], 0)) < 1e-3


def test_views_of_the_cache_share_its_memory_and_survive_its_growth() -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    layout, cache = layout_for(model), cache_of(model)
    kv = kv_from_cache(cache, layout, 2, 7)
    for (k, v), layer in zip(kv, cache.layers, strict=True):
        assert k.shape == v.shape == (5, 2, 16)
        assert k.untyped_storage().data_ptr() == layer.keys.untyped_storage().data_ptr()
        assert v.untyped_storage().data_ptr() == layer.values.untyped_storage().data_ptr()
    read: list[Any] = list(arrays.planes(kv, layout))  # what the codec reads: still the cache's memory
    assert read[0].ctypes.data == kv[0][0].data_ptr() == cache.layers[0].keys[0, 0, 2].data_ptr()
    assert read[0].strides == (32, 256, 2)

    before = [(k.clone(), v.clone()) for k, v in kv]
    cache_of(model, past=cache)
    assert cache.get_seq_length() == 16
    assert all(
        torch.equal(a, b) for pair, copy_ in zip(kv, before, strict=True) for a, b in zip(pair, copy_, strict=True)
    )


def test_every_form_of_kv_gives_the_same_cache() -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    layout = layout_for(model, chunk_tokens=16)
    pairs = kv_from_cache(cache_of(model), layout)
    array = codec.decode(codec.encode(pairs, layout, quality="raw"), layout)
    assert array.dtype == ml_dtypes.bfloat16
    frozen = array.copy()
    frozen.flags.writeable = False
    whole = torch.stack([torch.stack(pair) for pair in pairs])
    as_arrays = [(array[layer, 0], array[layer, 1]) for layer in range(2)]
    for kv in (pairs, array, frozen, whole, as_arrays):
        cache = cache_from_kv(kv, 5, model_or_config=model.config)
        assert cache.get_seq_length() == 5
        for layer, (k, v) in zip(cache.layers, pairs, strict=True):
            assert torch.equal(layer.keys, k[:5].transpose(0, 1)[None])
            assert torch.equal(layer.values, v[:5].transpose(0, 1)[None])
    cache = cache_from_kv(array, model_or_config=model)
    expected = cache.layers[0].keys.clone()
    array[...] = 0  # a caller's buffer, used again
    assert torch.equal(cache.layers[0].keys, expected)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import kvstore_client, sys; print('torch' in sys.modules, 'transformers' in sys.modules)", "False False"),
        (
            "import sys; sys.modules['torch'] = None\ntry: import kvstore_client.integrations.transformers\n"
            "except ImportError as error: print(error)",
            "this needs torch and transformers: pip install 'llm-kvstore[transformers]'",
        ),
    ],
)
def test_torch_is_needed_only_here(code: str, expected: str) -> None:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == expected
