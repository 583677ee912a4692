"""Prefill to decode: how an engine that decodes learns what another one that prefilled has saved, and waits for it.

Both speak through `kv_transfer_params`, which a router carries from the one's answer to the other's request, as vLLM's
own connectors have it: {"do_remote_decode": true} asks for {"kvstore_tokens": n}, the tokens of the prompt whose KV is
stored or on its way to the node when the answer comes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

POLL_S = 0.02  # a lookup is a millisecond of a node


def promise(request: Any, stored: int) -> dict[str, Any] | None:
    """What the engine's answer to `request` says, of which `stored` tokens are stored or on their way."""
    asked = request.kv_transfer_params or {}
    return {"kvstore_tokens": stored} if asked.get("do_remote_decode") else None


def promised(request: Any) -> int:
    """Tokens that another engine has promised. What a user wrote there instead promises nothing."""
    tokens = (request.kv_transfer_params or {}).get("kvstore_tokens")
    return tokens if isinstance(tokens, int) and tokens > 0 else 0


def wait_for(tokens: int, held: Callable[[float], int], patience_s: float, closing: threading.Event) -> int:
    """What `held` answers, asked with the seconds that it may take, as soon as that is `tokens` or more, or has not
    grown for `patience_s`."""
    grew_at = time.monotonic()
    best = held(patience_s)
    while best < tokens and not closing.wait(POLL_S):
        left_s = grew_at + patience_s - time.monotonic()
        if left_s <= 0:
            break
        before, best = best, held(left_s)
        if best > before:
            grew_at = time.monotonic()
    return best
