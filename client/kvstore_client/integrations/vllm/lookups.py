"""Lookups of requests: in threads, and not at all while the node fails.

A node that is silent would cost each request `lookup_s`. After a few failures in a row requests are answered at once
that there is nothing, and one lookup at a time, which no request waits for, finds out when the node is back.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from kvstore_client.circuit import Circuit
from kvstore_client.errors import InvalidArgument, KvClientError
from kvstore_client.integrations.vllm.identity import Namespaces, RequestKey
from kvstore_client.integrations.vllm.metrics import ConnectorMetrics
from kvstore_client.integrations.vllm.planning import Found
from kvstore_client.integrations.vllm.rendezvous import wait_for
from kvstore_client.lookups import good_enough
from kvstore_codec import Quality

#: Under way at a time; each waits for the node for `lookup_s` at most.
LOOKUPS_MAX = 16
LEASE_S = 30.0
#: Between two tries while the node is away. Short, since nobody waits for them.
PAUSE_S_MAX = 2.0


class Lookups:
    """`namespaces`: of a strict client, which tells a node that failed from one that has nothing. `floor`: the least
    quality that counts."""

    def __init__(self, namespaces: Namespaces, metrics: ConnectorMetrics, floor: Quality, lookup_s: float) -> None:
        self._namespaces, self._metrics, self._floor, self._lookup_s = namespaces, metrics, floor, lookup_s
        self._threads = ThreadPoolExecutor(LOOKUPS_MAX, "kvstore-lookup")
        self._closing = threading.Event()
        self._circuit = Circuit(time.monotonic, random.Random(), pause_s_max=PAUSE_S_MAX)

    def start(self, key: RequestKey, prompt: Sequence[int], count: int, promised: int = 0) -> Future[Found]:
        """Looks the first `count` tokens of a prompt up; waits for those that another engine has `promised`. The future
        never raises: a node that fails holds nothing."""
        if self._circuit.allow():
            awaited = self._circuit.state == "closed"
            asking = self._threads.submit(self._ask, key, prompt, count, promised, awaited)
            if awaited:
                return asking
        nothing: Future[Found] = Future()
        nothing.set_result(self._skipped())
        return nothing

    def close(self) -> None:
        self._closing.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _ask(self, key: RequestKey, prompt: Sequence[int], count: int, promised: int, awaited: bool) -> Found:
        if awaited and self._circuit.state != "closed":  # it has opened while others had the threads
            return self._skipped()
        began_s = time.monotonic()
        try:
            found = self._found(key, np.asarray(prompt[:count], np.uint32), promised)
        except (InvalidArgument, OSError) as error:  # its adapter cannot be read, which says nothing of the node
            self._failed(error)
            return Found()
        except KvClientError as error:
            self._failed(error)
            if self._circuit.fail():
                self._metrics.count("circuit_changes", "open")
            return Found()
        finally:
            self._metrics.observe("lookup_seconds", time.monotonic() - began_s)
        if self._circuit.succeed():
            self._metrics.count("circuit_changes", "closed")
        self._metrics.count("lookups", "hit" if found.chunks else "miss")
        return found

    def _found(self, key: RequestKey, tokens: npt.NDArray[np.uint32], promised: int) -> Found:
        """What the node holds of `tokens`; the last that it said, where it fails while more is waited for. Raises
        KvClientError, InvalidArgument, OSError."""
        namespace, size = self._namespaces.of(key), self._namespaces.layout.chunk_tokens
        answers: list[Found] = []

        def held(seconds: float) -> int:
            began_s = time.monotonic()
            try:
                hit = namespace.lookup(tokens, lease_ms=int(LEASE_S * 1000), deadline=seconds)
            except KvClientError:
                if not answers:
                    raise
                return 0  # counted by the client
            node = hit.lease.node if hit.lease is not None else ""
            took_s = time.monotonic() - began_s
            answers.append(Found(good_enough(hit.chunks, self._floor), node, hit.latency_s, took_s))
            return answers[-1].tokens

        wait_for(min(promised, len(tokens)) // size * size, held, self._lookup_s, self._closing)
        return answers[-1]

    def _skipped(self) -> Found:
        self._metrics.count("lookups", "skipped")
        return Found()

    def _failed(self, error: Exception) -> None:
        self._metrics.count("lookups", "failed")
        self._metrics.log.warn("lookup", type(error).__name__, str(error))
