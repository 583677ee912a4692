"""A server in a process of its own, for as long as a `with` block."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc

from kvstore_proto.v1.framing import CHANNEL_OPTIONS

STOP_S_MAX = 60.0


@contextmanager
def server_process(command: Sequence[str | Path]) -> Iterator[str]:
    """Starts a command that prints a JSON line with its `addresses`, gives the first; SIGTERM in the end.

    Raises SystemExit where the command ends without one (what it said is on stderr).
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORE_")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"bench: {' '.join(map(str, command))} did not start")
            address: str = json.loads(line)["addresses"][0]
            yield address
            process.terminate()
            process.wait(STOP_S_MAX)
        finally:
            if process.poll() is None:
                process.kill()


@contextmanager
def channel_to(address: str) -> Iterator[grpc.Channel]:
    """A channel of its own connection, connected."""
    options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options=options) as channel:
        grpc.channel_ready_future(channel).result(STOP_S_MAX)
        yield channel
