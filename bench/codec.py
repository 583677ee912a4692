"""Codec speed on real KV: what `kvstore bench codec` measures, one table for each chunk size and instruction set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich import box
from rich.console import Console

from bench.kv import KV_PATH, ROPE_THETA, real_kv
from kvstore.cli import bench_codec, bench_tables
from kvstore.cli.bench_codec import QUALITIES, THREADS, Options

CHUNK_TOKENS = (256, 16)
MARKDOWN_COLUMNS = 160


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.codec", description=__doc__)
    parser.add_argument("--kv", type=Path, default=KV_PATH, help="made if missing (default: %(default)s)")
    parser.add_argument("--chunk-tokens", type=int, nargs="+", default=CHUNK_TOKENS)
    parser.add_argument("--quality", nargs="+", default=QUALITIES, metavar="QUALITY")
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    parser.add_argument("--isa", nargs="+", default=[None], metavar="ISA", help="default: the best that the CPU has")
    parser.add_argument("--profile", type=Path, help="of SmolLM2 (make profiles): its qualities, and its transform")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--markdown", action="store_true", help="tables as docs/performance.md has them")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there as well")
    parsed = parser.parse_args()
    kv = bench_codec.load_kv(real_kv(parsed.kv))
    console = Console(width=MARKDOWN_COLUMNS) if parsed.markdown else Console()
    reports = []
    for chunk_tokens in parsed.chunk_tokens:
        for isa in parsed.isa:
            options = Options(
                chunk_tokens=chunk_tokens, qualities=parsed.quality, threads=parsed.threads, rounds=parsed.rounds,
                rope_theta=ROPE_THETA, isa=isa, profile=parsed.profile,
            )  # fmt: skip
            reports.append(bench_codec.measure(kv, options))
            for table in bench_tables.report_tables(reports[-1], parsed.kv.name):
                table.box = box.MARKDOWN if parsed.markdown else table.box
                console.print(table)
                console.print()
    if parsed.json:
        figures = {"kv": str(parsed.kv), "reports": [bench_codec.report_json(report) for report in reports]}
        parsed.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
