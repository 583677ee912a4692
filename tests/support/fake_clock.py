"""A clock that stands still until a test moves it."""

from __future__ import annotations


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s
