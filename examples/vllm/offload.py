"""An engine with kvstore's connector answers one long prompt, and says how much of it was restored and how fast.

    python examples/vllm/offload.py ADDRESS [MODEL]

`run.sh` beside it starts a node and runs this twice. MODEL is a folder; by default SmolLM2-135M-Instruct out of the
package that `make vllm-setup` installs. On a CPU without AVX-512 set DTYPE=float32: bfloat16 is slow there.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
)  # fmt: skip

from vllm import LLM, SamplingParams  # reads the environment

from kvstore.demo import model

DOCUMENT = "The mill at the mouth of the Arve has two doors, one for the sea and one for the land. " * 70


def main() -> None:
    address = sys.argv[1]
    folder = sys.argv[2] if len(sys.argv) > 2 else str(model.model_folder(Path(".cache/models")))
    llm = LLM(
        model=folder, dtype=os.environ.get("DTYPE", "auto"), max_model_len=4096, enforce_eager=True,
        disable_log_stats=True,
        kv_transfer_config={
            "kv_connector": "KVStoreConnector",
            "kv_connector_module_path": "kvstore_client.integrations.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"address": address},
        },
    )  # fmt: skip
    llm.generate("Hello", SamplingParams(max_tokens=1), use_tqdm=False)  # the first one warms the engine up
    began = time.perf_counter()
    (answer,) = llm.generate(
        DOCUMENT + "How many doors has the mill?", SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False
    )  # fmt: skip
    seconds = time.perf_counter() - began
    print(
        f"  {len(answer.prompt_token_ids)} tokens, {answer.num_cached_tokens} restored, first token in {seconds:.2f} s"
    )
    llm.llm_engine.engine_core.shutdown()  # what is on its way to the node is sent


if __name__ == "__main__":
    main()
