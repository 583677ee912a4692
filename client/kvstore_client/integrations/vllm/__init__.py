"""kvstore in vLLM: `KVStoreConnector`, a KV connector that vLLM loads by `--kv-transfer-config` (docs/vllm.md).

vLLM is imported when `KVStoreConnector` is asked for, by vLLM itself; the other modules need no more than torch.
"""

from __future__ import annotations

from typing import Any

__all__ = ["KVStoreConnector"]


def __getattr__(name: str) -> Any:
    if name != "KVStoreConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvstore_client.integrations.vllm.connector import KVStoreConnector

    return KVStoreConnector
