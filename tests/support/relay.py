"""A TCP relay that delivers what a server answers as slowly as a test wants."""

from __future__ import annotations

import contextlib
import socket
import threading

HOST = "127.0.0.1"
_PIECE_BYTES = 1 << 16


class Relay:
    """Passes everything on at once until `slow_down`. `close()` ends every connection."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._piece_bytes, self._pause_s = _PIECE_BYTES, 0.0
        self._listener = socket.create_server((HOST, 0))
        self._sockets: list[socket.socket] = [self._listener]
        self._closed, self._passing = threading.Event(), threading.Event()
        self._passing.set()
        self.address = f"{HOST}:{self._listener.getsockname()[1]}"
        self.url = f"redis://{self.address}"
        threading.Thread(target=self._accept, daemon=True).start()

    def slow_down(self, piece_bytes: int, pause_s: float) -> None:
        """From now on answers come in pieces of so many bytes, with so many seconds before each."""
        self._piece_bytes, self._pause_s = piece_bytes, pause_s

    def speed_up(self) -> None:
        self.slow_down(_PIECE_BYTES, 0.0)

    def swallow(self) -> None:
        """From now on nothing arrives on either side, though connections are accepted and stay."""
        self._passing.clear()

    def let_pass(self) -> None:
        """What was held up arrives, and what follows."""
        self._passing.set()

    def close(self) -> None:
        self._closed.set()
        self._passing.set()
        for each in self._sockets:
            with contextlib.suppress(OSError):  # its other end may have closed it
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection((HOST, self._target))
            except OSError:  # the server is away: so its client sees it go
                client.close()
                continue
            self._sockets += [client, server]
            threading.Thread(target=self._ask, args=(client, server), daemon=True).start()
            threading.Thread(target=self._answer, args=(server, client), daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError), client, server:
            while data := client.recv(_PIECE_BYTES):
                self._passing.wait()
                server.sendall(data)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, server:
            while data := server.recv(_PIECE_BYTES):
                while data:
                    self._passing.wait()
                    self._closed.wait(self._pause_s)
                    piece_bytes = self._piece_bytes  # which may change while it sends
                    client.sendall(data[:piece_bytes])
                    data = data[piece_bytes:]
