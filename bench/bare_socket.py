"""A TCP server that only moves bytes: the least that any transfer over a socket can cost.

Each request is a letter and two numbers: `S` sends so many blocks of so many bytes, `R` receives them and answers one
byte. No checksums, no tiers. Prints one JSON line with its address when it is ready. With the paths of a certificate
and its key as arguments it speaks TLS.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import struct
import sys
import threading

_REQUEST = struct.Struct("<cQQ")


class BareSocket:
    """A client's connection; with a context, over TLS."""

    def __init__(self, address: str, tls: ssl.SSLContext | None = None) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            self._socket = tls.wrap_socket(self._socket, server_hostname=host)

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
    at, whole = 0, _whole(connection)
    while at < len(target):
        got = connection.recv_into(target[at:], 0, whole)
        if not got:
            raise SystemExit("bench: the bare socket ended")
        at += got


def _serve(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    block, whole = memoryview(bytearray()), _whole(connection)
    while request := connection.recv(_REQUEST.size, whole):
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


def _whole(connection: socket.socket) -> int:
    """The flag for all in one call, which TLS has not: it gives a record at a time, and a request is one."""
    return 0 if isinstance(connection, ssl.SSLSocket) else socket.MSG_WAITALL


def _welcome(connection: socket.socket, tls: ssl.SSLContext | None) -> None:
    _serve(connection if tls is None else tls.wrap_socket(connection, server_side=True))


def main() -> None:
    tls = None
    if len(sys.argv) > 1:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(*sys.argv[1:3])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(json.dumps({"addresses": [f"127.0.0.1:{listener.getsockname()[1]}"]}), flush=True)
        while True:
            threading.Thread(target=_welcome, args=(listener.accept()[0], tls), daemon=True).start()


if __name__ == "__main__":
    main()
