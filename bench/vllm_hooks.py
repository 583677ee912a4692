"""How long the connector's hooks hold up the engine's steps, by a stopwatch around each of them.

The calls that count are those made while a load is under way, when the engine does nothing but turn and every
microsecond of a hook is taken from the threads that load; all questions for what can be loaded; and, by a name of their
own, the steps that copy KV out.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

HOOKS = (
    "get_num_new_matched_tokens", "build_connector_meta", "update_connector_output", "start_load_kv", "wait_for_save",
    "get_finished", "get_block_ids_with_load_errors", "build_connector_worker_meta", "get_kv_connector_stats",
    "take_events",
)  # fmt: skip
SAVING = "wait_for_save"


class HookTimes:
    """Put around the hooks of a connector class, before an engine makes one of it in this process."""

    def __init__(self, connector: type[Any]) -> None:
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._workers: list[Any] = []
        self._watch_pages(connector)
        for name in HOOKS:
            setattr(connector, name, self._timed(name, getattr(connector, name)))

    def table(self) -> dict[str, dict[str, float]]:
        """Hook → calls, and microseconds: median, the hundredth slowest, the slowest."""
        return {
            name: {
                "calls": len(seconds),
                "p50_us": statistics.median(seconds) * 1e6,
                "p99_us": sorted(seconds)[int(0.99 * len(seconds))] * 1e6,
                "max_us": max(seconds) * 1e6,
            }
            for name, seconds in self._seconds.items()
        }

    def _watch_pages(self, connector: type[Any]) -> None:
        register = connector.register_kv_caches

        def registered(instance: Any, kv_caches: Any) -> None:
            register(instance, kv_caches)
            self._workers.append(instance._worker)

        connector.register_kv_caches = registered

    def _timed(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            saves = name == SAVING and bool(arguments[0]._work.saves)
            counts = saves or name == HOOKS[0] or any(worker.loading for worker in self._workers)
            began = time.perf_counter()
            try:
                return hook(*arguments, **named)
            finally:
                if counts:
                    self._seconds[f"{name}, saving" if saves else name].append(time.perf_counter() - began)

        return timed
