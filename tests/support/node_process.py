"""A real `kvstore serve` process for tests: started on a free port, waited for, stopped or killed."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from kvstore_proto.v1.admin_pb2_grpc import AdminStub
from kvstore_proto.v1.framing import CHANNEL_OPTIONS, FramedStoreStub

KVSTORE = Path(sys.executable).with_name("kvstore")
START_S_MAX = 30.0
STOP_S_MAX = 30.0


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's environment without anything that configures a node, plus `variables`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORE_")}
    return {**kept, **variables}


class NodeProcess:
    """Runs until `stop()` or `kill()`; `ready` is its ready line, `address` where it listens first."""

    def __init__(
        self, folder: Path, *flags: str, listen: str = "127.0.0.1:0", command: Sequence[str | Path] = (KVSTORE,),
        role: str = "serve",
    ) -> None:  # fmt: skip
        self.log_path = folder / f"node-{time.monotonic_ns()}.log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, role, "--listen", listen, *flags],
                stdout=subprocess.PIPE, stderr=log, env=clean_environment(),
            )  # fmt: skip
        self._channel: grpc.Channel | None = None
        try:
            self.ready: dict[str, Any] = json.loads(self._first_line())
        except BaseException:
            self.kill()
            raise
        self.address: str = self.ready["addresses"][0]

    @property
    def channel(self) -> grpc.Channel:
        if self._channel is None:
            self._channel = grpc.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        return self._channel

    @property
    def store(self) -> FramedStoreStub:
        return FramedStoreStub(self.channel)

    @property
    def admin(self) -> AdminStub:
        return AdminStub(self.channel)  # type: ignore[no-untyped-call]

    def metrics(self) -> str:
        """What its Prometheus endpoint says; the node must have been started with --metrics-listen."""
        with urllib.request.urlopen(self.ready["metrics"], timeout=10) as response:
            text: str = response.read().decode()
        return text

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait(self) -> int:
        """The exit code of a node that is stopping."""
        code = self.process.wait(STOP_S_MAX)
        self._close()
        return code

    def stop(self) -> int:
        """SIGTERM, then the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        self.process.kill()
        self.process.wait(STOP_S_MAX)
        self._close()

    def _close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _first_line(self) -> bytes:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], START_S_MAX)
        line = self.process.stdout.readline() if readable else b""
        if not line:
            raise AssertionError(f"the node printed no ready line; its log:\n{self.log()}")
        return line
