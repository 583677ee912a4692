"""The bulk path of a node that lies: a real socket that lets everybody in and answers requests as a test says."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from kvstore_proto.v1 import transfer_pb2
from kvstore_proto.v1.bulk import HEADER_BYTES, HELLO_BYTES, TICKET_BYTES, VERSION, Kind, frame, parse_header

if TYPE_CHECKING:
    from typing_extensions import Self

#: Told the socket and a request's kind and payload; when it returns, the connection ends.
Script = Callable[[socket.socket, Kind, bytes], None]


class BulkLiar:
    """Listens until its `with` ends. `connect` is what its gRPC side answers. `memory`: what it shares, over a unix
    socket then. `first`: answers a connection's first request, after which it stays open for one more."""

    def __init__(self, script: Script, memory: bytes | None = None, first: Script | None = None) -> None:
        self._script, self._memory, self._first = script, memory, first
        if memory is None:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self._address = f":{self._listener.getsockname()[1]}"
        else:
            name = f"kvstore-liar-{secrets.token_hex(8)}"
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(f"\0{name}")
            self._listener.listen()
            self._address = f"unix-abstract:{name}"
        self._sockets = [self._listener]
        self.requests: list[Kind] = []

    def connect(self, request: transfer_pb2.ConnectRequest, context: object) -> transfer_pb2.ConnectResponse:
        return transfer_pb2.ConnectResponse(
            version=VERSION, ticket=bytes(TICKET_BYTES), ticket_ms=1000, addresses=[self._address]
        )

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = self._listener.accept()
                self._sockets.append(accepted)
                threading.Thread(target=self._serve, args=(accepted,), daemon=True).start()

    def _serve(self, accepted: socket.socket) -> None:
        with contextlib.suppress(OSError), accepted:
            accepted.recv(HELLO_BYTES, socket.MSG_WAITALL)
            accepted.sendall(frame(Kind.WELCOME))
            if self._memory is not None:
                accepted.recv(HEADER_BYTES, socket.MSG_WAITALL)
                self._share(accepted, self._memory)
            for script in (self._first, self._script):
                if script is not None and not self._answer(accepted, script):
                    return

    def _answer(self, accepted: socket.socket, script: Script) -> bool:
        head = accepted.recv(HEADER_BYTES, socket.MSG_WAITALL)
        if not head:
            return False
        found = parse_header(head)
        payload = accepted.recv(found.length, socket.MSG_WAITALL) if found.length else b""
        self.requests.append(found.kind)
        script(accepted, found.kind, payload)
        return True

    def _share(self, accepted: socket.socket, memory: bytes) -> None:
        shared = transfer_pb2.SharedMemory(bytes=len(memory)).SerializeToString()
        descriptor = os.memfd_create("liar")
        try:
            os.write(descriptor, memory)
            socket.send_fds(accepted, [frame(Kind.MAPPED, 0, shared)], [descriptor])
        finally:
            os.close(descriptor)
