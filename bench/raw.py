"""Raw objects against memcpy, by size: encode, decode into the caller's array.

*From memory* goes through more objects than any cache holds, *from caches* takes one again and again. Contestants take
turns, object by object. Figures are the lower quartiles of their times, which hold on a busy machine (whoever runs
longer is interrupted more); ratios are of speeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

import kvstore_codec as codec
from kvstore.cli import render

LAYERS, KV_HEADS, HEAD_DIM = 32, 1, 64  # 8 KiB a token
SIZES_KIB = (64, 1024, 4096, 16384)
MEMORY_BYTES = 256 << 20
ROUNDS = 200


@dataclass(frozen=True)
class Row:
    """µs an object, and its speed in memcpy's."""

    what: str
    kib: int
    cold: bool
    us: float
    of_memcpy: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.raw", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="objects of each size (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there as well")
    parsed = parser.parse_args()
    rows = [row for kib in SIZES_KIB for cold in (True, False) for row in measure(kib, cold, parsed.rounds)]
    table = Table(title=f"raw objects, load average {os.getloadavg()[0]:.1f}")
    for title in ("KiB", "from", "", "µs", "× memcpy"):
        table.add_column(title)
    for row in rows:
        place = "memory" if row.cold else "caches"
        table.add_row(str(row.kib), place, row.what, f"{row.us:.1f}", f"{row.of_memcpy:.2f}")
    render.print_table(table)
    if parsed.json:
        parsed.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def measure(kib: int, cold: bool, rounds: int) -> list[Row]:
    tokens = kib * 1024 // (LAYERS * 2 * KV_HEADS * HEAD_DIM * 2)
    layout = codec.KVLayout.uniform(
        model="bench", revision="raw", num_layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="float16",
        chunk_tokens=max(16, tokens),
    )  # fmt: skip
    objects = max(2, MEMORY_BYTES // (kib * 1024)) if cold else 1
    rng = np.random.default_rng(1)
    kv = rng.integers(0, 1 << 16, (LAYERS, 2, tokens, KV_HEADS, HEAD_DIM), np.uint16).view(np.float16)
    blob = codec.encode(kv, layout, quality="raw")
    # As a node's arena and a caller's cache lie: a prompt's chunks side by side in one array.
    stored = [memoryview(bytearray(blob)) for _ in range(objects)]
    cache = codec.empty(layout, tokens * objects)
    cache[...] = 0
    places = [cache[:, :, index * tokens : (index + 1) * tokens] for index in range(objects)]
    flat = np.zeros((objects, kv.nbytes), np.uint8)
    payloads = [np.frombuffer(each, np.uint8)[-kv.nbytes :] for each in stored]
    for place in places:
        codec.decode(blob, layout, out=place)
    contestants: dict[str, Callable[[int], Any]] = {
        "memcpy": lambda at: np.copyto(flat[at], payloads[at]),
        "decode": lambda at: codec.decode(stored[at], layout, quality="raw", out=places[at]),
        "encode": lambda at: codec.encode(places[at], layout, quality="raw"),
    }
    took: dict[str, list[float]] = {what: [] for what in contestants}
    for turn in range(rounds):
        for number, (what, run) in enumerate(contestants.items()):
            at = (turn + number * objects // len(contestants)) % objects  # what another has just read is in a cache
            began = time.perf_counter()
            run(at)
            took[what].append(time.perf_counter() - began)
    if any((place.view(np.uint16) != kv.view(np.uint16)).any() for place in places):
        raise AssertionError("what was decoded is not what was encoded")
    quartiles = {what: statistics.quantiles(times)[0] for what, times in took.items()}
    return [Row(what, kib, cold, 1e6 * each, quartiles["memcpy"] / each) for what, each in quartiles.items()]


if __name__ == "__main__":
    main()
