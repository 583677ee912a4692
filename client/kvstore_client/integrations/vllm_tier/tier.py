"""`KVStoreTierManager`: vLLM's interface of a secondary tier over `Transfers`. Lives in the scheduler's process."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingMetricMetadata,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvstore_client.client import Client
from kvstore_client.integrations.vllm.engine import check_version
from kvstore_client.integrations.vllm_tier import VERSIONS
from kvstore_client.integrations.vllm_tier.chain import Chain
from kvstore_client.integrations.vllm_tier.config import TierConfig
from kvstore_client.integrations.vllm_tier.counts import CHUNKS, CHUNKS_HELP, Counts
from kvstore_client.integrations.vllm_tier.rows import Rows
from kvstore_client.integrations.vllm_tier.transfers import Transfers

log = init_logger("vllm.kvstore")  # vLLM shows what is under its own name


class KVStoreTierManager(SecondaryTierManager):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Made by vLLM's `SecondaryTierFactory`; `settings`: see TierConfig.

    Raises InvalidArgument, when the engine starts, for what it cannot do right: the reason and the remedy."""

    medium = Medium.STORAGE
    cache_hit_source = CacheHitSource.EXTERNAL_UNSPECIFIED  # "remote store": a disk is only one of a node's tiers

    def __init__(
        self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, backpressure_detector: Any = None,
        **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        check_version(vllm.__version__, VERSIONS)
        config = TierConfig.from_settings(settings)
        self.locality = None if config.locality is None else Locality(config.locality)
        self._chunk_tokens = config.layout.chunk_tokens
        self._counts = Counts()
        self._client = Client(config.node.address, transport=config.node.transport)
        self._rows = Rows(primary_kv_view, offloading_spec.config, config.layout)
        self._transfers = Transfers(self._client.namespace(config.layout), self._rows, config.node, self._counts)
        self._lookups = _Lookups(tier_type, self._transfers)
        self._keys_of_loads: dict[int, Sequence[OffloadKey]] = {}
        log.info("kvstore tier at %s, namespace %s, chunks of %d tokens, %s", config.node.address,
                 config.layout.namespace_id.hex()[:16], self._chunk_tokens, config.node.quality)  # fmt: skip

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """RETRY until a lookup in the background, for all chunks asked for in this step, has its answer."""
        if self._chain(req_context).number(key) is None:
            return LookupResult.MISS
        found = self._lookups.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._keys_of_loads[job_metadata.job_id] = tuple(job_metadata.keys)
        self._submit(job_metadata, is_load=True)

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata, is_load=False)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        results = []
        for ended in self._transfers.ended():
            job = ended.job
            keys = self._keys_of_loads.pop(job.job_id, ())
            if job.is_load and not ended.whole:
                # Else the request would be promised the same chunks again, for ever.
                self._lookups.mark_miss(keys[ended.good :])
            results.append(JobResult(
                job_id=job.job_id, success=ended.whole, successful_keys=keys[: ended.good] if job.is_load else None,
                transfer_time=ended.seconds, transfer_bytes=ended.good * self._rows.chunk_bytes,
            ))  # fmt: skip
        return results

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._lookups.cleanup(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._lookups.flush()

    def drain_jobs(self) -> None:
        self._transfers.drain()

    def shutdown(self) -> None:
        """Transfers under way end, within their deadline: vLLM takes its memory back next."""
        self._lookups.shutdown()
        self._transfers.close()
        self._rows.release()
        self._client.close()

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        return {CHUNKS: OffloadingCounterMetadata(documentation=CHUNKS_HELP, labelnames=("operation", "outcome"))}

    def get_stats(self) -> OffloadingConnectorStats | None:
        counted = self._counts.take()
        if not counted:
            return None
        stats = OffloadingConnectorStats()
        for labels, chunks in counted.items():
            stats.increase_counter(CHUNKS, chunks, labels)
        return stats

    def _submit(self, job: TransferJob, *, is_load: bool) -> None:
        chain = self._chain(job.req_context)
        placed = [
            (number, row)
            for key, row in zip(job.keys, job.chunk_ids.tolist(), strict=True)
            if (number := chain.number(key)) is not None
        ]
        if len(placed) < len(job.keys):  # only stores: of such chunks lookup() finds none
            self._counts.add("store", "failed", len(job.keys) - len(placed))
            self._counts.log.warn("store", "place", "a chunk has no place in its prompt, or no sha256 for a name")
        numbers, rows = [number for number, _ in placed], [row for _, row in placed]
        self._transfers.submit(job.job_id, chain, numbers, rows, is_load=is_load)

    def _chain(self, req_context: ReqContext) -> Chain:
        """Where a request's keys stand in its prompt."""
        chain: Chain | None = req_context.get_state(Chain)
        if chain is None:
            chain = Chain(self._chunk_tokens)
            req_context.set_state(chain)
        # vLLM's scheduler keeps this "so managers can recover prefix order"; one key at a time has an accessor.
        chain.note(req_context._offload_key_positions)
        return chain


class _Lookups(AsyncLookupManager):  # type: ignore[misc]
    """vLLM's own: one thread, a batch a step, verdicts kept while a request needs them."""

    def __init__(self, tier_type: str, transfers: Transfers) -> None:
        self._transfers = transfers
        super().__init__(tier_type)

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Collection[bool]:
        chain: Chain = req_context.get_state(Chain)
        numbers = [number for key in keys if (number := chain.number(key)) is not None]
        assert len(numbers) == len(keys), "lookup() asks for no others"
        return self._transfers.lookup(chain, numbers)
