"""Hugging Face transformers: a model's layout, and `DynamicCache` to `kv` and back.

How to try kvstore on your own model, with a node running (`kvstore serve`):

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    ids = AutoTokenizer.from_pretrained(path)(prompt, return_tensors="pt").input_ids
    tokens = ids[0].tolist()
    with Client("127.0.0.1:7070") as client, torch.no_grad():
        layout = layout_for(model)
        store = client.namespace(layout)
        # The process that prefills:
        cache = returned_cache(model(ids, use_cache=True, logits_to_keep=1))
        store.put(tokens, kv_from_cache(cache, layout), quality="lossless")
        # Any other process with the same weights:
        kv, n = store.get(tokens)
        n = min(n, len(tokens) - 1)  # a model needs at least one new token to give logits
        past = cache_from_kv(kv, n, model_or_config=model) if n else None
        answer = model.generate(ids, max_new_tokens=64, **passed_cache(model, past))

What is stored are whole chunks (256 tokens unless `layout_for` is told otherwise) from the prompt's start; the
model computes the rest. One sequence at a time, without padding: token i is at position i. Models whose attention
is full in every layer and whose keys rotate as Llama's do are supported (`MODEL_TYPES`); everything else is an
InvalidArgument, never a wrong layout.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from kvstore_client.errors import InvalidArgument, Unavailable
from kvstore_client.integrations.hf_config import MODEL_TYPES as MODEL_TYPES
from kvstore_client.integrations.hf_config import OTHERS, rope_of
from kvstore_codec import KVArray, KVLayout, LayerSpec
from kvstore_codec.rope import rotation_for

try:
    import torch
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer
except ImportError as error:
    raise ImportError("this needs torch and transformers: pip install 'llm-kvstore[transformers]'") from error

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_HASHED_BYTES = 64 << 20  # how much of a weight is made contiguous, or brought from an accelerator, at a time


def layout_for(
    model: Any, *, chunk_tokens: int = 256, revision: str | None = None, model_id: str | None = None
) -> KVLayout:
    """How `model` (a PreTrainedModel) caches: layers, KV heads, head_dim, rope, and the dtype it computes in.

    `revision` defaults to `weights_revision(model)`, which reads every weight once. `model_id` defaults to the last
    part of the name or path that the model was loaded from, so that a hub id and a local copy are one namespace.

    Raises InvalidArgument for a model that is not full attention in Llama's style (sliding windows, latent or
    recurrent caches, quantised caches, unknown rope), LayoutError for chunk_tokens out of range.
    """
    config = model.config.get_text_config(decoder=True)
    _check_cache_kind(model, config)
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise InvalidArgument(f"the model computes in {dtype}: load it with dtype=torch.bfloat16, float16 or float32")
    head_dim = _head_dim(config)
    rope = rope_of(config, head_dim)
    _check_frequencies(model, LayerSpec(_kv_heads(config), head_dim, head_dim, rope=rope))
    return KVLayout.uniform(
        model=model_id or PurePath(model.config._name_or_path).name or config.model_type,
        revision=revision or weights_revision(model), num_layers=config.num_hidden_layers,
        kv_heads=_kv_heads(config), head_dim=head_dim, dtype=dtype, chunk_tokens=chunk_tokens, rope=rope,
    )  # fmt: skip


def passed_cache(model: Any, cache: Any) -> dict[str, Any]:
    """`cache` as the keyword argument of `model`'s forward and generate: transformers renamed it within version 5."""
    renamed = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if renamed else "past_key_values": cache}


def returned_cache(output: Any) -> Any:
    """The cache in what a model returned."""
    renamed = "cache" in output
    return output.cache if renamed else output.past_key_values


