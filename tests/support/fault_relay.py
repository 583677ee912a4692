"""A relay in front of every address of a node, gRPC's, TCP and unix socket, on which one fault at a time can be had.

What a fault finds open stays as it leaves it: bytes that were held up arrive when it is over, a connection that got
garbage is not closed by the relay, one that was reset is gone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

HOST = "127.0.0.1"
FAULTS = ("refuse", "blackhole", "reset", "garbage", "flip", "dribble")
_PIECE_BYTES = 1 << 16
_BUFFER_BYTES = 1 << 16  # of the sockets: what is written soon finds nobody who reads
_DRIBBLE_S = 0.01  # a byte
_GARBAGE_BYTES = 1 << 10  # that nobody asked for
_FLIP_BYTES = 1 << 12  # pieces from this size on lose a bit: objects, not what is said of them
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class FaultRelay:
    """Listens at `addresses`: of gRPC, of the bulk path over TCP and over a unix socket in `folder`. `point` says
    where what comes there goes. `pause_s`: after each piece of 64 KiB at most, either way."""

    def __init__(self, folder: Path, pause_s: float = 0.0) -> None:
        self.pause_s = pause_s
        self._changed = threading.Condition()
        self._fault: str | None = None
        self._closed = False
        self._links: set[_Link] = set()
        self._targets: Sequence[str] = ()
        self._listeners: list[socket.socket | None] = [None, None, None]
        self.addresses = [f"{HOST}:0", f"{HOST}:0", f"unix:{folder / 'relay.sock'}"]
        for number in range(len(self.addresses)):
            self._listen(number)

    def point(self, targets: Sequence[str]) -> None:
        """The node's addresses in the order of `addresses`; for connections from now on."""
        self._targets = targets

    def inject(self, fault: str) -> None:
        """One of FAULTS."""
        with self._changed:
            self._fault = fault
            links = list(self._links)
            self._changed.notify_all()
        if fault == "refuse":
            for number in range(len(self._listeners)):
                self._unlisten(number)
        if fault in ("refuse", "reset"):
            for link in links:
                link.reset()
        elif fault == "garbage":
            for link in links:
                link.babble()

    def heal(self) -> None:
        refused = self._fault == "refuse"
        with self._changed:
            self._fault = None
            self._changed.notify_all()
        if refused:
            for number in range(len(self._listeners)):
                self._listen(number)

    def strand(self) -> None:
        """From now on what is sent on the connections that are open is lost, without a word, as where a machine between
        has forgotten them; new ones are fine."""
        with self._changed:
            for link in self._links:
                link.is_stranded = True

    def close(self) -> None:
        with self._changed:
            self._closed, self._fault = True, None
            links = list(self._links)
            self._changed.notify_all()
        for number in range(len(self._listeners)):
            self._unlisten(number)
        for link in links:
            link.reset()

    @property
    def fault(self) -> str | None:
        return self._fault

    def wait_to_pass(self) -> None:
        """While nothing does."""
        with self._changed:
            self._changed.wait_for(lambda: self._fault != "blackhole")

    def wait_for_change(self, seconds: float) -> None:
        if not seconds:
            return
        with self._changed:
            before = self._fault
            self._changed.wait_for(lambda: self._fault != before, seconds)

    def forget(self, link: _Link) -> None:
        with self._changed:
            self._links.discard(link)

    def _listen(self, number: int) -> None:
        address = self.addresses[number]
        if address.startswith("unix:"):
            path = Path(address.removeprefix("unix:"))
            path.unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(os.fspath(path))
        else:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((HOST, int(address.rpartition(":")[2])))
            self.addresses[number] = f"{HOST}:{listener.getsockname()[1]}"
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        listener.listen(128)
        self._listeners[number] = listener
        threading.Thread(target=self._accept, args=(listener, number), daemon=True).start()

    def _unlisten(self, number: int) -> None:
        listener, self._listeners[number] = self._listeners[number], None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes its thread
            listener.close()

    def _accept(self, listener: socket.socket, number: int) -> None:
        while True:
            self.wait_to_pass()
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.wait_to_pass()  # it may have begun while it waited
            if self._fault in ("refuse", "reset") or self._closed:
                _reset(client)
                continue
            try:
                server = _connected(self._targets[number])
            except OSError:  # the node is away: so its client sees it go
                _reset(client)
                continue
            link = _Link(self, client, server)
            with self._changed:
                self._links.add(link)
            link.start()
            if self._fault == "garbage":
                link.babble()


