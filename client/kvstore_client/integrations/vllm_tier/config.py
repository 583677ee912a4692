"""What the tier's entry in `secondary_tiers` may hold. A mistake in it is an InvalidArgument that says what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvstore_client.errors import InvalidArgument
from kvstore_client.integrations.vllm.config import ConnectorConfig, check_keys
from kvstore_codec import KVLayout

_OF_CONNECTOR = ("address", "quality", "lookup_s", "deadline_s", "transport", "revision")
_LOCALITIES = ("LOCAL", "REMOTE")


@dataclass(frozen=True)
class TierConfig:
    """`node`: the keys that `KVStoreConnector` takes too. `locality`: what vLLM's tier filters call this tier, "LOCAL"
    or "REMOTE". `layout`: whose KV the rows hold, as `KVStoreOffloadingConnector` found it."""

    node: ConnectorConfig
    layout: KVLayout
    locality: str | None = None

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> TierConfig:
        """Raises InvalidArgument, LayoutError."""
        check_keys("kvstore's secondary tier", settings, (*_OF_CONNECTOR, "locality"), hidden=("layout",))
        if "layout" not in settings:
            raise InvalidArgument(
                "vLLM does not tell a tier whose KV it is given: use kv_connector KVStoreOffloadingConnector with "
                "kv_connector_module_path kvstore_client.integrations.vllm_tier"
            )
        locality = settings.get("locality")
        if locality is not None and locality not in _LOCALITIES:
            raise InvalidArgument(f"locality is one of {', '.join(_LOCALITIES)}", got=locality)
        node = ConnectorConfig.from_extra({key: settings[key] for key in _OF_CONNECTOR if key in settings})
        return cls(node, KVLayout.from_canonical_bytes(str(settings["layout"]).encode()), locality)
