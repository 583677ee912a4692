"""kvstore behind vLLM's own CPU offloading: a secondary tier and the connector that tells it whose KV it holds
(docs/vllm.md).

vLLM is imported when one of them is asked for, by vLLM itself.
"""

from __future__ import annotations

from typing import Any

__all__ = ["KVStoreOffloadingConnector", "KVStoreTierManager"]


def __getattr__(name: str) -> Any:
    if name == "KVStoreOffloadingConnector":
        from kvstore_client.integrations.vllm_tier.connector import KVStoreOffloadingConnector

        return KVStoreOffloadingConnector
    if name == "KVStoreTierManager":
        from kvstore_client.integrations.vllm_tier.tier import KVStoreTierManager

        return KVStoreTierManager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
