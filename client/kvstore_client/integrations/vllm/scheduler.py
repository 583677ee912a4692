"""The scheduler's side: which prefix of a request the node holds, and what is to be loaded and saved in each step.

Its calls are made inside vLLM's scheduler, so none of them waits: a lookup runs in a thread from the moment a request
comes, and is asked for its result. Nothing of vLLM is imported; requests and outputs are used as it passes them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvstore_client.errors import InvalidArgument, KvClientError
from kvstore_client.integrations.vllm.config import ConnectorConfig
from kvstore_client.integrations.vllm.identity import Namespaces, RequestKey
from kvstore_client.integrations.vllm.metrics import ConnectorMetrics
from kvstore_client.integrations.vllm.rendezvous import promise, promised, wait_for
from kvstore_client.integrations.vllm.work import Load, Save
from kvstore_client.lookups import good_enough
from kvstore_codec import Quality

#: Lookups under way at a time; each waits for the node for `lookup_s` at most.
LOOKUPS_MAX = 16
LEASE_S = 30.0


@dataclass
class _Tracked:
    """A request from its arrival to its end. `stored`: tokens that the node holds or that were handed to a save."""

    request: Any
    key: RequestKey
    lookup: Future[int] | None = None
    looked_up_at: float = 0.0
    load: Load | None = None
    load_failed: bool = False
    stored: int = 0
    block_ids: list[int] = field(default_factory=list)


class SchedulerSide:
    """`page_tokens`: tokens of an engine's block. `loads`, `saves`: what this engine's role lets it do."""

    def __init__(
        self, config: ConnectorConfig, namespaces: Namespaces, metrics: ConnectorMetrics, *,
        page_tokens: int, loads: bool, saves: bool,
    ) -> None:  # fmt: skip
        self._config, self._namespaces, self._metrics = config, namespaces, metrics
        self._page_tokens, self._loads, self._saves = page_tokens, loads, saves
        self._quality = Quality.parse(config.quality)
        self._threads = ThreadPoolExecutor(LOOKUPS_MAX, "kvstore-lookup")
        self._closing = threading.Event()
        self._requests: dict[str, _Tracked] = {}
        self._unknown: set[str] = set()
        self._new_loads: list[Load] = []

    def arrived(self, request: Any) -> None:
        """Begins to look a new request up."""
        tracked = self._track(request)
        if tracked is not None and self._loads and tracked.lookup is None:
            self._look_up(tracked)

    def matched(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """(tokens that can be loaded behind the `computed` ones, whether asynchronously); None: not known yet."""
        tracked = self._track(request)
        if tracked is None or not self._loads or tracked.load_failed:
            return 0, False
        held = self._held(tracked)
        if held is None:
            return None, False
        new = max(0, held - computed)
        return new, new > 0

    def allocated(self, request: Any, block_ids: Sequence[int], external: int) -> None:
        """The request has blocks for `external` tokens, to be loaded."""
        tracked = self._requests.get(request.request_id)
        if tracked is None or external == 0 or tracked.lookup is None:
            return
        held = tracked.lookup.result()
        tracked.load = Load(
            request.request_id, tracked.key, self._tokens(request, held), held - external,
            tuple(block_ids[: held // self._page_tokens]),
        )  # fmt: skip
        self._new_loads.append(tracked.load)

    def step(self, output: Any) -> tuple[list[Load], list[Save]]:
        """What the workers are to do in the step that `output` (a SchedulerOutput) describes."""
        loads, self._new_loads = self._new_loads, []
        if not self._saves:
            return loads, []
        saves = []
        for new in output.scheduled_new_reqs:
            saves += self._advanced(new.req_id, list(new.block_ids[0]), True, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for request_id, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            more = list(blocks[0]) if blocks else []
            saves += self._advanced(request_id, more, request_id in cached.resumed_req_ids, computed, output)
        return loads, saves

    def loaded(self, request_ids: Sequence[str], failed_block_ids: set[int]) -> None:
        """What the workers have to say of loads: which have ended, and blocks that lack their part; of several workers
        the last to end may not be the one that failed. A request whose load failed is computed: what failed once is not
        waited for again."""
        for tracked in self._requests.values() if failed_block_ids else ():
            if tracked.load is not None and not failed_block_ids.isdisjoint(tracked.load.block_ids):
                tracked.load_failed = True
        for request_id in request_ids:
            if (ended := self._requests.get(request_id)) is not None:
                ended.load = None

    def finished(self, request_id: str) -> dict[str, Any] | None:
        """The request has ended. What is to be said of its KV to whoever asked (see rendezvous)."""
        self._unknown.discard(request_id)
        tracked = self._requests.pop(request_id, None)
        if tracked is None:
            return None
        if tracked.lookup is not None:
            tracked.lookup.cancel()
        return promise(tracked.request, tracked.stored) if self._saves else None

    def close(self) -> None:
        self._closing.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _track(self, request: Any) -> _Tracked | None:
        """None where tokens do not tell what the request's KV is."""
        tracked = self._requests.get(request.request_id)
        if tracked is not None or request.request_id in self._unknown:
            return tracked
        key = RequestKey.of(request)
        if key is None:
            self._unknown.add(request.request_id)
            self._metrics.unknown.inc()
            return None
        tracked = self._requests[request.request_id] = _Tracked(request, key)
        return tracked

    def _held(self, tracked: _Tracked) -> int | None:
        """Tokens of the prompt that the node holds; None while it is being asked."""
        waited_s = time.monotonic() - tracked.looked_up_at
        if tracked.lookup is None or (tracked.lookup.done() and waited_s > LEASE_S / 2):
            self._look_up(tracked)
        assert tracked.lookup is not None
        if not tracked.lookup.done():
            return None
        tracked.stored = held = tracked.lookup.result()
        return held

    def _look_up(self, tracked: _Tracked) -> None:
        tracked.looked_up_at = time.monotonic()
        # The engine computes at least the last token, to have logits.
        prompt = tracked.request.prompt_token_ids
        tracked.lookup = self._threads.submit(
            self._tokens_held, tracked.key, prompt, len(prompt) - 1, promised(tracked.request)
        )

    def _tokens_held(self, key: RequestKey, prompt: Sequence[int], count: int, expected: int) -> int:
        """In a thread. A node that does not answer holds nothing. `expected`: tokens that another engine is saving."""
        size = self._namespaces.layout.chunk_tokens
        try:
            tokens, namespace = np.asarray(prompt[:count], np.uint32), self._namespaces.of(key)

            def ask(seconds: float) -> int:
                hit = namespace.lookup(tokens, lease_ms=int(LEASE_S * 1000), deadline=seconds)
                chunks = good_enough(hit.chunks, self._quality)
                return chunks[-1].first_token + chunks[-1].tokens if chunks else 0

            held = wait_for(min(expected, count) // size * size, ask, self._config.lookup_s, self._closing)
        except (KvClientError, InvalidArgument, OSError) as error:
            self._metrics.lookups.labels("failed").inc()
            self._metrics.log.warn("lookup", type(error).__name__, str(error))
            return 0
        self._metrics.lookups.labels("hit" if held else "miss").inc()
        return held

    def _advanced(
        self, request_id: str, block_ids: list[int], anew: bool, computed: int, output: Any
    ) -> list[Save]:  # fmt: skip
        """The chunks of a request that are complete at the end of the step. `anew`: it has no other blocks."""
        tracked = self._requests.get(request_id)
        if tracked is None:
            return []
        tracked.block_ids = block_ids if anew else tracked.block_ids + block_ids
        size = self._namespaces.layout.chunk_tokens
        # Computed anew, where a load had failed or the request lost its blocks.
        first = tracked.stored = min(tracked.stored, computed // size * size)
        # Tokens that are drafts, or not sampled yet, have no part in it.
        scheduled: Mapping[str, int] = output.num_scheduled_tokens
        known = min(computed + scheduled[request_id], len(tracked.request.all_token_ids))
        last = known // size * size
        if last <= first:
            return []
        tracked.stored = last
        blocks = tuple(tracked.block_ids[first // self._page_tokens : last // self._page_tokens])
        return [Save(request_id, tracked.key, self._tokens(tracked.request, last), first, blocks)]

    @staticmethod
    def _tokens(request: Any, count: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
        return np.asarray(request.all_token_ids[:count], np.uint32)
