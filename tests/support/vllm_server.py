"""vLLM's OpenAI server, its engine in a process of its own as by default, asked over HTTP with token ids."""

from __future__ import annotations

import json
import os
import re
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
    "VLLM_SERVER_DEV_MODE": "1",  # for reset()
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
    """SmolLM2 on the CPU. Starts at once, serves after `wait_ready`, runs until `kill()`. `flags`: more of vLLM's."""

    def __init__(self, log: Path, transfer: dict[str, Any] | None, *flags: str, dtype: str = DTYPE) -> None:
        (port,) = free_ports(1)
        self.url, self._log = f"http://127.0.0.1:{port}", log
        given = () if transfer is None else ("--kv-transfer-config", json.dumps(transfer))
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port),
                    "--model", str(model.model_folder(CACHE)), "--served-model-name", "smollm2", "--dtype", dtype,
                    "--max-model-len", "4096", "--enforce-eager", "--block-size", str(BLOCK_TOKENS),
                    "--enable-prompt-tokens-details", *given, *flags,
                ],
                stdout=file, stderr=file, env={**os.environ, **ENVIRONMENT}, start_new_session=True,
            )  # fmt: skip

    def wait_ready(self) -> None:
        try:
            wait_until(self._is_ready, f"{self.url} serves", deadline_s=START_S_MAX)
        except AssertionError:
            self.kill()
            raise AssertionError(f"the server did not start; its log:\n{self.log()[-4000:]}") from None

    def complete(self, prompt: Sequence[int], max_tokens: int) -> Completion:
        return complete(self.url, prompt, max_tokens)

    def reset(self) -> None:
        """Forgets the engine's own prefix cache."""
        asked = urllib.request.Request(f"{self.url}/reset_prefix_cache", method="POST")
        with urllib.request.urlopen(asked, timeout=ANSWER_S_MAX):
            pass

    def metrics(self) -> dict[str, float]:
        """`name{value,…}` without `model_name` and `engine` → value, of what is kvstore's."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=ANSWER_S_MAX) as response:
            lines = response.read().decode().splitlines()
        found = {}
        for line in lines:
            if line.startswith("vllm:kvstore_"):
                name, labels, value = re.fullmatch(r"([\w:]+)\{(.*)\} (\S+)", line).groups()  # type: ignore[union-attr]
                ours = [v for k, v in re.findall(r'(\w+)="([^"]*)"', labels) if k not in ("model_name", "engine")]
                found[f"{name}{{{','.join(ours)}}}"] = float(value)
        return found

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        """With its engine's process."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(ANSWER_S_MAX)

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, f"the server has ended; its log:\n{self.log()[-4000:]}"
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
