"""The scheduler's side: which prefix of a request the node holds, and what is to be loaded and saved in each step.

Its calls are made inside vLLM's scheduler, so none of them waits: a lookup runs in a thread from the moment a request
comes, and is asked for its result. Nothing of vLLM is imported; requests and outputs are used as it passes them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvstore_client.integrations.vllm.config import ConnectorConfig
from kvstore_client.integrations.vllm.events import StoredBlocks, StoredEvents
from kvstore_client.integrations.vllm.identity import Namespaces, RequestKey
from kvstore_client.integrations.vllm.lookups import LEASE_S, Lookups
from kvstore_client.integrations.vllm.metrics import ConnectorMetrics
from kvstore_client.integrations.vllm.planning import Decision, Found, LoadPlanner
from kvstore_client.integrations.vllm.prefill import PrefillSpeed
from kvstore_client.integrations.vllm.rendezvous import promise, promised
from kvstore_client.integrations.vllm.work import Load, Report, Save
from kvstore_codec import Quality


@dataclass
class _Tracked:
    """A request from its arrival to its end. `decided`: what was answered for how many computed tokens; `held`: tokens
    that `node` has, loaded or not; `stored`: those and what was handed to a save."""

    request: Any
    key: RequestKey
    lookup: Future[Found] | None = None
    looked_up_at: float = 0.0
    decided: tuple[int, Decision] | None = None
    load: Load | None = None
    load_failed: bool = False
    held: int = 0
    stored: int = 0
    node: str = ""
    block_ids: list[int] = field(default_factory=list)


class SchedulerSide:
    """`page_tokens`: tokens of an engine's block. `loads`, `saves`: what this engine's role lets it do. `recomputes`:
    whether it computes what a load does not bring, so that a load may be broken off. `growth`: as PrefillCost has it,
    of the engine's model. `events`: told of what is stored."""

    def __init__(
        self, config: ConnectorConfig, namespaces: Namespaces, metrics: ConnectorMetrics, *,
        page_tokens: int, loads: bool, saves: bool, recomputes: bool = True, growth: float = 0.0,
        events: StoredEvents | None = None,
    ) -> None:  # fmt: skip
        self._metrics, self._events = metrics, events
        self._chunk_tokens = namespaces.layout.chunk_tokens
        self._page_tokens, self._loads, self._saves, self._recomputes = page_tokens, loads, saves, recomputes
        self._prefill = PrefillSpeed(growth, time.monotonic)
        quality = Quality.parse(config.quality)
        self._lookups = Lookups(namespaces, metrics, quality, config.lookup_s)
        self._planner = None
        if config.planner:
            self._planner = LoadPlanner(namespaces.layout, quality, self._prefill, time.monotonic, config.deadline_s)
        self._requests: dict[str, _Tracked] = {}
        self._unknown: set[str] = set()
        self._new_loads: list[Load] = []
        self._save_ids = itertools.count()

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
        found = self._found(tracked)
        if found is None:
            return None, False
        new = max(0, self._decided(tracked, found, computed).tokens - computed)
        return new, new > 0

    def allocated(self, request: Any, block_ids: Sequence[int], external: int) -> None:
        """The request has blocks for `external` tokens, to be loaded."""
        tracked = self._requests.get(request.request_id)
        if tracked is None or external == 0 or tracked.decided is None:
            return
        end = tracked.decided[1].tokens
        tracked.load = Load(
            request.request_id, tracked.key, self._tokens(request, end), end - external,
            tuple(block_ids[: end // self._page_tokens]),
            self._prefill.cost if self._planner is not None and self._recomputes else None, tracked.node,
        )  # fmt: skip
        self._new_loads.append(tracked.load)

    def step(self, output: Any) -> tuple[list[Load], list[Save]]:
        """What the workers are to do in the step that `output` (a SchedulerOutput) describes."""
        loads, self._new_loads = self._new_loads, []
        saves: list[Save] = []
        prompts: list[tuple[int, int]] = []
        scheduled = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            computed, count = new.num_computed_tokens, scheduled[new.req_id]
            prompts.append((computed, count))
            saves += self._advanced(new.req_id, list(new.block_ids[0]), True, computed, count)
        cached = output.scheduled_cached_reqs
        for request_id, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            count = scheduled[request_id]
            tracked = self._requests.get(request_id)
            if tracked is not None and computed < len(tracked.request.prompt_token_ids):
                prompts.append((computed, count))
            more = list(blocks[0]) if blocks else []
            saves += self._advanced(request_id, more, request_id in cached.resumed_req_ids, computed, count)
        self._prefill.scheduled(prompts, sum(scheduled.values()))
        return loads, saves

    def ended(self) -> None:
        """The engine has the output of the oldest step under way."""
        self._prefill.ended()

    def reported(self, report: Report) -> None:
        """What the workers have to say of a step."""
        if self._planner is not None:
            self._planner.learn(report.speeds)
        if self._events is not None:
            self._events.stored(report.stored)

    def stored_blocks(self) -> list[StoredBlocks]:
        """What the node has taken since the last call, where that is to be told."""
        return [] if self._events is None else self._events.take()

    def loaded(self, request_ids: Sequence[str], failed_block_ids: set[int]) -> None:
        """What the workers have to say of loads: which have ended, and blocks that lack their part; of several workers
        the last to end may not be the one that failed. A request whose load failed is computed: what failed once is not
        waited for again."""
        for tracked in self._requests.values() if failed_block_ids else ():
            if tracked.load is not None and not failed_block_ids.isdisjoint(tracked.load.block_ids):
                tracked.load_failed = True
                tracked.held = 0  # as far as anybody knows
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
        self._lookups.close()

    def _track(self, request: Any) -> _Tracked | None:
        """None where tokens do not tell what the request's KV is."""
        tracked = self._requests.get(request.request_id)
        if tracked is not None or request.request_id in self._unknown:
            return tracked
        key = RequestKey.of(request)
        if key is None:
            self._unknown.add(request.request_id)
            self._metrics.count("unknown_requests")
            return None
        tracked = self._requests[request.request_id] = _Tracked(request, key)
        return tracked

    def _found(self, tracked: _Tracked) -> Found | None:
        """What the node holds of the prompt; None while it is being asked."""
        waited_s = time.monotonic() - tracked.looked_up_at
        if tracked.lookup is None or (tracked.lookup.done() and waited_s > LEASE_S / 2):
            self._look_up(tracked)
        assert tracked.lookup is not None
        if not tracked.lookup.done():
            return None
        found = tracked.lookup.result()
        tracked.held = tracked.stored = found.tokens
        tracked.node = found.node
        return found

    def _look_up(self, tracked: _Tracked) -> None:
        tracked.looked_up_at, tracked.decided = time.monotonic(), None
        # The engine computes at least the last token, to have logits.
        prompt = tracked.request.prompt_token_ids
        tracked.lookup = self._lookups.start(tracked.key, prompt, len(prompt) - 1, promised(tracked.request))

    def _decided(self, tracked: _Tracked, found: Found, computed: int) -> Decision:
        """One decision as long as nothing else is known: the scheduler asks until it has blocks for it."""
        if tracked.decided is not None and tracked.decided[0] == computed:
            return tracked.decided[1]
        decision = Decision(found.tokens, "load")
        if self._planner is not None and found.tokens > computed:
            decision = self._planner.decide(found, computed, len(tracked.request.prompt_token_ids))
        if found.tokens > computed:
            self._metrics.count("plans", decision.choice)
        if decision.reason:
            self._metrics.count("computes", decision.reason)
        tracked.decided = computed, decision
        return decision

    def _advanced(self, request_id: str, block_ids: list[int], anew: bool, computed: int, count: int) -> list[Save]:
        """The chunks of a request that are complete at the end of a step of `count` of its tokens. `anew`: it has no
        other blocks."""
        tracked = self._requests.get(request_id)
        if tracked is None or not self._saves:
            return []
        tracked.block_ids = block_ids if anew else tracked.block_ids + block_ids
        size = self._chunk_tokens
        # Computed anew, where a load had failed or the request lost its blocks.
        first = tracked.stored = max(tracked.held, min(tracked.stored, computed // size * size))
        # Tokens that are drafts, or not sampled yet, have no part in it.
        known = min(computed + count, len(tracked.request.all_token_ids))
        last = known // size * size
        if last <= first:
            return []
        tracked.stored = last
        blocks = tuple(tracked.block_ids[first // self._page_tokens : last // self._page_tokens])
        tokens = self._tokens(tracked.request, last)
        save = Save(request_id, tracked.key, tokens, first, blocks, next(self._save_ids))
        if self._events is not None:
            self._events.saving(save, tracked.request)
        return [save]

    @staticmethod
    def _tokens(request: Any, count: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
        return np.asarray(request.all_token_ids[:count], np.uint32)
