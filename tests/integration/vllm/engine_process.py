"""A vLLM engine in a process of its own, told what to do by JSON lines on stdin; one line answers each.

Started by `vllm_engine.EngineProcess`. Requests:

- {"prompts": [[token ids] …], "max_tokens": n, "salts": [text or null …], "adapter": [name, folder] or
  null, "gaps": whether they are wanted} →
  {"tokens": [[…]…], "first_token_s": [seconds…], "cached": [prompt tokens that were not computed…], "reasons": […],
  "gaps": [[how much likelier each token was than the next one, in nats…]…], "slowest_step_s": seconds, and vllm_waits'
  "lookup_s" and "load_s"};
- {"counters": true} → the connector's counters; {"held": true} → what is in use (`held`); {"hooks": true} → see
  bench.vllm_hooks; {"reset": true} → forgets the engine's own prefix cache.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "support")]
ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
ADAPTERS: dict[str, int] = {}  # vLLM wants a number for each
os.dup2(2, 1)  # what vLLM prints goes to the log

from prometheus_client import REGISTRY  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm_waits import Waits  # noqa: E402

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


def held(llm: LLM, waits: Waits) -> dict[str, int]:
    """What requests take of the engine and of the connector: the same before them and after."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    worker = waits.worker
    return {
        "free_blocks": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        "requests": 0 if worker is None else len(scheduler.connector._scheduler._requests),
        "loads": 0 if worker is None else worker.loading,
        "saves": 0 if worker is None else worker.saving,
        "free_staging_pages": 0 if worker is None else len(worker._staging._free),
    }


def generate(llm: LLM, waits: Waits, asked: dict[str, Any]) -> dict[str, Any]:
    """All prompts at once, greedily."""
    parameters = SamplingParams(
        temperature=0.0, max_tokens=asked["max_tokens"], ignore_eos=True, output_kind=RequestOutputKind.CUMULATIVE,
        logprobs=2 if asked["gaps"] else None,
    )  # fmt: skip
    engine = llm.llm_engine
    began = time.perf_counter()
    for index, (prompt, salt) in enumerate(zip(asked["prompts"], asked["salts"], strict=True)):
        request: dict[str, Any] = {"prompt_token_ids": prompt}
        if salt is not None:
            request["cache_salt"] = salt
        lora = None
        if asked["adapter"] is not None:
            name, folder = asked["adapter"]
            lora = LoRARequest(name, ADAPTERS.setdefault(folder, len(ADAPTERS) + 1), folder)
        engine.add_request(f"{began}-{index}", request, parameters, lora_request=lora)
    first_s: dict[int, float] = {}
    done: dict[int, Any] = {}
    slowest_s, step_began = 0.0, time.perf_counter()
    while engine.has_unfinished_requests():
        for output in engine.step():
            index = int(output.request_id.split("-")[1])
            if output.outputs and output.outputs[0].token_ids:
                first_s.setdefault(index, time.perf_counter() - began)
            if output.finished:
                done[index] = output
        step_ended = time.perf_counter()
        slowest_s, step_began = max(slowest_s, step_ended - step_began), step_ended
    everyone = range(len(done))
    return {
        "tokens": [list(done[i].outputs[0].token_ids) for i in everyone],
        "first_token_s": [first_s.get(i) for i in everyone],
        "cached": [done[i].num_cached_tokens for i in everyone],
        "reasons": [done[i].outputs[0].finish_reason for i in everyone],
        "gaps": [[gap(likely) for likely in done[i].outputs[0].logprobs or ()] for i in everyone],
        "slowest_step_s": slowest_s,
        **waits.taken(),
    }


def gap(likely: dict[int, Any]) -> float:
    """Between the two likeliest tokens of one position."""
    first, second = sorted((each.logprob for each in likely.values()), reverse=True)[:2]
    return float(first - second)


def main() -> None:
    hooks, waits = HookTimes(KVStoreConnector), Waits(KVStoreConnector)
    llm = LLM(**json.loads(sys.argv[1]))
    print(json.dumps({"ready": True}), file=ANSWERS)
    for line in sys.stdin:
        asked = json.loads(line)
        if "prompts" in asked:
            answer: Any = generate(llm, waits, asked)
        elif "held" in asked:
            answer = held(llm, waits)
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
