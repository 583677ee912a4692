"""The Prometheus endpoint of a node: its own registry over HTTP, on its own thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server

from kvstore.errors import ListenError


@contextmanager
def metrics_endpoint(listen: str | None, registry: CollectorRegistry) -> Iterator[str | None]:
    """Serves `registry` on `listen` (host:port; None: nowhere) while inside; yields its URL.

    Raises ListenError when the address cannot be had.
    """
    if listen is None:
        yield None
        return
    host, _, port = listen.rpartition(":")
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), registry)
    except OSError as error:
        raise ListenError(
            f"cannot serve metrics on {listen}: {error.strerror}, pass another --metrics-listen"
        ) from None
    try:
        yield f"http://{host}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
