"""Listens for bulk connections, on threads of its own, and lets in who has a ticket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge

from kvstore.engine.node import Node
from kvstore.errors import ListenError
from kvstore.service.boundary import Boundary
from kvstore.service.bulk.connection import Connection
from kvstore.service.bulk.tickets import Tickets
from kvstore.service.listen import clear_stale
from kvstore.service.streams import StreamMetrics
from kvstore.service.tls import ServerTls
from kvstore_proto.v1.bulk import HELLO_BYTES, BadFrame, parse_hello
from kvstore_proto.v1.bulk_socket import BulkSocket, ConnectionEnded, NoProgress

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 512  # each has a thread
HELLO_S_MAX = 2.0
BACKLOG = 128
ABSTRACT = "unix-abstract:"
_PEER_CREDENTIALS = struct.Struct("iII")


class BulkServer:
    """Serves `node`, which belongs to the running event loop, from the time it is made until `close`.

    `addresses`: "host:port" (port 0: any), "unix:/path", "unix-abstract:name". `tls`: of the TCP ones. Raises
    ListenError."""

    def __init__(
        self, node: Node, addresses: Sequence[str], tickets: Tickets, boundary: Boundary, metrics: StreamMetrics,
        registry: CollectorRegistry, *, stream_idle_s: float, hold_ms_max: int, tls: ServerTls | None = None,
    ) -> None:  # fmt: skip
        self._node, self._tickets, self._boundary, self._metrics = node, tickets, boundary, metrics
        self._stream_idle_s, self._hold_ms_max, self._tls = stream_idle_s, hold_ms_max, tls
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._open: set[BulkSocket] = set()
        self._connections = 0
        self._closed = False
        self._refused = Counter(
            "kvstore_bulk_refused", "Bulk connections not let in, by reason.", ("reason",), registry=registry
        )
        Gauge("kvstore_bulk_connections", "Bulk connections open.", registry=registry).set_function(
            lambda: self._connections
        )
        self._listeners: list[socket.socket] = []
        self.addresses: list[str] = []
        try:
            for address in addresses:
                listener, bound = _listen(address)
                self._listeners.append(listener)
                self.addresses.append(bound)
        except ListenError:
            self.close()
            raise
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), name="kvstore-bulk-accept", daemon=True).start()

    def close(self) -> None:
        """Ends every connection. Idempotent."""
        with self._lock:
            self._closed = True
            connected = list(self._open)
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes its thread
            listener.close()
        for each in connected:
            each.shutdown()
        for address in self.addresses:
            if address.startswith("unix:"):
                Path(address.removeprefix("unix:")).unlink(missing_ok=True)

    def _accept(self, listener: socket.socket) -> None:
        while not self._closed:
            try:
                accepted, _ = listener.accept()
            except OSError as error:
                if self._closed:
                    return
                log.warning("bulk: cannot accept: %s", error)  # out of descriptors: those in use will come back
                threading.Event().wait(0.1)
                continue
            with self._lock:
                full = self._connections >= CONNECTIONS_MAX
                self._connections += not full
            if full:
                self._refuse(accepted, "limit")
                continue
            threading.Thread(target=self._serve, args=(accepted,), name="kvstore-bulk", daemon=True).start()

    def _serve(self, accepted: socket.socket) -> None:
        try:
            local = accepted.family == socket.AF_UNIX
            if self._tls is not None and not local:
                accepted.settimeout(HELLO_S_MAX)  # of the whole handshake
                try:
                    accepted = self._tls.context().wrap_socket(accepted, server_side=True)
                except OSError:
                    self._refuse(accepted, "tls")
                    return
            self._let_in(BulkSocket(accepted, HELLO_S_MAX), local and _is_same_user(accepted))
        finally:
            accepted.close()
            with self._lock:
                self._connections -= 1

    def _let_in(self, connected: BulkSocket, local: bool) -> None:
        hello = memoryview(bytearray(HELLO_BYTES))
        try:
            connected.receive_into(hello)
            if not self._tickets.redeem(parse_hello(hello)):
                self._refused.labels("ticket").inc()
                return
        except (ConnectionEnded, NoProgress, BadFrame):
            self._refused.labels("hello").inc()
            return
        with self._lock:
            if self._closed:
                return
            self._open.add(connected)
        try:
            Connection(
                self._node, connected, self._loop, self._boundary, self._metrics, local=local,
                stream_idle_s=self._stream_idle_s, hold_ms_max=self._hold_ms_max,
            ).run()  # fmt: skip
        finally:
            with self._lock:
                self._open.discard(connected)

    def _refuse(self, accepted: socket.socket, reason: str) -> None:
        self._refused.labels(reason).inc()
        accepted.close()


def addresses_beside(listen: Sequence[str]) -> tuple[str, ...]:
    """Where the bulk path listens unless it is told: beside each gRPC address, and for this machine's processes."""
    beside = [
        f"{address}.bulk" if address.startswith("unix:") else f"{address.rpartition(':')[0]}:0" for address in listen
    ]
    return (*dict.fromkeys(beside), f"{ABSTRACT}kvstore-{secrets.token_hex(8)}")


def _listen(address: str) -> tuple[socket.socket, str]:
    try:
        if address.startswith(ABSTRACT):
            return _bound(socket.AF_UNIX, "\0" + address.removeprefix(ABSTRACT)), address
        if address.startswith("unix:"):
            path = Path(address.removeprefix("unix:"))
            clear_stale(path)
            return _bound(socket.AF_UNIX, os.fspath(path)), address
        host, _, port = address.rpartition(":")
        family, _, _, _, target = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        listener = _bound(family, target)
        return listener, f"{host}:{listener.getsockname()[1]}"
    except OSError as error:
        raise ListenError(f"cannot listen on {address} for bulk transfer: {error.strerror}, pass another --bulk-listen"
                          ) from None  # fmt: skip


def _bound(family: int, target: object) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family != socket.AF_UNIX:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)  # type: ignore[arg-type]
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _is_same_user(accepted: socket.socket) -> bool:
    """Memory holds every tenant's objects: only processes of the node's own user may map it."""
    credentials = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    _, user, _ = _PEER_CREDENTIALS.unpack(credentials)
    return bool(user == os.geteuid())
