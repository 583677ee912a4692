"""redis-server beside `bench.transfer`'s other routes: SET and GET of the same objects, all in one pipeline.

redis-py parses with hiredis where that is installed. Where there is no redis-server or no redis-py, nothing is measured
and one line says so.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bench.routes import DEADLINE_S, Objects, Route

if TYPE_CHECKING:
    import redis

STARTS_S, STARTS_MAX = 0.05, 400  # it is asked so often, and so many times, whether it is there


@contextmanager
def redis_server() -> Iterator[redis.Redis | None]:
    """A client of a server in a process of its own that saves nothing, None where that cannot be. Raises
    redis.ConnectionError where it does not start."""
    binary = shutil.which("redis-server")
    try:
        import redis
        from redis.backoff import ConstantBackoff
        from redis.retry import Retry
    except ModuleNotFoundError:
        binary = None
    if binary is None:
        print("bench: no Redis beside it: redis-server or redis-py is not installed", file=sys.stderr)
        yield None
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            patience = Retry(ConstantBackoff(STARTS_S), STARTS_MAX)
            with redis.Redis(host="127.0.0.1", port=port, socket_timeout=DEADLINE_S, retry=patience) as client:
                client.ping()
                yield client
        finally:
            process.terminate()


def redis_route(client: redis.Redis, objects: Objects) -> Route:
    keys = [ref.hash for ref in objects.refs]

    def put() -> None:
        with client.pipeline(transaction=False) as pipeline:
            for key, blob in zip(keys, objects.blobs, strict=True):
                pipeline.set(key, blob)
            assert all(pipeline.execute())

    def fetch() -> list[bytes]:
        with client.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.get(key)
            came: list[bytes] = pipeline.execute()
            return came

    def clear() -> None:
        client.flushall()

    return Route("Redis", put, fetch, objects.are, clear=clear)
