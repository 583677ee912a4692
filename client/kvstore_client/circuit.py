"""A circuit breaker: whether to ask a server that has been failing.

    closed ──failures_max failures in a row──▶ open ──its pause is over──▶ half-open: one call may try
       ▲                                        ▲                              │
       └────────────── it succeeds ─────────────┴────── it fails: twice the pause

A server that hangs so costs one timeout a pause, not one a call. Pauses carry jitter, so that the nodes of a fleet do
not all come back in the same moment. (M. Nygard, Release It!, 2nd ed. 2018, ch. 5.)

Written here because the libraries do not fit calls from many threads: pybreaker holds its lock while the call runs,
circuitbreaker lets every thread through when the pause is over, neither backs off.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half-open"]

FAILURES_MAX = 3
PAUSE_S = 0.5
PAUSE_S_MAX = 10.0


class Circuit:
    """Safe to use from any thread. Each `allow()` that says yes is answered by `succeed()` or `fail()`; one that is
    not, since its thread died, stands in the way for one pause."""

    def __init__(
        self, clock: Callable[[], float], rng: random.Random, failures_max: int = FAILURES_MAX,
        pause_s_max: float = PAUSE_S_MAX,
    ) -> None:  # fmt: skip
        self._clock, self._rng = clock, rng
        self._failures_max, self._pause_s_max = failures_max, pause_s_max
        self._lock = threading.Lock()
        self._state: State = "closed"
        self._failures = 0
        self._pause_s = PAUSE_S
        self._retry_at_s = 0.0

    @property
    def state(self) -> State:
        return self._state

    def allow(self) -> bool:
        """Whether to make the call."""
        with self._lock:
            if self._state == "closed":
                return True
            if self._clock() < self._retry_at_s:
                return False
            self._state = "half-open"
            self._wait()
            return True

    def succeed(self) -> bool:
        """Whether this closed the circuit."""
        with self._lock:
            closed = self._state != "closed"
            self._state, self._failures, self._pause_s = "closed", 0, PAUSE_S
            return closed

    def fail(self) -> bool:
        """Whether this opened the circuit; not so where it only stays open after a try."""
        with self._lock:
            before = self._state
            if before == "open":  # a call from before it opened: only what is tried after a pause prolongs it
                return False
            if before == "closed":
                self._failures += 1
                if self._failures < self._failures_max:
                    return False
            else:
                self._pause_s = min(2 * self._pause_s, self._pause_s_max)
            self._state = "open"
            self._wait()
            return before == "closed"

    def _wait(self) -> None:
        self._retry_at_s = self._clock() + self._pause_s * self._rng.uniform(0.5, 1.0)
