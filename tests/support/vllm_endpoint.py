"""vLLM's own HTTP server with kvstore's connector, its engine in a process beside it, as an operator runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polling import wait_until
from smollm2 import CACHE
from vllm_engine import BLOCK_TOKENS, DTYPE, START_S_MAX

from kvstore.demo import model

REQUEST_S_MAX = 300.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class VllmServer:
    """SmolLM2 on the CPU. Runs until `stop()`."""

    def __init__(self, log: Path, transfer: dict[str, Any], *flags: str) -> None:
        self.log_path, port = log, free_port()
        self.url = f"http://127.0.0.1:{port}"
        environment = {
            **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_SERVER_DEV_MODE": "1",
        }  # fmt: skip
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model.model_folder(CACHE)),
            "--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "4096",
            "--enforce-eager", "--block-size", str(BLOCK_TOKENS), "--dtype", DTYPE,
            "--kv-transfer-config", json.dumps(transfer), *flags,
        ]  # fmt: skip
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env=environment, start_new_session=True
            )  # fmt: skip
        try:
            wait_until(self._is_up, "the server is up", deadline_s=START_S_MAX)
        except BaseException:
            self.stop()
            raise

    def complete(self, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
        """The server's answer, for token ids."""
        asked = {"model": "smollm2", "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0.0}
        answer: dict[str, Any] = json.loads(self._post("/v1/completions", asked))
        return answer

    def reset(self) -> None:
        """Forgets the engine's own prefix cache."""
        self._post("/reset_prefix_cache", {})

    def metrics(self) -> dict[str, float]:
        """`name{value,…}` without `model_name` and `engine` → value, of what is kvstore's."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=REQUEST_S_MAX) as response:
            lines = response.read().decode().splitlines()
        found = {}
        for line in lines:
            if line.startswith("vllm:kvstore_"):
                name, labels, value = re.fullmatch(r"([\w:]+)\{(.*)\} (\S+)", line).groups()  # type: ignore[union-attr]
                ours = [v for k, v in re.findall(r'(\w+)="([^"]*)"', labels) if k not in ("model_name", "engine")]
                found[f"{name}{{{','.join(ours)}}}"] = float(value)
        return found

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def stop(self) -> None:
        """With its engine; does nothing to one that has stopped."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(60)

    def _is_up(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"the server has ended; the end of its log:\n{self.log()[-4000:]}")
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def _post(self, path: str, body: dict[str, Any]) -> bytes:
        asked = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )  # fmt: skip
        with urllib.request.urlopen(asked, timeout=REQUEST_S_MAX) as response:
            answer: bytes = response.read()
        return answer
