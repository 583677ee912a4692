"""Mooncake Store over TCP beside `bench.transfer`'s other routes, where `mooncake-transfer-engine-non-cuda` is
installed: a master, a process that gives memory, and a client here that gives none, so that every byte travels.

Of its ways the fastest that works: batches, gets into memory that it knows. It compares no checksums. With a master's
address as argument this is the process that gives memory.
"""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from bench.routes import DEADLINE_S, Objects, Route
from bench.server_process import server_process

NAME = "Mooncake"
SEGMENT_BYTES, BUFFER_BYTES = 1 << 30, 256 << 20
STARTS_S = 0.05


@contextmanager
def mooncake_store() -> Iterator[Any]:
    """A client of a Mooncake Store with 1 GiB of memory, None where that is not installed. Raises SystemExit where it
    does not start."""
    master = shutil.which("mooncake_master", path=str(sys.exec_prefix + "/bin"))
    if master is None:
        print("bench: no Mooncake beside it: mooncake-transfer-engine-non-cuda is not installed", file=sys.stderr)
        yield None
        return
    port, metrics_port = _free_ports(2)
    command = [master, "--rpc_port", str(port), "--metrics_port", str(metrics_port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            address = f"127.0.0.1:{port}"
            _wait_for(port)
            with server_process([sys.executable, "-m", "bench.mooncake_rival", address]):
                store = _set_up(address, 0)
                yield store
                store.close()
        finally:
            process.terminate()


def mooncake_route(store: Any, objects: Objects) -> Route:
    keys, sizes = [ref.hash.hex() for ref in objects.refs], [len(blob) for blob in objects.blobs]
    starts = np.cumsum([0, *sizes])
    target = np.zeros(int(starts[-1]), np.uint8)
    if store.register_buffer(target.ctypes.data, target.nbytes) != 0:
        raise SystemExit("bench: Mooncake does not take the memory")
    pointers = [int(target.ctypes.data + start) for start in starts[:-1]]

    def put() -> None:
        assert store.put_batch(keys, list(objects.blobs)) == 0

    def fetch() -> list[memoryview]:
        got = store.batch_get_into(keys, pointers, sizes)
        assert got == sizes, got
        return [target[first:last].data for first, last in itertools.pairwise(starts)]

    def clear() -> None:
        target[...] = 0
        store.remove_all(True)

    return Route(NAME, put, fetch, objects.are, clear=clear)


def _set_up(master: str, segment_bytes: int) -> Any:
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    if store.setup("127.0.0.1", "P2PHANDSHAKE", segment_bytes, BUFFER_BYTES, "tcp", "", master) != 0:
        raise SystemExit(f"bench: Mooncake cannot be set up with the master at {master}")
    return store


def _wait_for(port: int) -> None:
    until_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), STARTS_S).close()
            return
        except OSError:
            if time.monotonic() > until_s:
                raise SystemExit("bench: mooncake_master did not start") from None
            threading.Event().wait(STARTS_S)


def _free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def main() -> None:
    store = _set_up(sys.argv[1], SEGMENT_BYTES)
    print(json.dumps({"addresses": [sys.argv[1]]}), flush=True)
    signal.sigwait({signal.SIGTERM})
    store.close()


if __name__ == "__main__":
    main()
