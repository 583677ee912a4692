"""How long the connector kept requests waiting, by a stopwatch around its hooks: for a lookup, and for a load."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any


class Waits:
    """Put around the hooks of a connector class, before an engine makes one of it in this process."""

    def __init__(self, connector: type[Any]) -> None:
        self.worker: Any = None  # the connector's worker side
        self._arrived: dict[str, float] = {}
        self._allocated: dict[str, float] = {}
        self._lookup_s = self._load_s = 0.0
        self._after(connector, "register_kv_caches", self._registered)
        self._after(connector, "on_new_request", self._came)
        self._after(connector, "get_num_new_matched_tokens", self._asked)
        self._after(connector, "update_state_after_alloc", self._begun)
        self._after(connector, "update_connector_output", self._ended)

    def taken(self) -> dict[str, float]:
        """Seconds of the longest waits since the last call."""
        taken = {"lookup_s": self._lookup_s, "load_s": self._load_s}
        self._lookup_s = self._load_s = 0.0
        return taken

    def _registered(self, connector: Any, _: Any, *arguments: Any) -> None:
        self.worker = connector._worker

    def _came(self, connector: Any, _: Any, request: Any) -> None:
        self._arrived[request.request_id] = time.perf_counter()

    def _asked(self, connector: Any, answer: Any, request: Any, computed: int) -> None:
        if answer[0] is not None and request.request_id in self._arrived:
            waited_s = time.perf_counter() - self._arrived.pop(request.request_id)
            self._lookup_s = max(self._lookup_s, waited_s)

    def _begun(self, connector: Any, _: Any, request: Any, blocks: Any, external: int) -> None:
        if external:
            self._allocated[request.request_id] = time.perf_counter()

    def _ended(self, connector: Any, _: Any, output: Any) -> None:
        for request_id in output.finished_recving or ():
            self._load_s = max(self._load_s, time.perf_counter() - self._allocated.pop(request_id))

    @staticmethod
    def _after(connector: type[Any], name: str, then: Callable[..., None]) -> None:
        hook = getattr(connector, name)

        @wraps(hook)
        def watched(instance: Any, *arguments: Any, **named: Any) -> Any:
            answer = hook(instance, *arguments, **named)
            then(instance, answer, *arguments)
            return answer

        setattr(connector, name, watched)
