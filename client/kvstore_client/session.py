"""What all calls of a client share: connections, threads, metrics, and the rule for failures.

Not strict (the default), whatever a node does or fails to do is a miss, or a chunk that was not stored: counted in
`metrics.py` and logged once a reason. Strict, it is the typed error of `errors.py`.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from prometheus_client import CollectorRegistry

import kvstore_codec as codec
from kvstore_client.background import BackgroundPuts
from kvstore_client.connection import Connections, Node, timeout_s, worth_another_node
from kvstore_client.deadline import Deadline, checked_seconds
from kvstore_client.errors import (
    ClientClosed,
    DeadlineExceeded,
    ErrorCode,
    KvClientError,
    ServerFailed,
    Unavailable,
)  # fmt: skip
from kvstore_client.failover import Failover
from kvstore_client.metrics import OncePerReason, client_metrics
from kvstore_client.planner.estimates import DecodeEstimates, PeerEstimates
from kvstore_client.profile_shelf import ProfileShelf
from kvstore_client.profile_transfer import ProfileTransfer
from kvstore_client.putting import Stored
from kvstore_client.tls import TLS
from kvstore_client.transports.blob import Buffers
from kvstore_client.transports.bulk_path import Transport

THREADS_MAX = 4  # of the codec, by default
PUT_BUFFERS_BYTES_MAX = 64 << 20  # kept for objects that are put: new memory costs more than what is written to it

R = TypeVar("R")


class Session:
    def __init__(
        self, seeds: Sequence[str], *, deadline_s: float, strict: bool, threads: int | None, tenant_key: bytes,
        registry: CollectorRegistry, transport: Transport, background_bytes: int, tls: TLS | None,
    ) -> None:  # fmt: skip
        self.strict, self.tenant_key = strict, tenant_key
        self.metrics = client_metrics(registry)
        self.connections = Connections(seeds, transport, self._bulk_failed, tls)
        self.failover = Failover(
            len(set(seeds)), lambda node, state: self.metrics.circuit_changes.labels(node, state).inc()
        )
        self.profiles = ProfileShelf(
            lambda: ProfileTransfer(self.tenant_key, self.executor, self.metrics), self.metrics
        )  # fmt: skip
        self.peers: dict[str, PeerEstimates] = defaultdict(PeerEstimates)  # by address: what gets have measured
        self.put_buffers = Buffers(PUT_BUFFERS_BYTES_MAX)
        self.background = BackgroundPuts(background_bytes, self.metrics)
        self.refining: set[asyncio.Task[None]] = set()  # better values of gets that are on their way
        self._deadline_s = checked_seconds(deadline_s)
        self._log = OncePerReason()
        self.threads = threads or min(THREADS_MAX, os.cpu_count() or 1)  # that decode
        self._making = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._background_executor: ThreadPoolExecutor | None = None
        self._closed = False

    @property
    def executor(self) -> ThreadPoolExecutor:
        """Threads that encode and decode; made when first used, in any thread."""
        with self._making:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self.threads, "kvstore-client")
            return self._executor

    @property
    def background_executor(self) -> ThreadPoolExecutor:
        """Threads that encode what is put in the background: a get's decoding does not queue up behind that."""
        if self._background_executor is None:
            self._background_executor = ThreadPoolExecutor(self.threads, "kvstore-background")
        return self._background_executor

    def decode_estimates(self) -> DecodeEstimates:
        """For one namespace."""
        return DecodeEstimates(self.threads)

    def begin(self, deadline_s: float | None, *, at_least_s: float = 0.0) -> Deadline:
        """The deadline of a call that starts now; `at_least_s`: where the call names none. Raises ClientClosed,
        InvalidArgument."""
        if self._closed:
            raise ClientClosed("the client is closed")
        if deadline_s is None:
            return Deadline(max(self._deadline_s, at_least_s))
        return Deadline(checked_seconds(deadline_s))

    async def attempt(
        self, call: str, key: bytes, deadline: Deadline, function: Callable[[Node, float], Awaitable[R]],
        first: str = "",
    ) -> tuple[Node, R]:  # fmt: skip
        """`function(node, timeout in seconds)` at the best node for `key`, or at the next where it does not answer; one
        that has been failing is asked last. `first`: address of the node to begin with instead.

        Raises the last error."""
        nodes = sorted(self.connections.ranked(key), key=lambda node: node.address != first)  # stable
        last: KvClientError | None = None
        for node, sharing in self.failover.turns(nodes):
            try:
                return node, await self._ask(node, function, timeout_s(deadline, sharing))
            except KvClientError as error:
                self.failed(node, call, error)
                if self._closed or not worth_another_node(error):
                    raise
                last = error
        assert last is not None, "a target has at least one seed"
        raise last

    def at_hand(self, key: bytes, first: str = "") -> tuple[Node, int] | None:
        """The node that `attempt` would begin with, and the number of those that are to share the time; None where no
        call has gone there yet, or where it has been failing. Any thread may ask."""
        nodes = self.connections.known(key)
        at = next((at for at, node in enumerate(nodes) if node is not None and node.address == first), 0)
        node = nodes.pop(at)
        if node is None or (nodes and not self.failover.is_well(node)):
            return None
        return node, 1 + sum(other is None or self.failover.is_well(other) for other in nodes)

    async def _ask(self, node: Node, function: Callable[[Node, float], Awaitable[R]], seconds: float) -> R:
        """Raises KvClientError, of which all who judge the node have been told."""
        began_s = time.monotonic()
        try:
            result = await function(node, seconds)
        except KvClientError as error:
            self.unanswered(node, error, began_s)
            raise
        self.answered(node)
        return result

    def answered(self, node: Node) -> None:
        """Tells all who judge a node that a call to it went well. Any thread may."""
        self.failover.answered(node)
        self.connections.answered(node)

    def unanswered(self, node: Node, error: KvClientError, began_s: float) -> None:
        """Tells them what a call to it that began at `began_s` (monotonic) ended by."""
        self.failover.failed(node, error)
        if isinstance(error, DeadlineExceeded):
            self.connections.unanswered(node, began_s)
            self.peers[node.address].link.trust()
        else:
            self.connections.answered(node)

    def failed(self, node: Node, call: str, error: KvClientError) -> None:
        """Counts what a call at one node failed by. Where the node was away, gets that gave it up just before met that,
        and no slow link."""
        self.metrics.failures.labels(call, error.code.value).inc()
        if isinstance(error, Unavailable | ServerFailed):
            self.peers[node.address].link.trust()

    def forgive(self, call: str, error: KvClientError) -> None:
        """Logs what a call failed by, or raises it where the client is strict."""
        if self.strict:
            raise error
        self.warn(call, error.code, str(error))

    def count_rejected(self, call: str, stored: Sequence[Stored]) -> None:
        """What a node turned down: no error, but known."""
        rejected = [each for each in stored if each.outcome == "rejected"]
        if rejected:
            self.metrics.rejections.labels(ErrorCode.REFUSED.value).inc(len(rejected))
            self.warn(call, ErrorCode.REFUSED, rejected[0].reason)

    def count_miss(self, reason: str) -> None:
        """Of a lookup or get that found less than all."""
        self.metrics.misses.labels(reason).inc()

    def warn(self, call: str, code: ErrorCode | codec.ErrorCode, details: str) -> None:
        """Logs the first event of its kind."""
        self._log.warn(call, code.value, details)

    @contextmanager
    def timed(self, call: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.metrics.seconds.labels(call).observe(time.perf_counter() - began)

    def _bulk_failed(self, node: str, error: KvClientError) -> None:
        """gRPC does instead: no call fails for it."""
        self.metrics.failures.labels("bulk", error.code.value).inc()
        self.warn("bulk", error.code, str(error))

    async def aclose(self) -> None:
        """Idempotent. Waits for what is put in the background, for as long as a call may take."""
        self._closed = True
        await self.background.aclose(self._deadline_s)
        for task in (refining := list(self.refining)):
            task.cancel()
        await self.profiles.aclose()
        await self.connections.aclose()
        await asyncio.gather(*refining, return_exceptions=True)  # they let go of leases, or cannot any more
        self._executor = self._background_executor = None  # their threads end with the last call that uses them
