"""What the scheduler's side of the connector asks of the workers' side in one step, and what that has to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore_client.integrations.vllm.identity import RequestKey
from kvstore_client.planner.costs import PrefillCost
from kvstore_client.planner.estimates import Speeds

Tokens = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Load:
    """`tokens`: the stored prefix of a prompt; of it, those from `first_token` on go to the request's blocks.
    `block_ids`: those of all of `tokens`; the ones before `first_token` are shared with others and stay as they are.
    `prefill`: the engine's; the load is broken off where computing is faster. None: it is not. `node`: where they were
    found; "": nobody knows."""

    request_id: str
    key: RequestKey
    tokens: Tokens
    first_token: int
    block_ids: Sequence[int]
    prefill: PrefillCost | None = None
    node: str = ""


@dataclass(frozen=True)
class Save:
    """`tokens`: a prompt so far; the KV of those from `first_token` on, whole chunks, is in `block_ids` at the end of
    the step. `save_id`: of this scheduler's saves."""

    request_id: str
    key: RequestKey
    tokens: Tokens
    first_token: int
    block_ids: Sequence[int]
    save_id: int = 0


@dataclass(frozen=True)
class Report:
    """Of one step, of one worker or of several. `speeds`: what loads that ended have measured, by node. `stored`: saves
    that the node has taken whole, with the number of workers that say so."""

    speeds: Mapping[str, Speeds] = field(default_factory=dict)
    stored: Mapping[int, int] = field(default_factory=dict)

    def merged(self, other: Report) -> Report:
        """Of several workers that load at once the slowest counts."""
        speeds = dict(self.speeds)
        for node, measured in other.speeds.items():
            ours = speeds.get(node, measured)
            speeds[node] = min(ours, measured, key=lambda each: each.bytes_per_s)
        stored = {save_id: self.stored.get(save_id, 0) + other.stored.get(save_id, 0)
                  for save_id in {**self.stored, **other.stored}}  # fmt: skip
        return Report(speeds, stored)
