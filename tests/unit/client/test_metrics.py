"""What a client counts and logs, and results as values."""

from __future__ import annotations

import logging
import threading

import pytest
from prometheus_client import CollectorRegistry

from kvstore_client import ChunkHit, DeleteResult, Hit, PutResult, Quality
from kvstore_client.metrics import OncePerReason, client_metrics

THREADS = 8


def test_trouble_is_logged_once_for_each_call_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    once = OncePerReason()
    with caplog.at_level(logging.WARNING, "kvstore_client"):
        for _ in range(3):
            once.warn("get", "deadline", "node=a")
            once.warn("put", "deadline", "node=a")
            once.warn("get", "damaged", "node=a")
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "get: deadline: node=a", "put: deadline: node=a", "get: damaged: node=a",
    ]  # fmt: skip


def test_clients_of_one_registry_share_their_metrics() -> None:
    """Also when many threads make their first client at once: a registry takes each metric once."""
    registry, found = CollectorRegistry(), []
    together = threading.Barrier(THREADS)

    def make() -> None:
        together.wait()
        found.append(client_metrics(registry))

    threads = [threading.Thread(target=make) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == THREADS
    assert len(set(map(id, found))) == 1
    assert client_metrics(CollectorRegistry()) is not found[0]


def test_effective_quality_is_the_worse_of_coding_and_prefix() -> None:
    def chunk(quality: Quality, provenance: Quality) -> ChunkHit:
        return ChunkHit(bytes(32), 0, 16, quality, provenance, 100, "host")

    assert chunk(Quality.LOSSLESS, Quality.LOW).effective_quality is Quality.LOW
    assert chunk(Quality.HIGH, Quality.RAW).effective_quality is Quality.HIGH


def test_results_are_values() -> None:
    for empty in (Hit(), PutResult(), DeleteResult()):
        assert empty == type(empty)()
        assert hash(empty) == hash(type(empty)())
    assert (Hit().tokens, Hit().chunks, Hit().lease) == (0, (), None)
