"""Whose KV it is: the namespace of an engine, by its own configuration, and what tells requests of it apart.

vLLM's block hashes are not used: they cover tokens, adapter name, content and salt, but neither weights nor dtype nor
shapes. Chunks are named by kvstore's own chain, over the tokens, within a namespace of all the rest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

from kvstore_client.client import Client, Namespace, PartsNamespace
from kvstore_client.errors import InvalidArgument
from kvstore_client.integrations.hf_config import MODEL_TYPES, rope_of
from kvstore_codec import Extras, KVLayout, MultimodalItem, Partition, RoPE

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf", "config.json", "adapter_config.json")
_LOAD_FORMATS = {"auto", "hf", "safetensors", "pt", "fastsafetensors", "mistral", "gguf"}  # they read the files
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAMESPACES_MAX = 1024


@dataclass(frozen=True)
class EngineFacts:
    """What decides an engine's KV, in plain values. `config`: Hugging Face's, of the language model; `overrides`: every
    setting beside the model's files that changes what it computes."""

    model: str
    revision: str | None
    load_format: str
    dtype: str
    config: Any
    overrides: Mapping[str, Any]
    num_layers: int
    kv_heads: int
    head_dim: int


def layout_of(
    facts: EngineFacts, *, chunk_tokens: int, revision: str | None, layer_groups: int = 1, head_groups: int = 1
) -> KVLayout:
    """`revision`: in place of a digest of the weights. How many workers the engine has is no part of it: `layer_groups`
    and `head_groups` are what those who share agree on. Raises InvalidArgument where the weights cannot be known."""
    weights = revision or weights_of(facts.model, facts.revision, facts.load_format)
    rope = _rope(facts)
    # A rotation that a layout cannot name is told apart by what the configuration says of it.
    unnamed = None if rope else getattr(facts.config, "rope_parameters", None)
    said = json.dumps(
        {"weights": weights, "overrides": dict(facts.overrides), "rope": unnamed}, sort_keys=True, default=_refuse
    )  # fmt: skip
    digest = hashlib.blake2b(said.encode(), digest_size=32, person=b"kvstore.vllm").hexdigest()
    return KVLayout.uniform(
        model=PurePath(facts.model).name, revision=f"vllm:{digest}", num_layers=facts.num_layers,
        kv_heads=facts.kv_heads, head_dim=facts.head_dim, dtype=facts.dtype, chunk_tokens=chunk_tokens, rope=rope,
        partition=Partition(layer_groups, head_groups),
    )  # fmt: skip


def weights_of(model: str, revision: str | None, load_format: str) -> str:
    """A digest of a local model's weights (read once: about a second a gigabyte), or the commit of one from the hub.
    Raises InvalidArgument where the weights cannot be known so."""
    remedy = 'say which weights these are with "revision" in kv_connector_extra_config'
    if load_format not in _LOAD_FORMATS:
        raise InvalidArgument(f"weights loaded as {load_format!r} are not those of the model's files: {remedy}")
    if Path(model).is_dir():
        return digest_of(model)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json", revision=revision or "main")
    commit = Path(config).parent.name if isinstance(config, str) else ""
    if not _COMMIT.fullmatch(commit):
        raise InvalidArgument(f"no folder and not in the hub's cache: {remedy}", model=model)
    return f"commit:{commit}"


def digest_of(folder: str) -> str:
    """ "blake2b:" and 64 hex digits, of the weights and configuration of a model or an adapter. Read again only where a
    file has changed. Raises InvalidArgument where there are none, OSError."""
    files = sorted({path for pattern in _WEIGHTS for path in Path(folder).glob(pattern)})
    if not any(path.suffix != ".json" for path in files):
        raise InvalidArgument("no weights in this folder", folder=folder)
    stats = [(str(path), path.stat()) for path in files]
    return _digest(tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


@dataclass(frozen=True)
class RequestKey:
    """What beside tokens decides a request's KV, as its engine says it. `adapter`: name and folder."""

    adapter: tuple[str, str] | None = None
    salt: str | None = None
    content: tuple[tuple[int, int, str], ...] = ()  # position, length, digest

    @classmethod
    def of(cls, request: Any) -> RequestKey | None:
        """Of a vLLM request; None where tokens do not tell its KV: embeddings as prompt, or a prompt that grows."""
        if request.prompt_token_ids is None or request.prompt_embeds is not None or request.resumable:
            return None
        lora, features = request.lora_request, request.mm_features
        return cls(
            None if lora is None else (lora.lora_name, lora.lora_path),
            request.cache_salt,
            tuple((each.mm_position.offset, each.mm_position.length, each.identifier) for each in features),
        )

    def extras(self) -> Extras | None:
        """An adapter counts by its name and its files' digest. Raises InvalidArgument, OSError where it has none."""
        if self == RequestKey():
            return None
        lora = None if self.adapter is None else f"{self.adapter[0]} {digest_of(self.adapter[1])}"
        return Extras(lora, self.salt, tuple(MultimodalItem(*item) for item in self.content))


class Namespaces:
    """The namespaces of an engine's requests: of all their KV, or of what a worker has of it, which is the layers
    `stage`, and of these the heads of `rank` of `workers`. Its calls may be made from any thread."""

    def __init__(
        self, client: Client, layout: KVLayout, *, stage: range | None = None, rank: int = 0, workers: int = 1
    ) -> None:  # fmt: skip
        self.layout = layout
        parts = _parts_of(layout, stage or range(layout.num_layers), rank, workers)

        def made(extras: Extras | None) -> Namespace | PartsNamespace:
            if len(parts) == 1:
                return client.namespace(layout, part=parts[0], extras=extras)
            return client.parts(layout, parts, extras=extras)

        self._of_extras = lru_cache(_NAMESPACES_MAX)(made)

    def of(self, key: RequestKey) -> Namespace | PartsNamespace:
        """Raises InvalidArgument, OSError where the request's adapter cannot be read."""
        return self._of_extras(key.extras())


def _parts_of(layout: KVLayout, stage: range, rank: int, workers: int) -> list[int]:
    """Raises InvalidArgument where they would not be just what the worker has."""
    partition = layout.partition
    layers, heads = layout.num_layers // partition.layer_groups, partition.head_groups // workers
    if stage.start % layers or stage.stop % layers or partition.head_groups % workers:
        raise InvalidArgument(
            "a worker must have whole groups of layers and of heads", layer_groups=partition.layer_groups,
            head_groups=partition.head_groups, layers=f"{stage.start}-{stage.stop}", workers=workers,
        )  # fmt: skip
    return [
        layer_group * partition.head_groups + head_group
        for layer_group in range(stage.start // layers, stage.stop // layers)
        for head_group in range(rank * heads, (rank + 1) * heads)
    ]


def _rope(facts: EngineFacts) -> RoPE | None:
    """None where a layout cannot name how keys rotate: they are stored as they are."""
    if getattr(facts.config, "model_type", None) not in MODEL_TYPES:
        return None
    try:
        return rope_of(facts.config, facts.head_dim)
    except InvalidArgument:
        return None


@lru_cache(256)
def _digest(files: Sequence[tuple[str, int, int]]) -> str:
    digest = hashlib.blake2b(digest_size=32, person=b"kvstore.files")
    for name, size_bytes, _ in files:
        digest.update(f"{PurePath(name).name}\0{size_bytes}\0".encode())
        with Path(name).open("rb") as file:
            while some := file.read(1 << 24):
                digest.update(some)
    return f"blake2b:{digest.hexdigest()}"


def _refuse(value: object) -> Any:
    raise InvalidArgument("a setting that cannot be written down cannot be part of an identity", value=repr(value))
