"""kvstore behind vLLM's own CPU offloading: a secondary tier and the connector that tells it whose KV it holds
(docs/vllm.md).

vLLM is imported when one of them is asked for, by vLLM itself.
"""

from __future__ import annotations

from typing import Any

__all__ = ["VERSIONS", "KVStoreOffloadingConnector", "KVStoreTierManager"]

VERSIONS = ("0.32",)  # whose interface of tiers this is


def __getattr__(name: str) -> Any:
    if name in __all__:  # before what other versions do not have is imported
        import vllm

        from kvstore_client.integrations.vllm.engine import check_version

        check_version(vllm.__version__, VERSIONS)
    if name == "KVStoreOffloadingConnector":
        from kvstore_client.integrations.vllm_tier.connector import KVStoreOffloadingConnector

        return KVStoreOffloadingConnector
    if name == "KVStoreTierManager":
        from kvstore_client.integrations.vllm_tier.tier import KVStoreTierManager

        return KVStoreTierManager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
