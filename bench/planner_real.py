"""The planner over real sockets: a node, a client, and between them a process that shapes the link.

    PYTHONPATH=tests/support python -m bench.planner_real [--chunks 8] [--rounds 3] [--json PATH]

KV in SmolLM2's shape (30 layers, 3 heads of 64, bfloat16; SmolLM2's own where `python -m bench.kv` has written it),
stored at `high` in chunks of 256 tokens; an engine of 1,000 tokens a second (two cores). For each rate the fixed
qualities and the planner take turns; the planner has one get before, as a client has that is not new. Medians over
rounds; times are those of the get plus, by the cost model, of computing what it left.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from node_process import NodeProcess
from prometheus_client import CollectorRegistry

from kvstore_client import Client, KVLayout, Namespace, Quality

MBITS = (20, 100, 500, 5000)
LATENCY_MS = 5.0
ENGINE_TOKENS_PER_S = 1000.0
DEADLINE_SHARE = 0.25  # of recomputing all of it
KV_FILE = Path(".cache/bench/smollm2-kv.npy")
CALL_S = 120.0
CHUNK_TOKENS = 256


def kv_of(tokens: int) -> Any:
    """bfloat16 [30, 2, tokens, 3, 64]."""
    if KV_FILE.exists():
        stored = np.load(KV_FILE, mmap_mode="r")
        return np.ascontiguousarray(stored[:, :, :tokens]).view(ml_dtypes.bfloat16)
    made = np.random.default_rng(0).standard_normal((30, 2, tokens, 3, 64), dtype=np.float32)
    return made.astype(ml_dtypes.bfloat16)


@contextmanager
def shaped(port: str, mbit: float) -> Iterator[str]:
    """The address of a relay process to `port`."""
    script = Path(sys.modules["node_process"].__file__ or "").with_name("shaped_relay.py")
    process = subprocess.Popen(
        [sys.executable, script, port, "--mbit", str(mbit), "--latency-ms", str(LATENCY_MS)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def timed(cache: Namespace, tokens: range, **arguments: Any) -> tuple[float, int]:
    """(seconds of the get and of computing the rest, tokens that came)."""
    began = time.monotonic()
    _, came = cache.get(tokens, deadline=CALL_S, **arguments)
    return time.monotonic() - began + (len(tokens) - came) / ENGINE_TOKENS_PER_S, came


def measure(node: NodeProcess, layout: KVLayout, tokens: range, mbit: float, rounds: int) -> dict[str, Any]:
    recompute_s = len(tokens) / ENGINE_TOKENS_PER_S
    deadline_s = DEADLINE_SHARE * recompute_s
    goal = {"ttft": deadline_s, "prefill_tokens_per_s": ENGINE_TOKENS_PER_S}
    ways: dict[str, dict[str, Any]] = {quality.label: {"quality": quality} for quality in Quality if not quality.exact}
    ways["planner"] = goal
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    came: dict[str, int] = {}
    with (
        shaped(node.address.rpartition(":")[2], mbit) as address,
        Client(address, strict=True, transport="grpc", registry=CollectorRegistry()) as client,
    ):
        cache = client.namespace(layout)
        cold_s, _ = timed(cache, tokens, **goal)
        plan = cache.plan(tokens, deadline=CALL_S, ttft=deadline_s, prefill_tokens_per_s=ENGINE_TOKENS_PER_S)
        for _ in range(rounds):
            for name, arguments in ways.items():
                took, came[name] = timed(cache, tokens, **arguments)
                seconds[name].append(took)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {"mbit": mbit, "deadline_s": deadline_s, "recompute_s": recompute_s, "cold_s": cold_s, "seconds": medians,
            "tokens": came, "plan": plan.reason}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tokens = range(options.chunks * CHUNK_TOKENS)
    kv = kv_of(len(tokens))
    layout = KVLayout.uniform(
        model="SmolLM2-135M-Instruct", revision="bench", num_layers=30, kv_heads=3, head_dim=64, dtype="bfloat16",
        chunk_tokens=CHUNK_TOKENS,
    )  # fmt: skip
    results = []
    with tempfile.TemporaryDirectory() as folder:
        node = NodeProcess(Path(folder), "--host-capacity", "512MiB")
        try:
            with Client(node.address, strict=True, registry=CollectorRegistry()) as client:
                client.namespace(layout).put(tokens, kv, quality="high", deadline=CALL_S)
            print("| Mbit/s | deadline | recompute | high | medium | low | planner, first get | planner | plan |")
            print("|---|---|---|---|---|---|---|---|---|")
            for mbit in MBITS:
                row = measure(node, layout, tokens, mbit, options.rounds)
                results.append(row)
                each = [row["deadline_s"], row["recompute_s"], *(row["seconds"][q] for q in ("high", "medium", "low")),
                        row["cold_s"], row["seconds"]["planner"]]  # fmt: skip
                print(f"| {mbit} |", " | ".join(f"{value:.2f}" for value in each), f"| {row['plan']} |", flush=True)
        finally:
            node.kill()
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
