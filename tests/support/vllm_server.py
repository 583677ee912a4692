"""vLLM's OpenAI server, its engine in a process of its own as by default, asked over HTTP with token ids."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polling import wait_until
from redis_process import free_ports
from smollm2 import CACHE
from vllm_engine import BLOCK_TOKENS, DTYPE, START_S_MAX

from kvstore.demo import model

ANSWER_S_MAX = 600.0
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Completion:
    """`cached`: tokens of the prompt that were not computed. `first_s`, `all_s`: from the question to the first token,
    and to the last."""

    tokens: list[int]
    cached: int
    first_s: float
    all_s: float


class Server:
    """SmolLM2 on the CPU. `start` returns at once, `wait_ready` when it serves; runs until `kill()`."""

    def __init__(self, log: Path, transfer: dict[str, Any] | None, dtype: str = DTYPE) -> None:
        (port,) = free_ports(1)
        self.url, self._log = f"http://127.0.0.1:{port}", log
        given = () if transfer is None else ("--kv-transfer-config", json.dumps(transfer))
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port),
                    "--model", str(model.model_folder(CACHE)), "--served-model-name", "smollm2", "--dtype", dtype,
                    "--max-model-len", "4096", "--enforce-eager", "--block-size", str(BLOCK_TOKENS),
                    "--enable-prompt-tokens-details", *given,
                ],
                stdout=file, stderr=file, env={**os.environ, **ENVIRONMENT}, start_new_session=True,
            )  # fmt: skip

    def wait_ready(self) -> None:
        try:
            wait_until(self._is_ready, f"{self.url} serves", deadline_s=START_S_MAX)
        except AssertionError:
            self.kill()
            raise AssertionError(f"the server did not start; its log:\n{self._log.read_text()[-4000:]}") from None

    def complete(self, prompt: Sequence[int], max_tokens: int) -> Completion:
        return complete(self.url, prompt, max_tokens)

    def kill(self) -> None:
        """With its engine's process."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(ANSWER_S_MAX)

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, f"the server has ended; its log:\n{self._log.read_text()[-4000:]}"
        return is_healthy(self.url)


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def complete(url: str, prompt: Sequence[int], max_tokens: int) -> Completion:
    """Greedily, streamed. Raises urllib.error.HTTPError with the server's answer."""
    asked = {
        "model": "smollm2", "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    tokens: list[int] = []
    first_s, cached = 0.0, 0
    began_s = time.monotonic()
    with urllib.request.urlopen(request, timeout=ANSWER_S_MAX) as answer:
        for line in answer:
            event = line.decode().removeprefix("data: ").strip()
            if not event or event == "[DONE]":
                continue
            said = json.loads(event)
            if "error" in said:
                raise urllib.error.HTTPError(url, 500, event, answer.headers, None)
            for choice in said["choices"]:
                tokens += choice["token_ids"] or ()
                first_s = first_s or time.monotonic() - began_s
            if said.get("usage"):
                cached = (said["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Completion(tokens, cached, first_s, time.monotonic() - began_s)
