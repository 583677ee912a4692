"""What an engine says of itself, and its memory: read from vLLM's configuration, tried out where it does not say.

All that is not known to be right is refused here, when the engine starts, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import ml_dtypes
import torch

from kvstore_client.errors import InvalidArgument
from kvstore_client.integrations.vllm.identity import EngineFacts
from kvstore_client.integrations.vllm.pages import PageOrder, PageShape, found_order, views
from kvstore_client.integrations.vllm.staging import PagePlane

VERSIONS = ("0.29", "0.30", "0.31", "0.32")  # what the integration tests ran on
_UNSHARDED = ("prefill_context_parallel_size", "decode_context_parallel_size")
_BITS = {2: torch.int16, 4: torch.int32}
_NUMPY = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: "float16", torch.float32: "float32"}
_NUMBER = re.compile(r"\.(\d+)\.")


def check_version(version: str, versions: Sequence[str] = VERSIONS) -> None:
    """Raises InvalidArgument."""
    if not any(version == known or version.startswith(f"{known}.") for known in versions):
        raise InvalidArgument(
            f"this connector knows vLLM {', '.join(versions)}: install one of these, or a newer llm-kvstore",
            found=version,
        )  # fmt: skip


def facts_of(vllm_config: Any, kv_cache_config: Any, stage: range | None = None) -> tuple[EngineFacts, int]:
    """(what decides the engine's KV, tokens of a block), where `kv_cache_config` has the layers `stage` of a pipeline;
    None: there is none. Raises InvalidArgument for an engine that is not supported."""
    model, parallel, spec = vllm_config.model_config, vllm_config.parallel_config, _spec(kv_cache_config)
    for name in _UNSHARDED if stage is not None else (*_UNSHARDED, "pipeline_parallel_size"):
        if getattr(parallel, name, 1) != 1:
            raise InvalidArgument(f"{name} must be 1 here: such shares of KV are not supported yet",
                                  got=getattr(parallel, name))  # fmt: skip
    workers, kv_heads = parallel.tensor_parallel_size, model.get_total_num_kv_heads()
    if spec.num_kv_heads * workers != kv_heads:
        raise InvalidArgument(
            "tensor_parallel_size must divide the model's KV heads: workers that hold the same ones are not supported "
            "yet", tensor_parallel_size=workers, kv_heads=kv_heads,
        )  # fmt: skip
    dtype = str(model.dtype).removeprefix("torch.")
    if spec.dtype != model.dtype or spec.dtype not in _NUMPY:
        raise InvalidArgument(
            "the KV cache must have the model's dtype: leave --kv-cache-dtype at auto", got=spec.dtype
        )
    caches, layers = len(kv_cache_config.kv_cache_groups[0].layer_names), model.hf_text_config.num_hidden_layers
    if caches != (layers if stage is None else len(stage)):
        raise InvalidArgument(
            "a KV cache for each of the model's layers is needed: none shared, none of a draft model",
            caches=caches, layers=layers if stage is None else len(stage),
        )  # fmt: skip
    overrides = {"hf_overrides": model.hf_overrides, "quantization": model.quantization}
    return EngineFacts(
        model=model.model, revision=model.revision, load_format=str(vllm_config.load_config.load_format), dtype=dtype,
        config=model.hf_text_config, overrides=overrides, num_layers=layers, kv_heads=kv_heads,
        head_dim=spec.head_size,
    ), spec.block_size  # fmt: skip


def pages_of(
    vllm_config: Any, kv_cache_config: Any, tensors: Mapping[str, torch.Tensor], stage: range | None = None
) -> list[tuple[PagePlane, PagePlane]]:
    """(k, v) of each layer in the model's order, as `PagedKV` has them: views of the engine's memory.
    `stage`: which layers must be there; None: as many as there are, from the first on.

    Raises InvalidArgument for memory that is laid out in no known way, or cannot be reached from here.
    """
    spec = _spec(kv_cache_config)
    shape = PageShape(spec.block_size, spec.num_kv_heads, spec.head_size)
    names = kv_cache_config.kv_cache_groups[0].layer_names
    caches = []
    for _, name in sorted(zip(layer_numbers(names, stage), names, strict=True)):
        pages = tensors[name]
        if pages.device.type != "cpu":
            raise InvalidArgument("KV on an accelerator is not supported yet", device=pages.device)
        order = order_of(vllm_config, name, pages, shape)
        k, v = (_as_numpy(plane) for plane in views(pages, order, shape))
        if k.shape[0] != kv_cache_config.num_blocks:
            raise InvalidArgument(
                "the engine's blocks are cut into smaller ones: set --block-size to what its attention takes",
                blocks=kv_cache_config.num_blocks, found=k.shape[0],
            )  # fmt: skip
        caches.append((k, v))
    return caches


def order_of(vllm_config: Any, name: str, pages: torch.Tensor, shape: PageShape) -> PageOrder:
    """How a layer's attention lays KV down in its pages. Raises InvalidArgument where that is in no known way."""
    layer = vllm_config.compilation_config.static_forward_context[name]
    if not hasattr(layer.impl, "do_kv_cache_update"):
        raise InvalidArgument("the attention backend does not say how it writes KV", backend=type(layer.impl))
    return found_order(pages, shape, partial(_write, layer, pages))


def layer_numbers(names: Sequence[str], expected: range | None = None) -> list[int]:
    """Which layer of the model each is. `expected`: all that there must be; None: as many as there are, from the first
    on. Raises InvalidArgument where the names do not tell, or others are there."""
    numbers = [_layer_number(name) for name in names]
    if sorted(numbers) != list(range(len(names)) if expected is None else expected):
        raise InvalidArgument("the layers' names do not tell their order", first=min(names), last=max(names))
    return numbers


def _write(layer: Any, pages: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Lets the engine's attention write tokens to its block 0."""
    layer.impl.do_kv_cache_update(layer, k, v, pages, torch.arange(len(k), dtype=torch.int64, device=pages.device))


def _spec(kv_cache_config: Any) -> Any:
    """The one KV cache group's spec."""
    groups = kv_cache_config.kv_cache_groups
    spec = groups[0].kv_cache_spec if groups else None
    if len(groups) != 1 or type(spec).__name__ != "FullAttentionSpec":
        raise InvalidArgument(
            "only models with full attention in every layer are supported yet",
            groups=",".join(type(group.kv_cache_spec).__name__ for group in groups),
        )  # fmt: skip
    assert spec is not None
    if spec.sliding_window is not None or spec.attention_chunk_size is not None or spec.head_size != spec.head_size_v:
        raise InvalidArgument("only full attention with keys as wide as values is supported yet")
    return spec


def _layer_number(name: str) -> int:
    found = _NUMBER.findall(name)
    if len(found) != 1:
        raise InvalidArgument("a layer's name has no number, or several", name=name)
    return int(found[0])


def _as_numpy(plane: torch.Tensor) -> PagePlane:
    array: PagePlane = plane.view(_BITS[plane.itemsize]).numpy().view(_NUMPY[plane.dtype])
    return array
