"""Waiting for another process without guessing how long it needs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_pause = threading.Event()


def wait_until(condition: Callable[[], bool], what: str, *, deadline_s: float = 10.0) -> None:
    """Returns once `condition()` holds; fails the test naming `what` at the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"still not so after {deadline_s:g} s: {what}")
        _pause.wait(0.01)