class _Link:
    """One connection through the relay."""

    def __init__(self, relay: FaultRelay, client: socket.socket, server: socket.socket) -> None:
        self._relay, self._client, self._server = relay, client, server
        self._lock = threading.Lock()
        self._open_ends = 2
        self._is_reset = False
        self.is_stranded = False

    def start(self) -> None:
        for pump in (self._ask, self._answer):
            threading.Thread(target=self._run, args=(pump,), daemon=True).start()

    def reset(self) -> None:
        """Both ends hear of it at once; what was on its way is lost."""
        self._is_reset = True
        for each in (self._client, self._server):
            with contextlib.suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._end(socket.SHUT_RD)  # its pumps wake up and close it; SHUT_RDWR would say goodbye first

    def babble(self) -> None:
        with contextlib.suppress(OSError):
            self._client.send(os.urandom(_GARBAGE_BYTES), socket.MSG_DONTWAIT)

    def _run(self, pump: Callable[[], None]) -> None:
        with contextlib.suppress(OSError):
            pump()
        self._end(socket.SHUT_RD if self._is_reset else socket.SHUT_RDWR)
        with self._lock:
            self._open_ends -= 1
            last = not self._open_ends
        if last:
            self._client.close()
            self._server.close()
            self._relay.forget(self)

    def _end(self, how: int) -> None:
        for each in (self._client, self._server):
            with contextlib.suppress(OSError):
                each.shutdown(how)

    def _ask(self) -> None:
        while True:
            data, descriptors = _received(self._client)
            if not data:
                return
            self._relay.wait_to_pass()
            if self.is_stranded:
                continue
            _send(self._server, self._flipped(data), descriptors)
            self._relay.wait_for_change(self._relay.pause_s)

    def _answer(self) -> None:
        while True:
            data, descriptors = _received(self._server)
            if not data:
                return
            self._relay.wait_to_pass()
            if self._relay.fault == "garbage":
                for each in descriptors:
                    os.close(each)
                data, descriptors = os.urandom(len(data)), []
            while data and self._relay.fault == "dribble":
                _send(self._client, data[:1], descriptors)
                data, descriptors = data[1:], []
                self._relay.wait_for_change(_DRIBBLE_S)
            self._relay.wait_to_pass()
            if data:
                _send(self._client, self._flipped(data), descriptors)
            self._relay.wait_for_change(self._relay.pause_s)

    def _flipped(self, data: bytes) -> bytes:
        if self._relay.fault != "flip" or len(data) < _FLIP_BYTES:
            return data
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _received(source: socket.socket) -> tuple[bytes, list[int]]:
    data, descriptors, _, _ = socket.recv_fds(source, _PIECE_BYTES, 4)
    return data, descriptors


def _send(sink: socket.socket, data: bytes, descriptors: list[int]) -> None:
    """Closes `descriptors`."""
    try:
        if descriptors:
            sent = socket.send_fds(sink, [data], descriptors)
            data = data[sent:]
        sink.sendall(data)
    finally:
        for each in descriptors:
            os.close(each)


def _connected(address: str) -> socket.socket:
    if address.startswith("unix:"):
        connected = socket.socket(socket.AF_UNIX)
        try:
            connected.connect(address.removeprefix("unix:"))
        except OSError:
            connected.close()
            raise
        return connected
    return socket.create_connection((HOST, int(address.rpartition(":")[2])))


def _reset(accepted: socket.socket) -> None:
    with contextlib.suppress(OSError):
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    accepted.close()
