"""A vLLM engine in a process of its own, told what to do by JSON lines on stdin; one line answers each.

Started by `vllm_engine.EngineProcess`. Requests: {"prompts": [[token ids] …], "max_tokens": n, "salt": text or null,
"adapter": [name, folder] or null} → {"tokens": [[…]…], "first_token_s": [seconds…], "cached": [prompt tokens that were
not computed…], "reasons": […]}; {"counters": true} → the connector's counters; {"hooks": true} → see bench.vllm_hooks;
{"reset": true} → forgets the engine's own prefix cache.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # for bench
ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
ADAPTERS: dict[str, int] = {}  # vLLM wants a number for each
os.dup2(2, 1)  # what vLLM prints goes to the log

from prometheus_client import REGISTRY  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402

from bench.vllm_hooks import HookTimes  # noqa: E402
from kvstore_client.integrations.vllm import KVStoreConnector  # noqa: E402


def counters() -> dict[str, float]:
    """`name{label}` → value, of the connector's and the client's counters."""
    return {
        f"{sample.name}{{{','.join(sample.labels.values())}}}": sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith("kvstore_") and sample.name.endswith("_total")
    }


def generate(
    llm: LLM, prompts: list[list[int]], max_tokens: int, salt: str | None, adapter: tuple[str, str] | None
) -> dict[str, Any]:
    """All prompts at once, greedily."""
    parameters = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, output_kind=RequestOutputKind.CUMULATIVE
    )
    engine = llm.llm_engine
    began = time.perf_counter()
    for index, prompt in enumerate(prompts):
        asked: dict[str, Any] = {"prompt_token_ids": prompt}
        if salt is not None:
            asked["cache_salt"] = salt
        lora = None
        if adapter is not None:
            name, folder = adapter
            lora = LoRARequest(name, ADAPTERS.setdefault(folder, len(ADAPTERS) + 1), folder)
        engine.add_request(f"{began}-{index}", asked, parameters, lora_request=lora)
    first_s: dict[int, float] = {}
    done: dict[int, Any] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            index = int(output.request_id.split("-")[1])
            if output.outputs and output.outputs[0].token_ids:
                first_s.setdefault(index, time.perf_counter() - began)
            if output.finished:
                done[index] = output
    everyone = range(len(prompts))
    return {
        "tokens": [list(done[i].outputs[0].token_ids) for i in everyone],
        "first_token_s": [first_s.get(i) for i in everyone],
        "cached": [done[i].num_cached_tokens for i in everyone],
        "reasons": [done[i].outputs[0].finish_reason for i in everyone],
    }


def main() -> None:
    hooks = HookTimes(KVStoreConnector)
    llm = LLM(**json.loads(sys.argv[1]))
    print(json.dumps({"ready": True}), file=ANSWERS)
    for line in sys.stdin:
        asked = json.loads(line)
        if "prompts" in asked:
            answer: Any = generate(llm, asked["prompts"], asked["max_tokens"], asked.get("salt"), asked.get("adapter"))
        elif "reset" in asked:
            answer = {"reset": llm.reset_prefix_cache()}
        elif "hooks" in asked:
            answer = hooks.table()
        else:
            answer = counters()
        print(json.dumps(answer), file=ANSWERS)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
