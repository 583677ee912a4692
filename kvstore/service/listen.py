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
from kvstore.service.tls import ServerTls

#: Without it Linux lets two nodes share a port and splits their connections at random.
EXCLUSIVE_PORT = ("grpc.so_reuseport", 0)
OTHER_ADDRESS = "pass a --listen address of this machine"


def bind(server: grpc.aio.Server, addresses: Iterable[str], tls: ServerTls | None) -> tuple[str, ...]:
    """Binds all `addresses` (`host:port`, `unix:/path`); returns them with the ports really taken.

    `tls`: of the TCP ones; unix sockets stay plain. Raises ListenError. A unix socket left behind by a dead node is
    replaced, one that answers is not.
    """
    return tuple(
        _bind_unix(server, address) if address.startswith("unix:") else _bind_tcp(server, address, tls)
        for address in addresses
    )


def unlink_sockets(addresses: Iterable[str]) -> None:
    for address in addresses:
        if address.startswith("unix:"):
            Path(address.removeprefix("unix:")).unlink(missing_ok=True)


def _bind_tcp(server: grpc.aio.Server, address: str, tls: ServerTls | None) -> str:
    host, _, port = address.rpartition(":")
    _probe_tcp(address, host.strip("[]"), int(port))
    return f"{host}:{_add(server, address, 'the server could not bind it', tls)}"


def _probe_tcp(address: str, host: str, port: int) -> None:
    """Asks the system first: it says why an address cannot be had, gRPC only that it failed (and at length)."""
    problems: list[str] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ListenError(f"cannot listen on {address}: {error.strerror}, {OTHER_ADDRESS}") from None
    for family, kind, _, _, target in found:
        try:
            with closing(socket.socket(family, kind)) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(target)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ListenError(
                    f"cannot listen on {address}: the port is in use, stop the other process or pass another "
                    "--listen (port 0 takes a free one)"
                ) from None
            problems.append(str(error.strerror))
    if len(problems) == len(found):
        raise ListenError(f"cannot listen on {address}: {problems[0]}, {OTHER_ADDRESS}")


def _bind_unix(server: grpc.aio.Server, address: str) -> str:
    path = Path(address.removeprefix("unix:"))
    if not path.parent.is_dir():
        raise ListenError(f"cannot listen on {address}: create {path.parent} or pass another --listen")
    clear_stale(path)
    _add(server, address, f"{path.parent} must be writable")
    return address


def _add(server: grpc.aio.Server, address: str, otherwise: str, tls: ServerTls | None = None) -> int:
    try:
        bound = server.add_secure_port(address, tls.credentials()) if tls else server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if not bound:
        raise ListenError(f"cannot listen on {address}: {otherwise}, pass another --listen")
    return bound


def clear_stale(path: Path) -> None:
    """Removes a socket that a dead node left behind. Raises ListenError for anything else that is there."""
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
