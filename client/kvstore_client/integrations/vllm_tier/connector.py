"""`KVStoreOffloadingConnector`: vLLM's offloading connector, which tells kvstore's tier what vLLM does not.

A secondary tier is given rows and names of chunks. That is not enough to keep one engine's KV from another's: a block's
hash covers neither weights nor settings, and the order of a page is the attention backend's business. This connector
sees both, and refuses what is not known to be right; all else is vLLM's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector

from kvstore_client.errors import InvalidArgument
from kvstore_client.integrations.vllm.engine import check_version, facts_of, order_of
from kvstore_client.integrations.vllm.identity import layout_of
from kvstore_client.integrations.vllm.pages import PageOrder, PageShape
from kvstore_client.integrations.vllm_tier import VERSIONS
from kvstore_client.integrations.vllm_tier.rows import HEADS_FIRST, TOKENS_FIRST
from kvstore_client.integrations.vllm_tier.tier import KVStoreTierManager

_HASHES = ("sha256", "sha256_cbor")


class KVStoreOffloadingConnector(OffloadingConnector):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Raises InvalidArgument, when the engine starts, for what it cannot do right: the reason and the remedy."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        check_version(vllm.__version__, VERSIONS)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        extra.setdefault("spec_name", "TieringOffloadingSpec")
        tiers = [tier for tier in extra.get("secondary_tiers", []) if tier.get("type") == KVStoreTierManager.__name__]
        if not tiers:
            raise InvalidArgument(
                f'name a tier of kvstore in kv_connector_extra_config: "secondary_tiers": [{{"type": '
                f'"{KVStoreTierManager.__name__}", "module_path": "kvstore_client.integrations.vllm_tier", '
                f'"address": "127.0.0.1:7070"}}]'
            )
        facts, _ = facts_of(vllm_config, kv_cache_config)
        _check_names(vllm_config)
        if role is KVConnectorRole.SCHEDULER:  # where tiers live
            config = build_offloading_config(vllm_config, kv_cache_config)
            tokens = config.groups[0].tokens_per_block * config.cache.blocks_per_chunk
            for tier in tiers:
                layout = layout_of(facts, chunk_tokens=tokens, revision=tier.get("revision"))
                tier["layout"] = layout.canonical_bytes.decode()
        super().__init__(vllm_config, role, kv_cache_config)

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        check_pages(self._vllm_config, self._kv_cache_config, kv_caches)
        super().register_kv_caches(kv_caches)


def check_pages(vllm_config: Any, kv_cache_config: Any, kv_caches: Mapping[str, torch.Tensor]) -> None:
    """That pages are what their declared order says and rows are made of: [blocks, kv_heads, page_tokens, 2·dim], K and
    V of a token and head side by side, heads or tokens first in memory. Raises InvalidArgument.

    The declaration is no proof: a backend may cut blocks into smaller ones, or lay their inside down as it likes."""
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    shape = PageShape(spec.block_size, spec.num_kv_heads, spec.head_size)
    slot, declared = 2 * shape.dim, vllm_config.cache_config.kv_cache_layout
    strides = {
        TOKENS_FIRST: (slot, shape.kv_heads * slot, 1),
        HEADS_FIRST: (shape.page_tokens * slot, slot, 1),
    }.get(declared)
    for name in kv_cache_config.kv_cache_groups[0].layer_names:
        pages = kv_caches[name]
        order = order_of(vllm_config, name, pages, shape)
        if order is not PageOrder.PACKED_HND or tuple(pages.stride()[1:]) != strides:
            raise InvalidArgument(
                f"pages do not lie as rows of the CPU tier are read: set VLLM_KV_CACHE_LAYOUT to {TOKENS_FIRST} or "
                f"{HEADS_FIRST}, or use another attention backend", declared=declared, found=order.value,
                strides=tuple(pages.stride()),
            )  # fmt: skip


def _check_names(vllm_config: Any) -> None:
    """That vLLM's hashes name a chunk by all that decides it."""
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if algorithm not in _HASHES:
        raise InvalidArgument(
            f"its hashes are no names to trust: set --prefix-caching-hash-algo to {_HASHES[0]}", got=algorithm
        )
    if vllm_config.lora_config is not None:
        raise InvalidArgument(
            "vLLM's hashes know an adapter by its name and path alone: use KVStoreConnector, which reads its files"
        )
