"""The processes that a demo starts: a node that may be killed, and workers that answer questions."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

START_S_MAX = 60.0
ANSWER_S_MAX = 900.0
STOP_S_MAX = 20.0
LOG_LINES_SHOWN = 15


class DemoFailed(Exception):
    """The demo could not run; `str()` is the reason, possibly with the end of a process's log."""


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port: int = probe.getsockname()[1]
    return port


class Process:
    """`python -m ARGUMENTS`, its stdout read here, its stderr in `log_path`; killed at the end of its `with`."""

    def __init__(self, name: str, arguments: Sequence[str], log_path: Path, *, asked: bool = False) -> None:
        self._name, self._log_path = name, log_path
        environment = {key: value for key, value in os.environ.items() if not key.startswith("KVSTORE_")}
        # Two workers compute at once: a thread of torch's that waits for another must leave it the core.
        environment.setdefault("OMP_WAIT_POLICY", "passive")
        with log_path.open("ab") as log:
            # Without buffers: `line` waits for the pipe, and a line in a buffer would not be seen there.
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments], bufsize=0,
                stdin=subprocess.PIPE if asked else subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                env=environment,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    def line(self, timeout_s: float) -> dict[str, Any]:
        """The next JSON line that it prints. Raises DemoFailed when it ends or is silent for `timeout_s`."""
        output = self._pipe(self._process.stdout)
        readable, _, _ = select.select([output], [], [], timeout_s)
        text = output.readline() if readable else b""
        if not text:
            what = "ended" if readable else f"said nothing for {timeout_s:g} s"
            raise DemoFailed(f"the {self._name} process {what}; the end of its log:\n{self._log_end()}")
        parsed: dict[str, Any] = json.loads(text)
        return parsed

    def ask(self, question: str, on_progress: Callable[[str], None]) -> dict[str, Any]:
        """A worker's answer to one question (worker.py)."""
        questions = self._pipe(self._process.stdin)
        try:
            questions.write(f"{question}\n".encode())
            questions.flush()
        except BrokenPipeError:
            raise DemoFailed(f"the {self._name} process ended; the end of its log:\n{self._log_end()}") from None
        while True:
            message = self.line(ANSWER_S_MAX)
            if "result" in message:
                result: dict[str, Any] = message["result"]
                return result
            on_progress(message["progress"])

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._process.kill()
        self._process.wait(STOP_S_MAX)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None, "started with this pipe"
        return pipe

    def _log_end(self) -> str:
        return "\n".join(self._log_path.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])


def start_node(port: int, folder: Path) -> tuple[Process, dict[str, Any]]:
    """A node with a disk tier in `folder`, and its ready line."""
    return _start(
        "node",
        ["serve", "--listen", f"127.0.0.1:{port}", "--disk-path", str(folder / "disk"), "--node-id", "demo",
         "--host-capacity", "1GiB", "--disk-capacity", "4GiB"],
        folder,
    )  # fmt: skip


def start_sidecar(port: int, folder: Path) -> tuple[Process, dict[str, Any]]:
    """A sidecar of the decode worker in RAM, whose upstream is the node, and its ready line."""
    return _start(
        "sidecar",
        ["sidecar", "--listen", f"unix:{folder / 'sidecar.sock'}", "--upstream", f"127.0.0.1:{port}",
         "--node-id", "demo-sidecar", "--host-capacity", "1GiB", "--upstream-timeout-ms", "1000"],
        folder,
    )  # fmt: skip


def _start(name: str, command: Sequence[str], folder: Path) -> tuple[Process, dict[str, Any]]:
    process = Process(name, ["kvstore", *command], folder / f"{name}.log")
    try:
        return process, process.line(START_S_MAX)
    except DemoFailed:
        process.kill()
        raise


def start_worker(name: str, targets: Sequence[str], cache: Path, folder: Path) -> Process:
    """`kvstore.demo.NAME`, which loads the model meanwhile."""
    return Process(
        name,
        [f"kvstore.demo.{name}", *(word for target in targets for word in ("--target", target)), "--cache", str(cache)],
        folder / f"{name}.log",
        asked=True,
    )
