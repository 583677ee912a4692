"""Whether a load pays: the client's planner (docs/planner.md), asked before anything is fetched.

Workers measure links and decoding when they load; the scheduler measures the engine's prefill. What is not measured is
tried: then a load is on probation, and ends where it turns out slower than computing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvstore_client.integrations.vllm.prefill import PrefillSpeed
from kvstore_client.planned import Goal, task_of
from kvstore_client.planner.controller import Controller
from kvstore_client.planner.estimates import DecodeEstimates, PeerEstimates, Speeds
from kvstore_client.planner.sizes import LayerSizes
from kvstore_client.results import ChunkHit
from kvstore_codec import KVLayout, Quality


@dataclass(frozen=True)
class Found:
    """What a lookup found that is good enough: chunks from the prompt's first on, on `node`, which takes `latency_s`
    for an answer, and took `seconds` for this one."""

    chunks: Sequence[ChunkHit] = ()
    node: str = ""
    latency_s: float = 0.0
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return self.chunks[-1].first_token + self.chunks[-1].tokens if self.chunks else 0


@dataclass(frozen=True)
class Decision:
    """`tokens`: of the prompt, up to which to load. `choice`: as the metric `plans` has it; `reason`: why nothing is to
    be loaded, as the metric `computes` has it."""

    tokens: int
    choice: str
    reason: str = ""


class LoadPlanner:
    """`floor`: the least quality that is loaded. `clock`: seconds."""

    def __init__(
        self, layout: KVLayout, floor: Quality, prefill: PrefillSpeed, clock: Callable[[], float], deadline_s: float
    ) -> None:
        self._layout, self._floor, self._prefill = layout, floor, prefill
        self._clock, self._deadline_s = clock, deadline_s
        self._peers: dict[str, PeerEstimates] = {}
        self._decode = DecodeEstimates(1)  # what workers tell is of all their threads
        self._sizes = LayerSizes()

    def learn(self, speeds: Mapping[str, Speeds]) -> None:
        """What workers have measured, by node."""
        now = self._clock()
        for node, measured in speeds.items():
            peer = self._peers.setdefault(node, PeerEstimates())
            if measured.doubt_s:
                peer.link.doubt(measured.bytes_per_s, 1.0, now, measured.doubt_s)
            else:
                peer.link.observe(measured.bytes_per_s, 1.0, now)
            peer.latency.observe(measured.latency_s)
            for quality, elements_per_s in measured.decode.items():
                self._decode.observe(quality, round(elements_per_s), 1.0, now)

    def decide(self, found: Found, computed: int, prompt_tokens: int) -> Decision:
        """How much of `found` to load for an engine that has the first `computed` tokens of a prompt."""
        now, prefill = self._clock(), self._prefill.cost
        peer = self._peers.setdefault(found.node, PeerEstimates())
        peer.latency.observe(found.latency_s)
        peer.link.answered(found.seconds, now)
        if prefill is None:
            return Decision(found.tokens, "probe")
        chunks = found.chunks[computed // self._layout.chunk_tokens :]
        began = now - peer.latency.expected  # a load begins with a lookup of its own
        goal = Goal(self._deadline_s, prefill, prompt_tokens, began)
        task = task_of(goal, chunks, self._layout, self._sizes, Quality.RAW, self._floor, computed)
        controller = Controller(task, peer, self._decode, began)
        step = controller.step(now)
        if step is None:
            assert controller.stopped is not None, "there are chunks"
            return Decision(0, "compute", controller.stopped.value)
        last = chunks[step.last - 1]
        loaded = "load" if step.last == len(chunks) else "part"
        return Decision(last.first_token + last.tokens, loaded if peer.link.known(now) else "probe")
