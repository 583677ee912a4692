"""Binds a gRPC server to TCP and unix addresses so that every failure is one line naming the fix."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import grpc

from kvstore.errors import ListenError

#: Without it Linux lets two nodes share a port and splits their connections at random.
EXCLUSIVE_PORT = ("grpc.so_reuseport", 0)


def bind(server: grpc.aio.Server, addresses: Iterable[str]) -> tuple[str, ...]:
    """Binds all `addresses` (`host:port`, `unix:/path`); returns them with the ports really taken.

    Raises ListenError. A unix socket left behind by a dead node is replaced, one that answers is not.
    """
    return tuple(
        _bind_unix(server, address) if address.startswith("unix:") else _bind_tcp(server, address)
        for address in addresses
    )


def unlink_sockets(addresses: Iterable[str]) -> None:
    for address in addresses:
        if address.startswith("unix:"):
            Path(address.removeprefix("unix:")).unlink(missing_ok=True)


def _bind_tcp(server: grpc.aio.Server, address: str) -> str:
    host, _, port = address.rpartition(":")
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if not bound:
        raise ListenError(f"cannot listen on {address}: {_why_not(host.strip('[]'), int(port))}")
    return f"{host}:{bound}"


def _why_not(host: str, port: int) -> str:
    """gRPC says only that it failed; the system says why."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with closing(socket.socket(family, kind)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
            probe.listen()
    except socket.gaierror as error:
        return f"{error.strerror}: give an address of this machine"
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return "the port is in use: stop the other process or pass another --listen (port 0 takes a free one)"
        if error.errno == errno.EACCES:
            return "not permitted: ports under 1024 need privileges, pass another --listen"
        return f"{error.strerror}: give an address of this machine"
    return "the server could not bind it: pass another --listen"


def _bind_unix(server: grpc.aio.Server, address: str) -> str:
    path = Path(address.removeprefix("unix:"))
    _clear_stale(path)
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if not bound:
        folder = path.parent
        fix = f"create {folder}" if not folder.is_dir() else "the folder must be writable"
        raise ListenError(f"cannot listen on {address}: {fix}, or pass another --listen")
    return address


def _clear_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise ListenError(f"cannot listen on unix:{path}: a file of another kind is there, pass another path")
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
            probe.connect(os.fspath(path))
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)
        return
    except OSError as error:
        raise ListenError(f"cannot listen on unix:{path}: {error.strerror}, pass another path") from None
    raise ListenError(f"cannot listen on unix:{path}: another process answers there, stop it or pass another path")
