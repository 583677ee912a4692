"""A TCP server that only moves bytes: the least that any transfer over a socket can cost.

Each request is a letter and two numbers: `S` sends so many blocks of so many bytes, `R` receives them and answers one
byte. No checksums, no tiers. Prints one JSON line with its address when it is ready.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading

_REQUEST = struct.Struct("<cQQ")


class BareSocket:
    """A client's connection."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def receive(self, targets: list[memoryview]) -> None:
        """Fills all, which are of one length."""
        self._socket.sendall(_REQUEST.pack(b"S", len(targets), len(targets[0])))
        for target in targets:
            fill(self._socket, target)

    def send(self, blocks: list[bytes]) -> None:
        """Blocks of one length; returns when all have been received."""
        self._socket.sendall(_REQUEST.pack(b"R", len(blocks), len(blocks[0])))
        for block in blocks:
            self._socket.sendall(block)
        self._socket.recv(1)

    def close(self) -> None:
        self._socket.close()


def fill(connection: socket.socket, target: memoryview) -> None:
    at = 0
    while at < len(target):
        got = connection.recv_into(target[at:], 0, socket.MSG_WAITALL)
        if not got:
            raise SystemExit("bench: the bare socket ended")
        at += got


def _serve(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    block = memoryview(bytearray())
    while request := connection.recv(_REQUEST.size, socket.MSG_WAITALL):
        way, blocks, size = _REQUEST.unpack(request)
        if len(block) != size:
            block = memoryview(bytearray(os.urandom(size)))
        for _ in range(blocks):
            if way == b"S":
                connection.sendall(block)
            else:
                fill(connection, block)
        if way == b"R":
            connection.sendall(b"x")


def main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(json.dumps({"addresses": [f"127.0.0.1:{listener.getsockname()[1]}"]}), flush=True)
        while True:
            threading.Thread(target=_serve, args=(listener.accept()[0],), daemon=True).start()


if __name__ == "__main__":
    main()
