"""Tickets: a call that gRPC has let in gets one, and opens one bulk connection with it."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable

from kvstore_proto.v1.bulk import TICKET_BYTES

TICKETS_MAX = 4096  # not yet used; beyond it the oldest are worth nothing
TICKET_MS = 10_000


class Tickets:
    """Any thread may call it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._ends_s: dict[bytes, float] = {}  # oldest first

    def issue(self) -> bytes:
        """Good once, for TICKET_MS."""
        ticket = secrets.token_bytes(TICKET_BYTES)
        with self._lock:
            self._ends_s[ticket] = self._clock() + TICKET_MS / 1000
            while len(self._ends_s) > TICKETS_MAX:
                del self._ends_s[next(iter(self._ends_s))]
        return ticket

    def redeem(self, ticket: bytes) -> bool:
        """Whether it was good; it is not any more."""
        with self._lock:
            return self._ends_s.pop(ticket, 0.0) > self._clock()
