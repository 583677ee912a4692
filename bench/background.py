"""What a put in the background costs its caller, and what a get pays while puts are queued.

    python -m bench.background [--rounds 9] [--json PATH]

The KV is SmolLM2's, 2,000 tokens, put at `high` into a node of its own in chunks of 256; each round uses a new prompt,
and every way takes its turn. The caller's time is that of the call; `done` is when the future is. Ratios are medians of
the rounds' own. A get is of a prompt stored before, alone and with three puts queued.
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
from bench.server_process import server_process
from kvstore.cli import bench_codec
from kvstore_client import Client, KVLayout, Namespace, RoPE

KVSTORE = Path(sys.executable).with_name("kvstore")
TOKENS = 2000
CALL_S = 120.0
QUEUED = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", type=Path, default=KV_PATH, help="made if missing (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there as well")
    options = parser.parse_args()
    kv = np.ascontiguousarray(bench_codec.load_kv(real_kv(options.kv)).view(ml_dtypes.bfloat16)[:, :, :TOKENS])
    load = os.getloadavg()[0]
    command: list[str | Path] = [KVSTORE, "serve", "--listen", "127.0.0.1:0", "--log-level", "warning"]
    layers, _, tokens, heads, dim = kv.shape
    layout = KVLayout.uniform(
        model="SmolLM2-135M-Instruct", revision="bench", num_layers=layers, kv_heads=heads, head_dim=dim,
        dtype="bfloat16", chunk_tokens=256, rope=RoPE(theta=ROPE_THETA),
    )  # fmt: skip
    with (
        server_process([*command, "--host-capacity", "512MiB"]) as address,
        Client(address, strict=True, deadline=CALL_S, registry=CollectorRegistry()) as client,
    ):
        rounds = [measure(client.namespace(layout), kv, number) for number in range(-1, options.rounds)][1:]
    print(f"{bench_codec.cpu()}, load {load:.1f} before, {tokens} tokens, medians of {options.rounds} rounds")
    print("| | ms | ÷ put |")
    print("|---|---|---|")
    for name in rounds[0]:
        milliseconds = 1e3 * statistics.median(each[name] for each in rounds)
        print(f"| {name} | {milliseconds:.2f} | {statistics.median(each[name] / each['put'] for each in rounds):.4f} |")
    if options.json:
        options.json.write_text(json.dumps(rounds, indent=2) + "\n")


def measure(cache: Namespace, kv: Any, number: int) -> dict[str, float]:
    """Seconds, by what took them. Raises SystemExit where something is not stored or not found."""
    tokens = kv.shape[2]

    def prompt(which: int) -> range:
        first = (100 * (number + 1) + which) * tokens
        return range(first, first + tokens)

    taken: dict[str, float] = {}
    began = time.perf_counter()
    stored = [cache.put(prompt(0), kv)]
    taken["put"] = time.perf_counter() - began
    for which, copy in enumerate((False, True), 1):
        name = "background put, copied" if copy else "background put"
        began = time.perf_counter()
        future = cache.put(prompt(which), kv, background=True, copy=copy)
        taken[f"{name}: the call"] = time.perf_counter() - began
        stored.append(future.result())
        taken[f"{name}: done"] = time.perf_counter() - began
    began = time.perf_counter()
    kv.copy()
    taken["a copy by numpy"] = time.perf_counter() - began
    out = codec.empty(cache.layout, tokens)
    for queued in (0, QUEUED):
        futures = [cache.put(prompt(10 + each), kv, background=True) for each in range(queued)]
        began = time.perf_counter()
        restored = cache.get(prompt(0), out=out)
        taken[f"get, {queued} puts queued"] = time.perf_counter() - began
        stored += [future.result() for future in futures]
        if restored.n != tokens // cache.layout.chunk_tokens * cache.layout.chunk_tokens:
            raise SystemExit("bench: what was put was not found")
    if any(result.rejected or not result.stored for result in stored):
        raise SystemExit("bench: a put was not stored")
    cache.delete()
    return taken


if __name__ == "__main__":
    main()
