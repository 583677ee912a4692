"""Gets that follow the planner: fetched step by step, each at the quality that is best by then."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import kvstore_codec as codec
from kvstore_client.connection import Node
from kvstore_client.errors import InvalidArgument
from kvstore_client.fetching import Fetched
from kvstore_client.pace import Pace, RefinePace, Timing
from kvstore_client.planner.choose import Chunk
from kvstore_client.planner.controller import Controller, Task
from kvstore_client.planner.costs import PrefillSeconds, prefill_seconds
from kvstore_client.planner.estimates import PeerEstimates, Speeds, expected
from kvstore_client.planner.plan import Plan
from kvstore_client.planner.refine import Refine
from kvstore_client.planner.sizes import LayerSizes
from kvstore_client.results import ChunkHit
from kvstore_client.session import Session
from kvstore_client.transports.wanted import Wanted
from kvstore_codec import KVArray, KVLayout, Quality

#: Fetches and decodes the chunks of one request into their place.
FetchPart = Callable[[Wanted, KVArray, Timing], Awaitable[Fetched]]
#: Makes what was fetched finer, where it is; how many chunks became so.
Improve = Callable[[Refine, Callable[[Iterator[int]], RefinePace]], Awaitable[int]]


@dataclass(frozen=True)
class Goal:
    """All of the KV of a prompt of `tokens` tokens within `ttft_s` of `began`, fetched or computed by an engine that
    takes `prefill`."""

    ttft_s: float
    prefill: PrefillSeconds
    tokens: int
    began: float


def checked_goal(ttft: float | None, prefill_tokens_per_s: float | PrefillSeconds | None, tokens: int) -> Goal | None:
    """A goal that begins now; None where neither number is given. Raises InvalidArgument for one without the other, or
    what is no such number."""
    if ttft is None and prefill_tokens_per_s is None:
        return None
    if ttft is None or prefill_tokens_per_s is None:
        raise InvalidArgument("ttft and prefill_tokens_per_s go together", ttft=ttft, rate=prefill_tokens_per_s)
    if not (math.isfinite(ttft) and ttft > 0):
        raise InvalidArgument("ttft must be a positive number of seconds", ttft=ttft)
    return Goal(float(ttft), prefill_seconds(prefill_tokens_per_s), tokens, time.monotonic())


class NamespacePlanner:
    """What one namespace has learnt of its objects, with what the client has of its peers. `layout`: of the part."""

    def __init__(self, session: Session, layout: KVLayout) -> None:
        self._session, self._layout = session, layout
        self._decode, self._sizes = session.decode_estimates(), LayerSizes()

    def timing(self, node: Node) -> Timing:
        """For a fetch that the planner does not steer, and learns from."""
        return Timing(
            self._session.peers[node.address], self._decode, self._sizes, self._session.metrics.bytes_received.inc
        )

    def speeds(self) -> dict[str, Speeds]:
        """Of the nodes that were measured lately, by address, as they most likely are."""
        now = time.monotonic()
        return {
            address: expected(peer, self._decode, now)
            for address, peer in list(self._session.peers.items())
            if peer.link.known(now)
        }

    def plan(self, goal: Goal, node: Node | None, chunks: Sequence[ChunkHit], floor: Quality) -> Plan:
        """Without I/O. `chunks`: the stored prefix that is good enough."""
        peer = self._session.peers[node.address] if node is not None else PeerEstimates()
        return self._controller(goal, peer, chunks, Quality.RAW, floor).plan(time.monotonic())

    async def fetch(
        self, goal: Goal, node: Node, wanted: Wanted, into: KVArray, fetch_part: FetchPart, improve: Improve
    ) -> Fetched:  # fmt: skip
        """As many of `wanted.chunks`, the first of which has its place at the beginning of `into`, as are worth it, at
        qualities no better than `wanted.quality`. A request begins when what came with the one before it is decoded;
        what came coarsely is improved in the time that is left."""
        peer = self._session.peers[node.address]
        spent_s = time.monotonic() - goal.began
        controller = self._controller(goal, peer, wanted.chunks, wanted.quality, wanted.min_quality, spent_s)
        pace = Pace(controller, peer, self._decode, self._sizes, self._session.metrics.bytes_received.inc)
        end = codec.token_count(into, self._layout)
        total = Fetched()
        while total.error is None and (step := controller.step(pace.clock())) is not None:
            part = replace(
                wanted, chunks=wanted.chunks[step.first : step.last], quality=step.quality,
                first_chunk=wanted.first_chunk or wanted.chunks[0].hash,
            )  # fmt: skip
            before = part.chunks[0].first_token - wanted.chunks[0].first_token
            fetched = await fetch_part(part, codec.token_slice(into, before, end), pace)
            total = Fetched(total.chunks + fetched.chunks, fetched.error)
            if total.chunks < controller.done or controller.done == step.first:
                break  # something that came could not be used, or nothing came
        while (
            total.error is None
            and total.chunks == controller.done
            and (refine := controller.refine(pace.clock())) is not None
        ):

            def refine_pace(indices: Iterator[int], refine: Refine = refine) -> RefinePace:
                count_received = self._session.metrics.bytes_received.inc
                return RefinePace(controller, refine, indices, peer, self._decode, self._sizes, count_received)

            if not await improve(refine, refine_pace):
                break
        if total.error is None and (stopped := controller.stopped) is not None:
            total.stopped = stopped
            self._session.metrics.planner_stops.labels(stopped.value).inc()
        return total

    def _controller(
        self, goal: Goal, peer: PeerEstimates, chunks: Sequence[ChunkHit], best: Quality, floor: Quality,
        spent_s: float = 0.0,
    ) -> Controller:  # fmt: skip
        task = task_of(goal, chunks, self._layout, self._sizes, best, floor)
        return Controller(task, peer, self._decode, goal.began, spent_s)


def task_of(
    goal: Goal, chunks: Sequence[ChunkHit], layout: KVLayout, sizes: LayerSizes, best: Quality, floor: Quality,
    computed: int = 0,
) -> Task:  # fmt: skip
    """What is to be planned. `layout`: of the part; `computed`: tokens that the engine has, none behind the first of
    `chunks`. Raises InvalidArgument where `goal.prefill` answers what is no time."""
    plannable = [
        Chunk(
            chunk.first_token, chunk.tokens, chunk.tokens * layout.elements_per_token,
            sizes.choices(chunk.quality, chunk.stored_bytes, best, floor),
        )
        for chunk in chunks
    ]  # fmt: skip
    stored = chunks[-1].first_token + chunks[-1].tokens if chunks else computed
    starts = [*(max(computed, chunk.first_token) for chunk in chunks), stored]
    recompute_s = [goal.prefill(first, goal.tokens) if first < goal.tokens else 0.0 for first in starts]
    if not all(math.isfinite(seconds) and seconds >= 0 for seconds in recompute_s):
        raise InvalidArgument("prefill_tokens_per_s(first, last) must answer seconds, at least 0")
    return Task(plannable, recompute_s, goal.tokens, goal.ttft_s)
