"""Engines that the connector cannot serve right are refused, with the reason; vLLM's objects by their fields."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvstore_client import InvalidArgument
from kvstore_client.integrations.vllm.engine import check_version, facts_of, pages_of

LAYERS = [f"model.layers.{number}.self_attn.attn" for number in (10, 2, 0, 1, *range(3, 10))]


class FullAttentionSpec(SimpleNamespace):
    pass


class SlidingWindowSpec(SimpleNamespace):
    pass


def spec(kind: type[SimpleNamespace] = FullAttentionSpec, **changes: Any) -> SimpleNamespace:
    fields: dict[str, Any] = {
        "block_size": 4, "num_kv_heads": 2, "head_size": 8, "head_size_v": 8, "dtype": torch.bfloat16,
        "sliding_window": None, "attention_chunk_size": None,
    }  # fmt: skip
    return kind(**{**fields, **changes})


def cache(*specs: SimpleNamespace, names: list[str] = LAYERS) -> SimpleNamespace:
    groups = [SimpleNamespace(layer_names=names, kv_cache_spec=each) for each in specs]
    return SimpleNamespace(kv_cache_groups=groups, num_blocks=3)


def engine(**parallel: int) -> SimpleNamespace:
    sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "decode_context_parallel_size": 1, **parallel}
    model = SimpleNamespace(
        dtype=torch.bfloat16, hf_text_config=SimpleNamespace(num_hidden_layers=11), model="m", revision=None,
        hf_overrides={}, quantization=None, get_total_num_kv_heads=lambda: 2,
    )  # fmt: skip
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**sizes), model_config=model, load_config=SimpleNamespace(load_format="auto")
    )


@pytest.mark.parametrize("version", ["0.29.0", "0.31.0", "0.32.0", "0.32.1+cpu", "0.32"])
def test_known_versions(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.28.2", "0.33.0", "0.320.0", "dev"])
def test_other_versions_are_refused_with_those_that_are_known(version: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"knows vLLM 0\.29, 0\.30, 0\.31, 0\.32: .*found={version}"):
        check_version(version)


def test_an_engine_that_is_supported() -> None:
    facts, page_tokens = facts_of(engine(), cache(spec()))
    assert (facts.num_layers, facts.kv_heads, facts.head_dim, facts.dtype, page_tokens) == (11, 2, 8, "bfloat16", 4)


def test_a_worker_of_several_has_a_part_of_the_models_heads() -> None:
    """What decides the KV is the model's, however many workers share it."""
    assert facts_of(engine(tensor_parallel_size=2), cache(spec(num_kv_heads=1))) == facts_of(engine(), cache(spec()))


@pytest.mark.parametrize(
    ("parallel", "specs", "message"),
    [
        ({"tensor_parallel_size": 4}, [spec(num_kv_heads=1)], "workers that hold the same ones are not supported"),
        ({"pipeline_parallel_size": 2}, [spec()], "pipeline_parallel_size must be 1 here"),
        ({"decode_context_parallel_size": 2}, [spec()], "decode_context_parallel_size must be 1"),
        ({}, [spec(SlidingWindowSpec)], "only models with full attention.*SlidingWindowSpec"),
        ({}, [spec(), spec()], "only models with full attention"),
        ({}, [], "only models with full attention"),
        ({}, [spec(sliding_window=128)], "only full attention"),
        ({}, [spec(head_size_v=4)], "keys as wide as values"),
        ({}, [spec(dtype=torch.uint8)], "leave --kv-cache-dtype at auto"),
    ],
)
def test_engines_that_are_refused(parallel: dict[str, int], specs: list[SimpleNamespace], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        facts_of(engine(**parallel), cache(*specs))


def test_layers_without_a_cache_of_their_own_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"for each of the model's layers.*caches=10, layers=11"):
        facts_of(engine(), cache(spec(), names=LAYERS[1:]))


def test_a_stage_of_a_pipeline_has_some_of_the_models_layers() -> None:
    """What decides the KV is the model's, however many stages share it."""
    names = [f"model.layers.{number}.self_attn.attn" for number in (8, 7, 10, 9)]
    two = engine(pipeline_parallel_size=2)
    assert facts_of(two, cache(spec(), names=names), range(7, 11)) == facts_of(engine(), cache(spec()))


@pytest.mark.parametrize("stage", [range(11), range(6, 11), range(8, 11)])
def test_a_stage_with_other_layers_than_it_should_have_is_refused(stage: range) -> None:
    """Whose caches are shared among layers, or which has a draft model's."""
    names = [f"model.layers.{number}.self_attn.attn" for number in range(7, 11)]
    with pytest.raises(InvalidArgument, match=rf"for each of the model's layers.*caches=4, layers={len(stage)}"):
        facts_of(engine(pipeline_parallel_size=2), cache(spec(), names=names), stage)


def with_attention(update: Any) -> SimpleNamespace:
    layer = SimpleNamespace(impl=SimpleNamespace(do_kv_cache_update=update))
    return SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=dict.fromkeys(LAYERS, layer)))


def packed(layer: Any, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
    """As an attention with pages `[blocks, kv_heads, page_tokens, 2·dim]` writes."""
    for at, slot in enumerate(slots.tolist()):
        pages[slot // 4, :, slot % 4] = torch.cat([k[at], v[at]], 1)


def test_pages_come_in_the_models_order_and_are_the_engines_memory() -> None:
    tensors = {name: torch.full((3, 2, 4, 16), float(name.split(".")[2]), dtype=torch.bfloat16) for name in LAYERS}
    caches = pages_of(with_attention(packed), cache(spec()), tensors)
    assert [int(k[1, 0, 0, 0]) for k, _ in caches] == list(range(11))
    assert caches[0][0].shape == (3, 4, 2, 8)
    caches[5][1][2] = np.array(99)
    assert (tensors["model.layers.5.self_attn.attn"][2, :, :, 8:] == 99).all()
    assert (tensors["model.layers.5.self_attn.attn"][2, :, :, :8] == 5).all()


def test_pages_of_a_stage() -> None:
    names = [name for name in LAYERS if int(name.split(".")[2]) >= 7]
    tensors = {name: torch.full((3, 2, 4, 16), float(name.split(".")[2]), dtype=torch.bfloat16) for name in names}
    stage = cache(spec(), names=names)
    caches = pages_of(with_attention(packed), stage, tensors, range(7, 11))
    assert [int(k[1, 0, 0, 0]) for k, _ in caches] == [7, 8, 9, 10]
    for other in (range(4), range(6, 10), None):  # as many, but others
        with pytest.raises(InvalidArgument, match=r"do not tell their order.*layers\.10"):
            pages_of(with_attention(packed), stage, tensors, other)


@pytest.mark.parametrize(
    ("update", "shape", "names", "message"),
    [
        (packed, (6, 2, 4, 16), LAYERS, "cut into smaller ones"),
        (lambda *_: None, (3, 2, 4, 16), LAYERS, "no order that is known"),
        (packed, (3, 2, 4, 16), ["layer.a.attn"], "no number"),
        (packed, (3, 2, 4, 16), ["layers.1.attn", "layers.2.attn"], "do not tell their order"),
    ],
)
def test_memory_that_is_refused(update: Any, shape: tuple[int, ...], names: list[str], message: str) -> None:
    tensors = dict.fromkeys(LAYERS, torch.zeros(shape, dtype=torch.bfloat16))
    with pytest.raises(InvalidArgument, match=message):
        pages_of(with_attention(update), cache(spec(), names=names), tensors)
