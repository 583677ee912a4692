"""A TCP relay with the rate and latency of a link: `ShapedRelay` in this process, or a process of its own.

python tests/support/shaped_relay.py TARGET_PORT --mbit 200 --latency-ms 5     # prints its port
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import socket
import threading
import time

HOST = "127.0.0.1"
_PIECE_BYTES = 1 << 14
#: Of the sockets: what a real link's queue might hold. Left to themselves they hold seconds of a slow link.
_BUFFER_BYTES = 1 << 16
#: How far the link's entry is ahead of its exit: waits shorter than that are not worth a thread's switch.
_AHEAD_S = 0.005


class ShapedRelay:
    """What a server at `port` answers comes at `bytes_per_s` and `latency_s` later; requests come at once.

    `address`: where to connect to. `set_rate` changes the rate of all connections, 0 stalls them; `set_latency` what
    comes from then on. One link: connections share it."""

    def __init__(self, port: int, bytes_per_s: float, latency_s: float = 0.0) -> None:
        self._target, self._rate, self._latency_s = port, bytes_per_s, latency_s
        self._free_at = 0.0  # when the last piece has left
        self._link = threading.Lock()
        self._closed = threading.Event()
        self._listener = socket.create_server((HOST, 0))
        self._sockets = [self._listener]
        self.address = f"{HOST}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def set_rate(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s

    def set_latency(self, latency_s: float) -> None:
        self._latency_s = latency_s

    def close(self) -> None:
        self._closed.set()
        for each in self._sockets:
            with contextlib.suppress(OSError):  # its other end may have closed it
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
                server = socket.socket()
                server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
                server.connect((HOST, self._target))
            except OSError:
                return
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            for each in (client, server):  # or a request in two pieces waits for an acknowledgement, 40 ms
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [client, server]
            coming: queue.Queue[tuple[float, bytes] | None] = queue.Queue()
            for target, arguments in (
                (self._ask, (client, server)), (self._take, (server, coming)), (self._deliver, (client, coming)),
            ):  # fmt: skip
                threading.Thread(target=target, args=arguments, daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(_PIECE_BYTES):
                server.sendall(data)
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)

    def _take(self, server: socket.socket, coming: queue.Queue[tuple[float, bytes] | None]) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(_PIECE_BYTES):
                left_at = self._send(len(data))
                self._closed.wait(max(0.0, left_at - time.monotonic() - _AHEAD_S))
                coming.put((left_at + self._latency_s, data))
        coming.put(None)

    def _send(self, size_bytes: int) -> float:
        """When a piece has left, on the one link."""
        while not self._rate and not self._closed.wait(0.01):
            pass
        with self._link:
            self._free_at = max(self._free_at, time.monotonic()) + size_bytes / max(self._rate, 1.0)
            return self._free_at

    def _deliver(self, client: socket.socket, coming: queue.Queue[tuple[float, bytes] | None]) -> None:
        with contextlib.suppress(OSError):
            while (piece := coming.get()) is not None:
                at, data = piece
                self._closed.wait(max(0.0, at - time.monotonic()))
                client.sendall(data)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("--mbit", type=float, required=True)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    options = parser.parse_args()
    relay = ShapedRelay(options.port, options.mbit * 1e6 / 8, options.latency_ms / 1e3)
    print(relay.address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
