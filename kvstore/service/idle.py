"""A limit on how long a stream may make no progress, at the cost of one timer rather than one task a message."""

from __future__ import annotations

import asyncio
import sys
from types import TracebackType
from typing import TYPE_CHECKING

from kvstore.errors import StreamStalled

if TYPE_CHECKING:
    from typing_extensions import Self


class IdleLimit:
    """Inside its `with`, raises StreamStalled if `progress()` is not called for `limit_s` seconds.

    Must be entered by the task that it is to interrupt. A cancellation from elsewhere passes through unchanged.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._expired = False

    def progress(self) -> None:
        self._last = self._loop.time()

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None, "entered outside a task"
        self._task = task
        self.progress()
        self._timer = self._loop.call_later(self._limit_s, self._check)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._expired and kind is asyncio.CancelledError:
            if sys.version_info >= (3, 11):
                self._task.uncancel()
            raise StreamStalled("the stream made no progress and was aborted", limit_s=self._limit_s) from None

    def _check(self) -> None:
        left = self._last + self._limit_s - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._check)
        else:
            self._expired = True
            self._task.cancel()
