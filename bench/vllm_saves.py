"""How long after a prefill the node lacks some of its KV: what saving layer by layer could win at most.

A real vLLM engine (SmolLM2, CPU, one thread) for each size of a step, in turns, which computes prompts that nobody has
and answers with one token, as an engine that prefills for another does. KV is saved at the end of each step, so only
what the last step computed is still to be coded and sent when the answer is there.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from node_process import NodeProcess
from polling import wait_until
from vllm_engine import BLOCK_TOKENS, EngineProcess, kv_transfer

from bench.vllm_ttft import prompts_of, turned
from kvstore_client import Client


class Prefiller:
    """An engine whose steps have at most `step_tokens` tokens, a node of its own, and what was measured: (seconds until
    the answer, seconds from there until all was stored) of each prompt."""

    def __init__(self, folder: Path, step_tokens: int) -> None:
        self.step_tokens, self.measured = step_tokens, list[tuple[float, float]]()
        self._node = NodeProcess(folder)
        self._client = Client(self._node.address, transport="grpc")
        self._engine = EngineProcess(
            folder / "engine.log", kv_transfer(self._node.address), max_num_batched_tokens=step_tokens
        )

    def ask(self, prompt: Sequence[int]) -> None:
        objects = self._client.stat().objects + len(prompt) // BLOCK_TOKENS
        answer = self._engine.generate([prompt], 1)
        answered_s = time.perf_counter()
        wait_until(lambda: self._client.stat().objects == objects, "all is stored", deadline_s=60)
        self.measured.append((answer["first_token_s"][0], time.perf_counter() - answered_s))

    def close(self) -> None:
        self._engine.kill()
        self._client.close()
        self._node.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[4096, 534], help="tokens of a step, at most")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=1600)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as ending:
        prefillers = []
        for step_tokens in given.steps:
            (folder := Path(name) / str(step_tokens)).mkdir()
            prefillers.append(Prefiller(folder, step_tokens))
            ending.callback(prefillers[-1].close)
        for number, prompt in enumerate(prompts_of(given.rounds + 1, given.tokens)):  # the first is to warm up
            for prefiller in turned(prefillers, number):
                prefiller.ask(prompt)
    print(f"{given.tokens} tokens, {given.rounds} prompts\n")
    print("| tokens of a step | answer after s (median) | all stored after another s | least | most |")
    print("|---|---|---|---|---|")
    for prefiller in prefillers:
        answered, stored = zip(*prefiller.measured[1:], strict=True)
        print(f"| {prefiller.step_tokens} | {statistics.median(answered):.3f} | {statistics.median(stored):.3f} "
              f"| {min(stored):.3f} | {max(stored):.3f} |")  # fmt: skip


if __name__ == "__main__":
    main()
