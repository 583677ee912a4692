"""vLLM's offloading manager with kvstore's tier behind it, driven as vLLM's scheduler drives it; the test is the
accelerator, which fills rows and reads them."""

from __future__ import annotations

import hashlib
import itertools
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from polling import wait_until
from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from kvstore_codec import KVLayout

MODULE = "kvstore_client.integrations.vllm_tier"
_names = (f"request-{number}" for number in itertools.count())


def tier_entry(address: str, layout: KVLayout | None, **settings: Any) -> dict[str, Any]:
    """An entry in `secondary_tiers`, as `KVStoreOffloadingConnector` leaves it."""
    told = {} if layout is None else {"layout": layout.canonical_bytes.decode()}
    return {"type": "KVStoreTierManager", "module_path": MODULE, "address": address, **told, **settings}


def offloading_config(
    layout: KVLayout, tiers: Sequence[dict[str, Any]], *, order: str = "LBHNC", pages: int = 1, rows: int = 16,
    canonical: bool = False, workers: int = 1, **changes: Any,
) -> OffloadingConfig:  # fmt: skip
    """Of an engine whose blocks are a `pages`th of the layout's chunk."""
    tokens = layout.chunk_tokens // pages
    held = layout.bytes_per_token * tokens
    row = -(-held * pages // 4096) * 4096
    fields: dict[str, Any] = {
        "groups": (
            OffloadingGroupConfig(
                tokens, tuple(f"model.layers.{n}.self_attn.attn" for n in range(layout.num_layers)), 0
            ),
        ),
        "worker_kv_bytes_per_block": held // workers,
        "enable_kv_cache_events": False,
        "extra_config": {"cpu_bytes_to_use": row * rows, "secondary_tiers": list(tiers)},
        "engine_id": f"kvstore-test-{uuid.uuid4().hex}",
        "model": OffloadingModelConfig(layout.model, layout.dtype),
        "cache": OffloadingCacheConfig(tokens_per_hash=tokens, blocks_per_chunk=pages),
        "parallel": OffloadingParallelConfig(0, workers, workers, 1, 1, 1, 0, 1, None, True),
        "canonical_layout": canonical,
        "kv_cache_layout": order,
        **changes,
    }  # fmt: skip
    return OffloadingConfig(**fields)


def chain(name: str, chunks: int) -> list[OffloadKey]:
    """Keys of one prompt's chunks."""
    hashes = [hashlib.sha256(name.encode()).digest()]
    for _ in range(1, chunks):
        hashes.append(hashlib.sha256(hashes[-1]).digest())
    return [make_offload_key(each, 0) for each in hashes]


class Host:
    """`manager`: vLLM's, made of this configuration; of a spec of its own unless given. Closed by `close()`."""

    def __init__(self, config: OffloadingConfig, manager: Any = None) -> None:
        self.config = config
        self.manager = manager or TieringOffloadingSpec(config).get_manager()
        (self.tier,) = self.manager.secondary_tiers

    def request(self, keys: Sequence[OffloadKey]) -> ReqContext:
        """A request of a prompt with these chunks."""
        context = ReqContext(next(_names))
        tokens = self.config.groups[0].tokens_per_block * self.config.cache.blocks_per_chunk
        for number, key in enumerate(keys):
            context.set_offload_key_position(key, (number + 1) * tokens)
        self.manager.on_new_request(context)
        return context

    def step(self) -> None:
        self.manager.on_schedule_end(ScheduleEndContext((), ()))

    def idle(self, deadline_s: float = 30.0) -> None:
        """Steps until no job is under way."""

        def over() -> bool:
            self.step()
            return not self.manager.has_pending_work()

        wait_until(over, "vLLM's tiers have no work left", deadline_s=deadline_s)

    def store(self, context: ReqContext, keys: Sequence[OffloadKey], kv: npt.NDArray[Any]) -> None:
        """The accelerator's copy of these chunks to the CPU tier. `kv`: `[layers, 2, tokens, heads, dim]`."""
        prepared = self.manager.prepare_store(list(keys), context)
        assert prepared is not None
        chunk = kv.shape[2] // len(keys)
        for key, row in zip(prepared.keys_to_store, prepared.store_spec.block_ids.tolist(), strict=True):
            first = list(keys).index(key) * chunk
            packed = self._packed(kv[:, :, first : first + chunk])
            self._view[row][: len(packed)] = packed
        self.manager.complete_store(prepared.keys_to_store, context)

    def lookups(self, context: ReqContext, keys: Sequence[OffloadKey]) -> list[LookupResult]:
        """As the scheduler scans a prefix in one step."""
        results = []
        for key in keys:
            results.append(self.manager.lookup(key, context))
            if results[-1] is LookupResult.MISS:
                break
        return results

    def hits(self, context: ReqContext, keys: Sequence[OffloadKey], deadline_s: float = 30.0) -> int:
        """How many of a prompt's chunks are in the CPU tier, when vLLM has stopped deferring the request."""
        found: list[int] = []

        def answered() -> bool:
            results = self.lookups(context, keys)
            self.step()
            if LookupResult.RETRY in results or LookupResult.HIT_PENDING in results:
                return False
            found.append(results.count(LookupResult.HIT))
            return True

        wait_until(answered, "the lookup is over", deadline_s=deadline_s)
        return found[0]

    def kv(self, context: ReqContext, keys: Sequence[OffloadKey]) -> npt.NDArray[Any]:
        """What the accelerator gets of these chunks: bits, `[layers, 2, tokens, heads, dim]`."""
        rows = self.manager.prepare_load(list(keys), context).block_ids.tolist()
        chunks = [self._unpacked(bytes(self._view[row])) for row in rows]
        self.manager.complete_load(list(keys), context)
        return np.concatenate(chunks, axis=2)

    def close(self) -> None:
        self.manager.shutdown()

    @property
    def _view(self) -> npt.NDArray[np.uint8]:
        return np.asarray(self.manager.primary_tier.get_kv_memoryview()).view(np.uint8)

    def _shape(self) -> tuple[int, ...]:
        """(layers, pages, page tokens, heads, dim)"""
        spec, config = self.tier_layout.layers[0], self.config
        tokens = config.groups[0].tokens_per_block
        return self.tier_layout.num_layers, config.cache.blocks_per_chunk, tokens, spec.kv_heads, spec.k_dim

    @property
    def tier_layout(self) -> KVLayout:
        (entry,) = self.config.extra_config["secondary_tiers"]
        return KVLayout.from_canonical_bytes(entry["layout"].encode())

    def _packed(self, kv: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        layers, pages, tokens, heads, dim = self._shape()
        cut = kv.reshape(layers, 2, pages, tokens, heads, dim)
        axes = (0, 2, 3, 4, 1, 5) if self.config.kv_cache_layout == "LBNHC" else (0, 2, 4, 3, 1, 5)
        return np.frombuffer(np.ascontiguousarray(cut.transpose(axes)).tobytes(), np.uint8)

    def _unpacked(self, row: bytes) -> npt.NDArray[Any]:
        layers, pages, tokens, heads, dim = self._shape()
        bits = np.frombuffer(row, f"u{self.tier_layout.itemsize}")[: layers * pages * tokens * heads * 2 * dim]
        if self.config.kv_cache_layout == "LBNHC":
            cut = bits.reshape(layers, pages, tokens, heads, 2, dim).transpose(0, 4, 1, 2, 3, 5)
        else:
            cut = bits.reshape(layers, pages, heads, tokens, 2, dim).transpose(0, 4, 1, 3, 2, 5)
        return np.ascontiguousarray(cut).reshape(layers, 2, pages * tokens, heads, dim)
