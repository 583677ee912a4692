"""Connections to Redis whose every call ends in time.

`redis` bounds each wait on a socket, not their sum: a server that sends a byte now and then would hold a call for
ever. So a call has an end, too: no wait is longer than the timeout, and none reaches beyond `CALL_TIMEOUTS` of them
after the start of the call, connecting and the TLS handshake included. Two bounds, since they mean different things: a
server that hangs is found out after one timeout, one that delivers slowly but steadily may take a few. Only the
resolver is outside of them: where it may hang, name the servers by address.

Nothing is tried twice, and `redis` is told so.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redis.backoff import NoBackoff
from redis.connection import BlockingConnectionPool, Connection, SSLConnection, UnixDomainSocketConnection
from redis.retry import Retry

from kvstore.tiers.redis_url import RedisUrl

CALL_TIMEOUTS = 4
CONNECTIONS_MAX = 16  # to one server: more threads than that wait for one another
_SEND_BYTES = 1 << 20
_READ_BYTES = 1 << 18


class CallLimits:
    """How long a call, and each wait in it, may take. A call is made by one thread."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._thread = threading.local()

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call that consists of others bounds them all together."""
        if hasattr(self._thread, "end_s"):
            yield
            return
        self._thread.end_s = time.monotonic() + CALL_TIMEOUTS * self.timeout_s
        try:
            yield
        finally:
            del self._thread.end_s

    def left_s(self) -> float:
        """What the next wait may take, seconds; 0 when the call's time is used up."""
        end_s: float = self._thread.end_s
        return max(0.0, min(self.timeout_s, end_s - time.monotonic()))

    def wait_s(self) -> float:
        """The same. Raises TimeoutError instead of 0, which for a socket means something else."""
        left_s = self.left_s()
        if not left_s:
            raise TimeoutError("the call has used up its time")
        return left_s


@dataclass(frozen=True)
class Credentials:
    """What every server is shown, beside what the URL says, and what its certificate is checked with. Files are
    PEM."""

    password: str | None = field(default=None, repr=False)
    ca: Path | None = None  # none: the system's
    certificate: Path | None = None
    key: Path | None = None


def open_pool(url: RedisUrl, credentials: Credentials, limits: CallLimits) -> BlockingConnectionPool:
    """A pool for one server, without a connection yet."""
    options: dict[str, Any] = {
        "limits": limits,
        "username": url.username,
        "password": url.password or credentials.password,
        "db": url.db,
        "socket_timeout": limits.timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "socket_read_size": _READ_BYTES,
        "protocol": 2,  # nothing of RESP3 is used, and with it `redis` listens for notifications
        "driver_info": None,  # two round trips a connection
    }
    if url.path:
        options |= {"connection_class": _UnixConnection, "path": url.path}
    elif url.tls:
        options |= {
            "connection_class": _TlsConnection,
            "host": url.host,
            "port": url.port,
            "ssl_ca_certs": _text(credentials.ca),
            "ssl_certfile": _text(credentials.certificate),
            "ssl_keyfile": _text(credentials.key),
            "ssl_cert_reqs": "required",
            "ssl_check_hostname": True,
        }
    else:
        options |= {"connection_class": _TcpConnection, "host": url.host, "port": url.port}
    options |= {"max_connections": CONNECTIONS_MAX, "timeout": limits.timeout_s}
    return BlockingConnectionPool(**options)  # type: ignore[no-untyped-call]


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


class _LimitedSocket:
    """Every wait of a socket ends when the limits say."""

    def __init__(self, real: socket.socket, limits: CallLimits) -> None:
        self._real, self._limits = real, limits

    def recv_into(self, buffer: bytearray) -> int:
        self._real.settimeout(self._limits.wait_s())
        return self._real.recv_into(buffer)

    def sendall(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self._real.settimeout(self._limits.wait_s())
            view = view[self._real.send(view[:_SEND_BYTES]) :]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


if TYPE_CHECKING:
    from redis.connection import AbstractConnection as _Mixed
else:
    _Mixed = object


class _Limited(_Mixed):
    """Mixed into the connections of `redis`."""

    def __init__(self, *, limits: CallLimits, **options: Any) -> None:
        self._limits = limits
        super().__init__(**options)

    def _connect(self) -> _LimitedSocket:
        # Both hold for the TLS handshake, which Python bounds as one wait.
        self.socket_timeout = self.socket_connect_timeout = self._limits.wait_s()
        return _LimitedSocket(super()._connect(), self._limits)  # type: ignore[safe-super, no-untyped-call]


class _TcpConnection(_Limited, Connection):
    pass


class _TlsConnection(_Limited, SSLConnection):
    pass


class _UnixConnection(_Limited, UnixDomainSocketConnection):
    pass
