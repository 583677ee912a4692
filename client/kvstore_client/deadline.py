"""One deadline for everything that a call does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from kvstore_client.errors import InvalidArgument

Clock = Callable[[], float]
SECONDS_MAX = 1e8  # three years; gRPC takes much longer ones for past


class Deadline:
    def __init__(self, seconds: float, clock: Clock = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._end = clock() + seconds

    def remaining(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._end - self._clock())

    def share(self, attempts: int) -> float:
        """Seconds that the next of `attempts` equal attempts may take."""
        return self.remaining() / attempts


def checked_seconds(value: float) -> float:
    """`value` (at most SECONDS_MAX), or InvalidArgument unless it is a positive, finite number of seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise InvalidArgument("deadline must be a positive number of seconds", deadline=value)
    return min(float(value), SECONDS_MAX)
