"""A blocking socket that speaks frames (bulk.py), for threads: large payloads move between it and the caller's memory
in few system calls, without the interpreter's lock.

A limit on waiting is the kernel's (SO_RCVTIMEO), which lets one call receive a whole object; TLS has no such call, and
Python's timeouts instead.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from kvstore_proto.v1.bulk import HEADER_BYTES, BadFrame, Header, Kind, header, parse_header

#: Of a TLS record's plaintext there are at most 16 KiB; writes of this size keep them whole and memory bounded.
TLS_WRITE_BYTES = 1 << 20
#: So much, or for so long, is received over TLS before whoever waits for it is asked whether to go on.
TLS_READ_BYTES, TLS_READ_S = 512 << 10, 0.002
_VECTOR_MAX = 1024  # buffers that the kernel takes in one call
_TIMEVAL = struct.Struct("@ll")


class ConnectionEnded(Exception):
    """The peer closed it, reset it, or somebody here shut it down."""


class NoProgress(Exception):
    """Nothing moved for as long as may be waited."""


class BulkSocket:
    """Owns `sock`. One thread at a time uses it, except for `shutdown`, which ends what another is waiting for."""

    def __init__(self, sock: socket.socket, limit_s: float) -> None:
        self._socket = sock
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._waitall = 0 if self._tls else socket.MSG_WAITALL
        self._buffer = memoryview(bytearray(HEADER_BYTES))
        self._limit_s = 0.0
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.settimeout(None)
        self.limit(limit_s)

    def limit(self, seconds: float) -> None:
        """How long the peer may make no progress in each call from now on. What was set before stays where it is at
        most a tenth more."""
        seconds = max(seconds, 0.001)  # 0 would be for ever
        if 0.9 * self._limit_s <= seconds <= self._limit_s:
            return
        self._limit_s = seconds
        if self._tls:
            self._socket.settimeout(seconds)
            return
        part, whole = math.modf(seconds)
        value = _TIMEVAL.pack(int(whole), int(part * 1e6) + 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def send(self, kind: Kind, index: int, payload: bytes | memoryview = b"") -> None:
        """Raises ConnectionEnded, NoProgress."""
        with _failures():
            if self._tls:
                self._socket.sendall(header(kind, index, len(payload)))
                self._send_tls(payload)
                return
            self._socket.sendall(header(kind, index, len(payload)), socket.MSG_MORE if len(payload) else 0)
            if len(payload):
                self._socket.sendall(payload)

    def send_bytes(self, data: bytes) -> None:
        """Frames that are complete as they are. Raises as `send`."""
        with _failures():
            self._socket.sendall(data)

    def send_buffers(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Frames that are complete, in pieces, as few system calls as can be. Raises as `send`."""
        left = [memoryview(each) for each in buffers if len(each)]
        with _failures():
            if self._tls:
                for each in left:
                    self._send_tls(each)
                return
            while left:
                left = _behind(left, self._socket.sendmsg(left[:_VECTOR_MAX]))

    def receive(self, *expected: Kind, until: Callable[[], float] | None = None) -> Header:
        """The next frame's header; `until` as of `receive_into`. Raises ConnectionEnded, NoProgress, BadFrame (also for
        a kind not expected)."""
        self.receive_into(self._buffer, until=until)
        found = parse_header(self._buffer)
        if found.kind not in expected:
            raise BadFrame(f"{found.kind.name} came out of place")
        return found

    def receive_into(
        self, view: memoryview, *, after: Callable[[int], None] | None = None, until: Callable[[], float] | None = None
    ) -> None:
        """Fills `view`. `until`: seconds left for all of it, asked again after each piece; `after` is told each piece's
        length. Raises ConnectionEnded, NoProgress."""
        at, length = 0, len(view)
        while at < length:
            if until is not None:
                left = until()
                if left <= 0:
                    raise NoProgress
                self.limit(left)
            with _failures():
                rest = view[at:]
                got = self._receive_tls(rest) if self._tls else self._socket.recv_into(rest, 0, self._waitall)
            if not got:
                raise ConnectionEnded
            at += got
            if after is not None:
                after(got)

    def payload(self, found: Header) -> bytes:
        """Of a control frame. Raises as `receive_into`."""
        data = bytearray(found.length)
        self.receive_into(memoryview(data))
        return bytes(data)

    def is_open(self) -> bool:
        """Whether the peer has not ended it, nor sent anything that was not received yet; at once. Not of TLS."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def send_descriptor(self, kind: Kind, payload: bytes, descriptor: int) -> None:
        """Over a unix socket."""
        with _failures():
            data = header(kind, 0, len(payload)) + payload
            sent = socket.send_fds(self._socket, [data], [descriptor])
            self._socket.sendall(data[sent:])

    def receive_descriptor(self, expected: Kind) -> tuple[bytes, int]:
        """A control frame's payload, and the descriptor that came with it, now the caller's. Raises as `receive`."""
        with _failures():
            data, descriptors, _, _ = socket.recv_fds(self._socket, HEADER_BYTES, 1)
        try:
            if not data:
                raise ConnectionEnded
            head = memoryview(bytearray(HEADER_BYTES))
            head[: len(data)] = data
            self.receive_into(head[len(data) :])
            found = parse_header(head)
            if found.kind is not expected or len(descriptors) != 1:
                raise BadFrame(f"{found.kind.name} with {len(descriptors)} descriptors came out of place")
            return self.payload(found), descriptors.pop()
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _receive_tls(self, view: memoryview) -> int:
        """Waits for a record, and takes those with it that are here already, within bounds: there are thousands, of
        16 KiB each or less, and what else is done for each takes as long as its decryption."""
        receive = self._socket.recv_into
        at, end = receive(view), min(len(view), TLS_READ_BYTES)
        if 0 < at < end:
            end_s = time.monotonic() + TLS_READ_S
            self._socket.settimeout(0)
            try:
                while at < end and time.monotonic() < end_s and (got := receive(view[at:end])):
                    at += got
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                pass
            finally:
                self._socket.settimeout(self._limit_s)
        return at

    def _send_tls(self, data: bytes | memoryview) -> None:
        for first in range(0, len(data), TLS_WRITE_BYTES):
            self._socket.sendall(data[first : first + TLS_WRITE_BYTES])

    def shutdown(self) -> None:
        """From any thread: every call under way or to come ends. Idempotent."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def _behind(views: list[memoryview], moved: int) -> list[memoryview]:
    """What is left of `views` after their first `moved` bytes."""
    whole = 0
    while whole < len(views) and moved >= len(views[whole]):
        moved -= len(views[whole])
        whole += 1
    left = views[whole:]
    if moved:
        left[0] = left[0][moved:]
    return left


class _failures:  # noqa: N801
    """A context manager; a generator would take longer than some of the calls inside."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, BlockingIOError | TimeoutError):
            raise NoProgress from None
        if isinstance(error, OSError):  # of TLS too
            raise ConnectionEnded(str(error)) from None
