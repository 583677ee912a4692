"""The worker's side: chunks from the node into blocks, and from blocks to the node, both behind the engine's back.

A load decodes straight into its request's blocks, which nobody else uses until it is reported finished. A save copies
blocks out at the end of the step that computed them; encoding and sending are a thread's business.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvstore_client.integrations.vllm.config import ConnectorConfig
from kvstore_client.integrations.vllm.identity import Namespaces
from kvstore_client.integrations.vllm.metrics import ConnectorMetrics
from kvstore_client.integrations.vllm.staging import PagePlane, Staging
from kvstore_client.integrations.vllm.work import Load, Report, Save
from kvstore_client.planner.estimates import Speeds
from kvstore_client.results import PutResult
from kvstore_codec.arrays import PagedKV, page_shape

LOADS_MAX = 4  # at a time
#: vLLM's null block: no request's KV lies there, and what does is never read. Loads leave there what is not theirs.
NULL_BLOCK = 0


@dataclass(frozen=True)
class _Loaded:
    """`tokens`: of the prompt that are good, those that the engine had included; `speeds`: what is measured by now;
    `reason`: why it is less than was to be loaded."""

    tokens: int
    speeds: Mapping[str, Speeds]
    reason: str


class WorkerSide:
    """`caches`: (k, v) of each layer's pages as `PagedKV` has them, views of the engine's memory."""

    def __init__(
        self, config: ConnectorConfig, namespaces: Namespaces, metrics: ConnectorMetrics,
        caches: Sequence[tuple[PagePlane, PagePlane]],
    ) -> None:  # fmt: skip
        self._config, self._namespaces, self._metrics = config, namespaces, metrics
        self._caches = caches
        self._page_tokens = page_shape(caches[0][0])[1]
        page_bytes = sum(plane[0].nbytes for kv in caches for plane in kv)
        self._staging = Staging(caches, max(1, (config.stage_mib << 20) // page_bytes))
        self._loading: dict[str, tuple[Load, Future[_Loaded]]] = {}
        self._saving: set[Future[PutResult]] = set()
        self._load_threads = ThreadPoolExecutor(LOADS_MAX, "kvstore-load")
        self._save_thread = ThreadPoolExecutor(1, "kvstore-save")  # one: a chunk goes before what follows it
        self._failed_blocks: set[int] = set()
        self._speeds: dict[str, Speeds] = {}  # of loads that have ended since the last report
        self._lock = threading.Lock()
        self._stored: list[int] = []  # ids of saves

    def load(self, load: Load) -> None:
        """Begins a load. Its request is among `finished_loads` when nothing writes to its blocks any more."""
        self._loading[load.request_id] = (load, self._load_threads.submit(self._get, load))

    def save(self, save: Save) -> None:
        """Copies the blocks of a save, and begins to send them."""
        pages = self._staging.take(save.block_ids)
        if pages is None:
            self._metrics.count("saves", "full")
            self._metrics.log.warn(
                "save", "full", "no room for KV on its way: the node is too slow, or raise stage_mib"
            )
            return
        sent = self._save_thread.submit(self._put, save, pages)
        self._saving.add(sent)
        sent.add_done_callback(partial(self._sent, save, pages, time.monotonic()))

    @property
    def loading(self) -> int:
        """Loads that have not been reported finished."""
        return len(self._loading)

    @property
    def saving(self) -> int:
        """Saves under way."""
        return len(self._saving)

    def finished_loads(self) -> set[str]:
        """Requests whose loads have ended since the last call; `failed_blocks` has what they did not bring."""
        ended = {request_id for request_id, (_, loaded) in self._loading.items() if loaded.done()}
        for request_id in ended:
            load, loaded = self._loading.pop(request_id)
            problem = loaded.exception()
            tokens, reason = 0, "raised"
            if problem:
                self._metrics.log.warn("load", type(problem).__name__, str(problem))
            else:
                tokens, reason = loaded.result().tokens, loaded.result().reason
                self._speeds.update(loaded.result().speeds)
            self._metrics.count("tokens", "load", max(0, tokens - load.first_token))
            whole = tokens == len(load.tokens)
            self._metrics.count("loads", "whole" if whole else "part" if tokens > load.first_token else "failed")
            if not whole:
                self._metrics.count("short_loads", reason)
            self._failed_blocks.update(self._blocks_from(load, tokens))
        return ended

    def failed_blocks(self) -> set[int]:
        """Blocks of the loads that have ended since the last call which hold nothing of use."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def report(self) -> Report | None:
        """What is new since the last call; None: nothing."""
        if not self._speeds and not self._stored:
            return None
        speeds, self._speeds = self._speeds, {}
        with self._lock:
            stored, self._stored = self._stored, []
        return Report(speeds, dict.fromkeys(stored, 1))

    def close(self) -> None:
        """Saves that have begun end within their deadline; the others are dropped."""
        self._load_threads.shutdown(wait=False, cancel_futures=True)
        wait(list(self._saving), timeout=self._config.deadline_s)
        self._save_thread.shutdown(wait=False, cancel_futures=True)

    def _get(self, load: Load) -> _Loaded:
        """In a thread."""
        began_s, tokens = time.monotonic(), 0
        try:
            loaded = self._fetched(load)
            tokens = loaded.tokens
        finally:
            self._clear(self._blocks_from(load, tokens))
            self._metrics.observe("load_seconds", time.monotonic() - began_s)
        return loaded

    def _clear(self, block_ids: Sequence[int]) -> None:
        """What a damaged object has left in blocks may be no numbers, and attention kernels multiply what lies behind
        the last token computed by zero: the block's next request would have no numbers either."""
        for pair in self._caches:
            for plane in pair:
                for block in block_ids:
                    plane[block] = 0

    def _blocks_from(self, load: Load, tokens: int) -> Sequence[int]:
        """Blocks of a load of which the first `tokens` of the prompt are good that hold what is not."""
        return load.block_ids[max(tokens, load.first_token) // self._page_tokens :]

    def _fetched(self, load: Load) -> _Loaded:
        size = self._namespaces.layout.chunk_tokens
        first = load.first_token // size * size
        theirs = (load.first_token - first) // self._page_tokens
        blocks = [NULL_BLOCK] * theirs + list(load.block_ids[load.first_token // self._page_tokens :])
        goal: dict[str, Any] = {}
        if load.prefill is not None:
            goal = {"ttft": self._config.deadline_s, "prefill_tokens_per_s": load.prefill}
        cache = self._namespaces.of(load.key)
        restored = cache.get(
            load.tokens, min_quality=self._config.quality, out=PagedKV(self._caches, blocks, len(load.tokens) - first),
            first_token=first, node=load.node, deadline=self._config.deadline_s, **goal,
        )  # fmt: skip
        return _Loaded(first + restored.n, cache.speeds(), restored.reason)

    def _put(self, save: Save, pages: Sequence[int]) -> PutResult:
        """In a thread."""
        return self._namespaces.of(save.key).put(
            save.tokens, PagedKV(self._staging.caches, pages, len(save.tokens) - save.first_token),
            quality=self._config.quality, provenance=self._config.provenance, first_token=save.first_token,
            deadline=self._config.deadline_s,
        )  # fmt: skip

    def _sent(self, save: Save, pages: Sequence[int], began_s: float, sent: Future[PutResult]) -> None:
        """What went wrong cost these chunks, nothing else."""
        self._staging.give_back(pages)
        self._metrics.observe("save_seconds", time.monotonic() - began_s)
        problem = CancelledError("the engine shut down") if sent.cancelled() else sent.exception()
        if problem:
            self._metrics.count("saves", "failed")
            self._metrics.log.warn("save", type(problem).__name__, str(problem))
        elif sent.result().rejected:
            self._metrics.count("saves", "rejected")
        else:
            with self._lock:
                self._stored.append(save.save_id)
            self._metrics.count("saves", "stored")
            self._metrics.count("tokens", "save", len(save.tokens) - save.first_token)
        self._saving.discard(sent)
