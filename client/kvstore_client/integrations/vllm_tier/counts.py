"""What the tier counts between two of vLLM's questions, and what it logs."""

from __future__ import annotations

import threading
from collections import Counter

from kvstore_client.metrics import OncePerReason

#: vLLM exports it as `kvstore_vllm_tier_chunks_total{operation, outcome}`.
CHUNKS = "kvstore_vllm_tier_chunks"
CHUNKS_HELP = (
    "Chunks by operation and outcome. lookup: hit, miss, paused (the node did not answer just now). load: loaded, "
    "missed. store: stored, have, rejected, late (its turn did not come in time), failed."
)


class Counts:
    """Any thread may count."""

    def __init__(self) -> None:
        self.log = OncePerReason()
        self._lock = threading.Lock()
        self._chunks: Counter[tuple[str, str]] = Counter()

    def add(self, operation: str, outcome: str, chunks: int) -> None:
        with self._lock:
            self._chunks[operation, outcome] += chunks

    def take(self) -> dict[tuple[str, str], int]:
        """Since the last time, without zeros."""
        with self._lock:
            taken, self._chunks = self._chunks, Counter()
        return {labels: chunks for labels, chunks in taken.items() if chunks}
