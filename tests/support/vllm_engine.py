"""A vLLM engine with kvstore's connector, as a process that tests and benchmarks talk to."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polling import wait_until
from smollm2 import CACHE

from kvstore.demo import model

PROGRAM = Path(__file__).resolve().parents[1] / "integration" / "vllm" / "engine_process.py"
START_S_MAX = 600.0
ANSWER_S_MAX = 600.0  # computing a prompt takes seconds, on a busy machine minutes
BLOCK_TOKENS = 128
#: Without AVX-512, vLLM finds no oneDNN kernel for bfloat16 and computes it much slower than float32.
DTYPE = "bfloat16" if " avx512f " in Path("/proc/cpuinfo").read_text() else "float32"


def kv_transfer(address: str, *, role: str = "kv_both", policy: str = "recompute", **extra: Any) -> dict[str, Any]:
    """What `--kv-transfer-config` takes."""
    return {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "kvstore_client.integrations.vllm",
        "kv_role": role,
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {"address": address, "chunk_tokens": BLOCK_TOKENS, **extra},
    }


class EngineProcess:
    """SmolLM2 on the CPU. Runs until `stop()` or `kill()`. `transfer`: None for an engine of its own. `environment`: of
    its process, beside this one's."""

    def __init__(
        self, log: Path, transfer: dict[str, Any] | None, *, environment: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> None:  # fmt: skip
        self.log_path = log
        settings = {
            "model": str(model.model_folder(CACHE)), "max_model_len": 4096, "enforce_eager": True,
            "block_size": BLOCK_TOKENS, "dtype": DTYPE, "disable_log_stats": True, "seed": 0, **arguments,
        }  # fmt: skip
        if transfer is not None:
            settings["kv_transfer_config"] = transfer
        variables = {
            **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }  # fmt: skip
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, PROGRAM, json.dumps(settings)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, env=variables, text=True,
                start_new_session=True,
            )  # fmt: skip
        self._answer(START_S_MAX)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, salts: Sequence[str | None] | None = None, *,
        adapter: tuple[str, str] | None = None, gaps: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """See engine_process.generate. `adapter`: name and folder of a LoRA adapter."""
        self.send(prompts, max_tokens, salts, adapter=adapter, gaps=gaps)
        return self.answer()

    def send(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, salts: Sequence[str | None] | None = None, *,
        adapter: tuple[str, str] | None = None, gaps: bool = False,
    ) -> None:  # fmt: skip
        """Asks without waiting: `answer()` has it. `salts`: of each prompt."""
        self._ask({
            "prompts": [list(prompt) for prompt in prompts], "max_tokens": max_tokens,
            "salts": list(salts) if salts else [None] * len(prompts), "adapter": adapter, "gaps": gaps,
        })  # fmt: skip

    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = self._answer(ANSWER_S_MAX)
        return answer

    def counters(self) -> dict[str, float]:
        self._ask({"counters": True})
        answer: dict[str, float] = self._answer(ANSWER_S_MAX)
        return answer

    def held(self) -> dict[str, int]:
        """See engine_process.held."""
        self._ask({"held": True})
        answer: dict[str, int] = self._answer(ANSWER_S_MAX)
        return answer

    def hooks(self) -> dict[str, dict[str, float]]:
        """See bench.vllm_hooks.HookTimes.table."""
        self._ask({"hooks": True})
        answer: dict[str, dict[str, float]] = self._answer(ANSWER_S_MAX)
        return answer

    def reset(self) -> bool:
        """Forgets the engine's own prefix cache. False: some of it is in use."""
        self._ask({"reset": True})
        return bool(self._answer(ANSWER_S_MAX)["reset"])

    def wait_saved(self, tokens: int) -> None:
        """Until it has saved so many tokens."""
        wait_until(
            lambda: self.counters().get("kvstore_vllm_tokens_total{save}", 0) >= tokens, f"{tokens} tokens saved",
            deadline_s=60.0,
        )  # fmt: skip

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def stop(self) -> int:
        """Its exit code, when it has shut down by itself."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        code = self.process.wait(ANSWER_S_MAX)
        self.kill()
        return code

    def kill(self) -> None:
        """With the processes that it has started, if there are any. Does nothing to one that has stopped."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(ANSWER_S_MAX)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what it was not told any more
                    pipe.close()

    def _ask(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)

    def _answer(self, seconds: float) -> Any:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if readable else ""
        if not line:
            self.kill()
            raise AssertionError(f"the engine did not answer; the end of its log:\n{self.log()[-4000:]}")
        return json.loads(line)
