"""How much sooner a get with refine=True is back, and when its better values are there, over links of a known rate.

    PYTHONPATH=tests/support python -m bench.refine [--rounds 7] [--json PATH]

The KV is SmolLM2's, 2,000 tokens stored at `high` in chunks of 256. Both ways take turns; medians over rounds, ratios
the medians of the rounds' own. What both have in the end is compared, outside the timing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from prometheus_client import CollectorRegistry

import kvstore_codec as codec
from bench.kv import KV_PATH, ROPE_THETA, real_kv
from bench.planner_real import shaped
from bench.server_process import server_process
from kvstore.cli import bench_codec
from kvstore_client import Client, KVLayout, Namespace, RoPE

KVSTORE = Path(sys.executable).with_name("kvstore")
MBITS = (50, 200, 1000)
TOKENS = 2000
CALL_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", type=Path, default=KV_PATH, help="made if missing (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there as well")
    options = parser.parse_args()
    kv = np.ascontiguousarray(bench_codec.load_kv(real_kv(options.kv)).view(ml_dtypes.bfloat16)[:, :, :TOKENS])
    layers, _, tokens, heads, dim = kv.shape
    layout = KVLayout.uniform(
        model="SmolLM2-135M-Instruct", revision="bench", num_layers=layers, kv_heads=heads, head_dim=dim,
        dtype="bfloat16", chunk_tokens=256, rope=RoPE(theta=ROPE_THETA),
    )  # fmt: skip
    print(f"{bench_codec.cpu()}, load {os.getloadavg()[0]:.1f} before, medians of {options.rounds} rounds")
    print("| Mbit/s | get ms | with refine=True | ÷ get | all of it here | ÷ get | apply |")
    print("|---|---|---|---|---|---|---|")
    command: list[str | Path] = [KVSTORE, "serve", "--listen", "127.0.0.1:0", "--log-level", "warning"]
    figures: dict[int, list[dict[str, float]]] = {}
    with server_process([*command, "--host-capacity", "512MiB"]) as address:
        with Client(address, strict=True, deadline=CALL_S, registry=CollectorRegistry()) as client:
            client.namespace(layout, tail=True).put(range(tokens), kv, quality="high")
        for mbit in MBITS:
            with (
                shaped(address.rpartition(":")[2], mbit) as link,
                Client(
                    link,
                    strict=True,
                    deadline=CALL_S,
                    registry=CollectorRegistry(),
                    transport="grpc",
                ) as client,
            ):
                cache = client.namespace(layout, tail=True)
                rounds = figures[mbit] = [measure(cache, tokens) for _ in range(-1, options.rounds)][1:]
            print(f"| {mbit} | {' | '.join(_shown(rounds))} |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(cache: Namespace, tokens: int) -> dict[str, float]:
    """Seconds. Raises SystemExit where refined values are not those of a whole get."""
    out: Any = codec.empty(cache.layout, tokens)
    began = time.perf_counter()
    whole = cache.get(range(tokens))
    get_s = time.perf_counter() - began
    began = time.perf_counter()
    restored = cache.get(range(tokens), out=out, refine=True)
    coarse_s = time.perf_counter() - began
    complete = restored.refinement.wait()
    all_s = time.perf_counter() - began
    began = time.perf_counter()
    restored.refinement.apply()
    apply_s = time.perf_counter() - began
    if not complete or whole.n != tokens or out.tobytes() != whole.kv.tobytes():
        raise SystemExit("bench: the refined values are not those of a whole get")
    return {"get": get_s, "coarse": coarse_s, "all": all_s, "apply": apply_s}


def _shown(rounds: list[dict[str, float]]) -> list[str]:
    def milliseconds(name: str) -> str:
        return f"{1e3 * statistics.median(each[name] for each in rounds):.0f}"

    def ratio(name: str) -> str:
        return f"{statistics.median(each[name] / each['get'] for each in rounds):.2f}"

    return [milliseconds("get"), milliseconds("coarse"), ratio("coarse"), milliseconds("all"), ratio("all"),
            milliseconds("apply")]  # fmt: skip


if __name__ == "__main__":
    main()