def weights_revision(model: Any) -> str:
    """ "blake2b:" and 64 hex digits: a digest of the parameters' and persistent buffers' names, dtypes, shapes, bytes.

    Other weights, adapters included, are another namespace. Tied weights count once. The configuration is not
    covered, beyond what is in the layout.

    Reads all weights once, about a second a gigabyte on one core (the GIL is released) and what the copy to the
    host costs where they lie on an accelerator; extra memory is about 64 MiB. For big models compute it once and
    pass it to `layout_for` as `revision`. Raises InvalidArgument for weights that are not loaded (meta device).
    """
    persistent = model.state_dict()
    tensors = dict(model.named_parameters())
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    digest = hashlib.blake2b(digest_size=32, person=b"kvstore.weights")
    for name, tensor in sorted(tensors.items()):
        if tensor.device.type == "meta":
            raise InvalidArgument("a weight is not loaded: pass a model without offloading, or revision=", weight=name)
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        for part in _slices(tensor.detach()):
            digest.update(part.contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return f"blake2b:{digest.hexdigest()}"


def kv_from_cache(
    cache: Any, layout: KVLayout, first: int = 0, last: int | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens [first, last) of a DynamicCache as the codec takes them: a (k, v) a layer, `[tokens, kv_heads, dim]`.

    Views of the cache's memory, without a copy, where it lies on the CPU; copies from accelerators. They stay as
    they are when the cache grows, because it grows into new memory. `last` defaults to all tokens.

    Raises InvalidArgument: no DynamicCache, a batch, a window, tokens it does not hold, or not what `layout` says.
    """
    layers = cache.layers if isinstance(cache, DynamicCache) else [cache]
    foreign = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if foreign:
        raise InvalidArgument("only a DynamicCache with full attention in every layer can be stored", got=foreign)
    tokens = int(cache.get_seq_length())
    last = tokens if last is None else last
    if not 0 <= first < last <= tokens:
        raise InvalidArgument("the cache does not hold these tokens", first=first, last=last, tokens=tokens)
    if len(layers) != layout.num_layers:
        raise InvalidArgument("cache and layout differ in layers", got=len(layers), expected=layout.num_layers)
    pairs = []
    for index, (layer, spec) in enumerate(zip(layers, layout.layers, strict=True)):
        for name, tensor, dim in (("keys", layer.keys, spec.k_dim), ("values", layer.values, spec.v_dim)):
            _check_cached(f"{name} of layer {index}", tensor, (1, spec.kv_heads, tokens, dim), layout.dtype)
        k, v = (tensor[0, :, first:last].transpose(0, 1).cpu() for tensor in (layer.keys, layer.values))
        pairs.append((k, v))
    return pairs


def cache_from_kv(kv: KVArray, tokens: int | None = None, *, model_or_config: Any) -> DynamicCache:
    """The first `tokens` tokens of `kv` (default: all) as a cache for forward and generate (see `passed_cache`).

    `kv`: what `Namespace.get` and `codec.decode` return, `[layers, 2, tokens, kv_heads, head_dim]` or a list of
    (k, v), numpy or torch. It is copied once, to the model's device; `kv` may be reused afterwards. A model needs at
    least one token that is not in the cache to give logits, so pass at most the prompt's length less one.

    Raises InvalidArgument where `kv` does not fit the model or holds fewer than `tokens` tokens.
    """
    config = getattr(model_or_config, "config", model_or_config).get_text_config(decoder=True)
    device = getattr(model_or_config, "device", "cpu")
    pairs = _pairs(kv, config.num_hidden_layers)
    held = int(pairs[0][0].shape[0])
    tokens = held if tokens is None else tokens
    if not 1 <= tokens <= held:
        raise InvalidArgument("kv does not hold that many tokens", tokens=tokens, held=held)
    cache = DynamicCache()
    for index, pair in enumerate(pairs):
        k, v = (_as_torch(plane[:tokens]) for plane in pair)
        for name, plane in (("k", k), ("v", v)):
            _check_plane(f"{name} of layer {index}", plane, (tokens, _kv_heads(config), _head_dim(config)), k.dtype)
        _check_dtype(k, getattr(model_or_config, "dtype", None))
        cache.update(*(plane.to(device).transpose(0, 1).unsqueeze(0) for plane in (k, v)), index)
    return cache


class WritingCache(DynamicCache):  # type: ignore[misc]  # torch is not typed here
    """A cache for one prefill that hands each layer to a writer when the model has computed it:

        with store.writer(tokens) as writer:
            model(ids, **passed_cache(model, WritingCache(writer)), logits_to_keep=1)

    `past`: a cache with the tokens before the writer's `first_token`, which goes on in this one. What is computed after
    the prefill is not written. An accelerator's KV is copied to the host layer by layer.
    """

    def __init__(self, writer: Any, past: DynamicCache | None = None) -> None:
        super().__init__()
        if past is not None:
            self.layers = past.layers
        self._writer, self._written = writer, 0

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Raises what `Writer.write` raises."""
        updated = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self._written:
            if key_states.shape[0] != 1:
                raise InvalidArgument("the model computes a batch: write one sequence at a time")
            self._writer.write(layer_idx, *(plane[0].transpose(0, 1).cpu() for plane in (key_states, value_states)))
            self._written += 1
        return updated


class FollowingCache(DynamicCache):  # type: ignore[misc]
    """A cache whose first tokens come out of a stream, each layer when the model's first step gets to it: that step
    computes while later layers are still being written.

        cache = FollowingCache(store.stream(tokens, wait=5.0), len(tokens) - 1, device=model.device)
        n = cache.get_seq_length()                    # 0 on a miss: an ordinary, empty cache
        model(ids[:, n:], **passed_cache(model, cache))

    At most `tokens_max` tokens are taken: a model needs at least one that is not in the cache to give logits. Making it
    waits for the first layer. The first step raises Unavailable where the stream ends before its last layer, because
    its writer died or was too slow; then start again, with what `Namespace.get` finds.
    """

    def __init__(self, stream: Any, tokens_max: int, *, device: Any = "cpu") -> None:
        super().__init__()
        self._stream, self._tokens_max, self._device = stream, tokens_max, device
        self._loaded = 0
        self._follows = self._load()

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Raises Unavailable, and what a strict client's stream raises."""
        while self._follows and self._loaded <= layer_idx:
            if not self._load():
                raise Unavailable("the stream ended before this layer", layer=self._loaded, reason=self._stream.reason)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _load(self) -> bool:
        """Whether there was another layer."""
        following = next(self._stream, None)
        if following is None:
            return False
        layer, *planes = following
        tensors = (_as_torch(plane[: self._tokens_max]).to(self._device) for plane in planes)
        super().update(*(tensor.transpose(0, 1).unsqueeze(0) for tensor in tensors), layer)
        self._loaded += 1
        return True


def _check_cache_kind(model: Any, config: Any) -> None:
    """Raises InvalidArgument unless every layer caches K and V of all tokens, per head, in the model's dtype."""
    if getattr(config, "kv_lora_rank", None):
        raise InvalidArgument(f"{config.model_type} caches latents (MLA), not keys and values a head: {OTHERS}")
    if config.model_type not in MODEL_TYPES:
        raise InvalidArgument(f"no layout is known for model type {config.model_type}: {OTHERS}")
    kinds = set(getattr(config, "layer_types", None) or ()) or {
        "sliding_attention" if getattr(config, "sliding_window", None) is not None else "full_attention"
    }
    if kinds != {"full_attention"}:
        raise InvalidArgument(f"full attention in every layer is needed: {OTHERS}", got=",".join(sorted(kinds)))
    generation = getattr(model, "generation_config", None)
    if getattr(generation, "cache_implementation", None) == "quantized":
        raise InvalidArgument("the model's cache is quantised: unset generation_config.cache_implementation")


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _check_frequencies(model: Any, layer: LayerSpec) -> None:
    """The codec un-rotates by the config's frequencies; the model must rotate by the same.

    Casting a loaded model (`model.to(torch.bfloat16)`) rounds its table of frequencies too, by up to 0.2 %: at
    position 1000 such keys can be a radian off, and a layout that denies it would cost bits and precision.
    """
    rotation = rotation_for(layer, 1, 1)
    assert rotation is not None
    expected = np.arctan2(rotation.sin[0], rotation.cos[0])  # at position 1 the angle is the frequency
    tables = [buffer for name, buffer in model.named_buffers() if name.endswith("rotary_emb.inv_freq")]
    if not tables:
        raise InvalidArgument(f"the model has no table of rotary frequencies: {OTHERS}")
    for table in tables:
        if table.shape != expected.shape or not np.allclose(table.double().cpu().numpy(), expected, rtol=1e-5, atol=0):
            raise InvalidArgument(
                "the model rotates keys by other frequencies than its config says: load it with dtype= in place of "
                "casting it afterwards"
            )


def _slices(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """`tensor` along its first axis in slices of at most _HASHED_BYTES, a row at least."""
    if tensor.ndim == 0 or tensor.numel() == 0:
        return (tensor,)
    row_bytes = tensor.element_size() * tensor[0].numel()
    return tensor.split(max(1, _HASHED_BYTES // row_bytes))  # type: ignore[no-any-return]


def _check_cached(what: str, tensor: Any, expected: tuple[int, ...], dtype: str) -> None:
    if tensor is None:
        raise InvalidArgument(f"{what} are empty: layers that share a cache cannot be stored")
    if tensor.ndim == 4 and tensor.shape[0] != 1:
        raise InvalidArgument("the cache holds a batch: store one sequence at a time", batch=tensor.shape[0])
    _check_plane(what, tensor, expected, _DTYPES.get(dtype))


def _check_plane(what: str, tensor: torch.Tensor, expected: tuple[int, ...], dtype: torch.dtype | None) -> None:
    if tuple(tensor.shape) != expected:
        raise InvalidArgument(f"{what}: another shape", got=tuple(tensor.shape), expected=expected)
    if tensor.dtype != dtype:
        raise InvalidArgument(f"{what}: another dtype", got=tensor.dtype, expected=dtype)


def _check_dtype(k: torch.Tensor, computed: Any) -> None:
    """A cache of another dtype would silently be promoted by the model's first step."""
    if isinstance(computed, torch.dtype) and k.dtype != computed:
        raise InvalidArgument(
            "kv and model differ in dtype: load the model with the layout's", got=k.dtype, expected=computed
        )


def _pairs(kv: Any, layers: int) -> Any:
    """`kv`, when it is a K and a V for each of `layers` layers."""
    if isinstance(kv, list | tuple):
        shape: tuple[int, ...] = (len(kv), *{len(pair) for pair in kv})
    else:
        shape = tuple(getattr(kv, "shape", ()))[: 2 if getattr(kv, "ndim", 0) == 5 else 0]
    if shape != (layers, 2):
        raise InvalidArgument(
            "kv must be [layers, 2, tokens, kv_heads, head_dim] or one (k, v) a layer", got=shape, expected=(layers, 2)
        )
    return kv


def _as_torch(plane: Any) -> torch.Tensor:
    """A tensor on the plane's memory, except where that is read-only, which torch cannot express."""
    if isinstance(plane, torch.Tensor):
        return plane.detach()
    array = np.asarray(plane)
    if array.dtype.name not in _DTYPES:
        raise InvalidArgument("kv has a dtype that no model caches in", dtype=array.dtype)
    bits = array.view(np.dtype(f"i{array.itemsize}"))  # torch does not know ml_dtypes.bfloat16
    return torch.from_numpy(bits if bits.flags.writeable else bits.copy()).view(_DTYPES[array.dtype.name])
