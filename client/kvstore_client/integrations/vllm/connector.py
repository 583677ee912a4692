"""`KVStoreConnector`: vLLM's connector interface over the two sides. This module and `engine_metrics.py` import vLLM.

vLLM makes one for its scheduler and one for each worker; what the first decides in a step reaches the second as that
step's metadata.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import vllm
from vllm.distributed.kv_events import MEDIUM_STORAGE, BlockStored
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from kvstore_client.client import Client
from kvstore_client.errors import InvalidArgument
from kvstore_client.integrations.vllm.config import ConnectorConfig
from kvstore_client.integrations.vllm.engine import check_version, facts_of, pages_of
from kvstore_client.integrations.vllm.engine_metrics import EngineMetrics, StepStats
from kvstore_client.integrations.vllm.events import StoredBlocks, StoredEvents
from kvstore_client.integrations.vllm.identity import Namespaces, layout_of
from kvstore_client.integrations.vllm.metrics import connector_metrics
from kvstore_client.integrations.vllm.prefill import attention_growth
from kvstore_client.integrations.vllm.scheduler import SchedulerSide
from kvstore_client.integrations.vllm.work import Load, Report, Save
from kvstore_client.integrations.vllm.worker import WorkerSide

#: What events call the tier of the blocks that are told of.
OWNERSHIP = "kvstore"
log = init_logger("vllm.kvstore")  # vLLM shows what is under its own name


@dataclass
class StepWork(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is not installed where types are checked
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


@dataclass
class StepReport(KVConnectorWorkerMetadata):  # type: ignore[misc]
    report: Report

    def aggregate(self, other: StepReport) -> StepReport:
        return StepReport(self.report.merged(other.report))


#: In a step without tokens, of which vLLM turns thousands while a load is under way: the threads that load want the
#: interpreter's lock, and would otherwise wait for each turn of it as long as the interpreter's switch interval.
NAP_S = 5e-5


class KVStoreConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Raises InvalidArgument, when the engine starts, for what it cannot do right: the reason and the remedy."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_version(vllm.__version__)
        transfer = vllm_config.kv_transfer_config
        self._config = ConnectorConfig.from_extra(transfer.kv_connector_extra_config)
        stages, workers = stages_of(vllm_config), vllm_config.parallel_config.tensor_parallel_size
        # vLLM's order of workers; its scheduler has the first one's caches.
        rank = 0 if role is KVConnectorRole.SCHEDULER else vllm_config.parallel_config.rank
        self._stage = stages[rank // workers % len(stages)]
        facts, page_tokens = facts_of(vllm_config, kv_cache_config, self._stage)
        layout = layout_of(
            facts, chunk_tokens=self._config.chunk_tokens_for(page_tokens), revision=self._config.revision,
            layer_groups=self._config.layer_groups_for([len(stage) for stage in stages]),
            head_groups=self._config.head_groups_for(facts.kv_heads, workers),
        )  # fmt: skip
        # The scheduler has to know a node that fails from one that has nothing; for workers both are a miss.
        self._client = Client(
            self._config.address, transport=self._config.transport, tls=self._config.tls,
            strict=role is KVConnectorRole.SCHEDULER,
        )  # fmt: skip
        self._metrics = connector_metrics()
        self._namespaces = Namespaces(self._client, layout)
        if role is not KVConnectorRole.SCHEDULER:
            self._namespaces = Namespaces(
                self._client, layout, stage=self._stage, rank=rank % workers, workers=workers
            )  # fmt: skip
        self._page_tokens, self._never = page_tokens, threading.Event()
        self._worker: WorkerSide | None = None  # when there are pages
        self._scheduler: SchedulerSide | None = None
        if role is KVConnectorRole.SCHEDULER:
            recomputes = transfer.kv_load_failure_policy == "recompute"
            if not recomputes:
                log.warning('set "kv_load_failure_policy": "recompute": now a load that fails fails its request')
            self._scheduler = SchedulerSide(
                self._config, self._namespaces, self._metrics, page_tokens=page_tokens,
                loads=transfer.is_kv_consumer, saves=transfer.is_kv_producer, recomputes=recomputes,
                growth=attention_growth(facts.config, facts.head_dim), events=self._events(vllm_config),
            )  # fmt: skip
            log.info("kvstore at %s, namespace %s, chunks of %d tokens, %s", self._config.address,
                     layout.namespace_id.hex()[:16], layout.chunk_tokens, self._config.quality)  # fmt: skip

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is a miss later."""
        return False

    # The scheduler's side.

    def on_new_request(self, request: Any) -> None:
        self._for_scheduler.arrived(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._for_scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            self._for_scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        if scheduler_output.total_num_scheduled_tokens == 0:
            self._never.wait(NAP_S)
        return StepWork(*self._for_scheduler.step(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        ended, failed = connector_output.finished_recving or (), connector_output.invalid_block_ids or set()
        if ended or failed:
            self._for_scheduler.loaded(list(ended), failed)
        if isinstance(connector_output.kv_connector_worker_meta, StepReport):
            self._for_scheduler.reported(connector_output.kv_connector_worker_meta.report)

    def take_events(self) -> Iterable[Any]:
        """vLLM asks once for each step, when it has the step's output."""
        self._for_scheduler.ended()
        return [self._event(blocks) for blocks in self._for_scheduler.stored_blocks()]

    def _event(self, blocks: StoredBlocks) -> BlockStored:
        return BlockStored(
            block_hashes=[maybe_convert_block_hash(each) for each in blocks.hashes],
            parent_block_hash=None if blocks.parent is None else maybe_convert_block_hash(blocks.parent),
            token_ids=list(blocks.tokens), block_size=self._page_tokens, lora_id=None, lora_name=blocks.adapter,
            medium=MEDIUM_STORAGE, group_idx=0, ownership=OWNERSHIP,
        )  # fmt: skip

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Blocks may be freed at once: saves have copied them. vLLM itself keeps those of a load under way."""
        return False, self._for_scheduler.finished(request.request_id)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:  # fmt: skip
        return self.request_finished(request, block_ids[0])

    # The worker's side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        caches = pages_of(self._vllm_config, self._kv_cache_config, kv_caches, self._stage)
        self._worker = WorkerSide(self._config, self._namespaces, self._metrics, caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for load in self._work.loads:
            self._for_worker.load(load)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: no step waits for one."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Saves begin when the step has computed all layers."""

    def wait_for_save(self) -> None:
        for save in self._work.saves:
            self._for_worker.save(save)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._for_worker.finished_loads() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._for_worker.failed_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report = self._for_worker.report()
        return None if report is None else StepReport(report)

    # Both sides, and the process that serves vLLM's metrics.

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        added = self._metrics.take()
        return None if added is None else StepStats(added)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return StepStats() if data is None else StepStats(data)

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: dict[type[Any], type[Any]], labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:  # fmt: skip
        return EngineMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        for side in (self._scheduler, self._worker):
            if side is not None:
                side.close()
        self._client.close()

    def _events(self, vllm_config: Any) -> StoredEvents | None:
        wanted = vllm_config.kv_events_config
        if wanted is None or not wanted.enable_kv_cache_events:
            return None
        return StoredEvents(self._page_tokens, vllm_config.parallel_config.world_size)

    @property
    def _for_scheduler(self) -> SchedulerSide:
        assert self._scheduler is not None, "vLLM calls this on its scheduler's connector"
        return self._scheduler

    @property
    def _for_worker(self) -> WorkerSide:
        assert self._worker is not None, "vLLM registers its pages before the first step"
        return self._worker

    @property
    def _work(self) -> StepWork:
        work = self._get_connector_metadata()
        if not isinstance(work, StepWork):
            raise InvalidArgument("the step's metadata is another connector's", got=type(work).__name__)
        return work


def stages_of(vllm_config: Any) -> list[range]:
    """The layers of each stage of the engine's pipeline, of which there is at least one."""
    layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    size = vllm_config.parallel_config.pipeline_parallel_size
    return [range(*get_pp_indices(layers, rank, size)) for rank in range(size)]
