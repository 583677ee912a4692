"""Codec speed on real KV: what `kvstore bench codec` measures, at large and small chunks, on one and two threads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.kv import KV_PATH, ROPE_THETA, real_kv
from kvstore.cli import bench_codec, render
from kvstore.cli.bench_codec import Options

CHUNK_TOKENS = (256, 16)
THREADS = (1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.codec", description=__doc__)
    parser.add_argument("--kv", type=Path, default=KV_PATH, help="made if missing (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there as well")
    parsed = parser.parse_args()
    kv = bench_codec.load_kv(real_kv(parsed.kv))
    reports = []
    for chunk_tokens in CHUNK_TOKENS:
        for threads in THREADS:
            options = Options(chunk_tokens, threads=threads, rounds=parsed.rounds, rope_theta=ROPE_THETA)
            reports.append(bench_codec.measure(kv, options))
            for table in bench_codec.report_tables(reports[-1], parsed.kv.name):
                render.print_table(table)
            print()
    if parsed.json:
        figures = {"kv": str(parsed.kv), "reports": [bench_codec.report_json(report) for report in reports]}
        parsed.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
