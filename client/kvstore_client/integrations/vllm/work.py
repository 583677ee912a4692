"""What the scheduler's side of the connector asks of the workers' side in one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore_client.integrations.vllm.identity import RequestKey

Tokens = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Load:
    """`tokens`: the stored prefix of a prompt; of it, those from `first_token` on go to the request's blocks.
    `block_ids`: those of all of `tokens`; the ones before `first_token` are shared with others and stay as they are."""

    request_id: str
    key: RequestKey
    tokens: Tokens
    first_token: int
    block_ids: Sequence[int]


@dataclass(frozen=True)
class Save:
    """`tokens`: a prompt so far; the KV of those from `first_token` on, whole chunks, is in `block_ids` at the end of
    the step."""

    request_id: str
    key: RequestKey
    tokens: Tokens
    first_token: int
    block_ids: Sequence[int]
