"""Time to the first token of a decode worker: following the prefill layer by layer, getting what was put, recomputing.

    PYTHONPATH=tests/support python -m bench.streaming [--tokens 500 1000 2000] [--mbit 0 1000 200] [--rounds 5]
        [--quality lossless] [--dtype bfloat16] [--json PATH]

SmolLM2-135M in two worker processes, one thread each, and a node beside the prefill's; between node and decode a link
of so many Mbit/s and 5 ms (0: none, loopback). The three ways take turns; figures are medians. The whole prompt is
stored (`tail`), so the decode worker computes its last token alone. *TTFT* is from the beginning of the prefill, *after
prefill* from its end, *fetch* from the answer to the put: what a prompt costs that somebody has stored before. With an
exact quality the tokens that it goes on with must be those of the worker that computed everything. On CPUs without
bfloat16 arithmetic float32 is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from bench.planner_real import shaped
from bench.server_process import server_process
from kvstore.demo.processes import Process
from kvstore_codec import Quality

START_S = 600.0
WARM_TOKENS = 64
HEADINGS = ("tokens", "Mbit/s", "quality", "MB", "way", "prefill", "first layer", "last layer", "TTFT", "after prefill",
            "fetch", "TTFT ÷ recompute", "recompute ÷ fetch")  # fmt: skip


def ask(worker: Process, name: str, **arguments: Any) -> dict[str, Any]:
    return worker.ask(json.dumps([name, arguments]), print)


@contextmanager
def workers(dtype: str) -> Iterator[tuple[Process, Process]]:
    """(prefill, decode), their models loaded."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["bench.streaming_worker", dtype]
        logs = (Path(folder) / "prefill.log", Path(folder) / "decode.log")
        with (
            Process("prefill", command, logs[0], asked=True) as prefill,
            Process("decode", command, logs[1], asked=True) as decode,
        ):
            for worker in (prefill, decode):
                worker.line(START_S)
            yield prefill, decode


def streamed(prefill: Process, decode: Process, tokens: int, near: dict[str, str], far: dict[str, str]) -> Any:
    """(what the prefill said, what the decode said); the decode worker waits from the start."""
    with ThreadPoolExecutor(1) as threads:
        following = threads.submit(ask, decode, "follow", tokens=tokens, where=far)
        return ask(prefill, "write", tokens=tokens, where=near), following.result()


def put_then_got(prefill: Process, decode: Process, tokens: int, near: dict[str, str], far: dict[str, str]) -> Any:
    put = ask(prefill, "put", tokens=tokens, where=near)
    return put, ask(decode, "get", tokens=tokens, where=far)


WAYS = {"stream": streamed, "put, get": put_then_got}


def timed(said: tuple[dict[str, Any], dict[str, Any]], quality: str, expected: Sequence[int]) -> dict[str, Any]:
    """Seconds of one run from the beginning of its prefill. Raises SystemExit where something is not as it must be."""
    prefill, decode = said
    began = prefill["began"]
    if Quality.parse(quality).exact and decode["chosen"] != list(expected):
        raise SystemExit(f"bench: {quality}: went on with {decode['chosen']}, without a store with {list(expected)}")
    if decode["restored"] != prefill["kept"] - 1:
        raise SystemExit(f"bench: {decode['restored']} tokens were restored of {prefill['kept']}")
    layers = decode.get("layers", ())
    return {
        "prefill": prefill["computed"] - began,
        "stored": prefill["stored"] - began,
        "ttft": decode["first_at"] - began,
        "after_prefill": decode["first_at"] - prefill["computed"],
        "fetch": None if layers else decode["first_at"] - prefill["stored"],
        "bytes": prefill["bytes"],
        "first_layer": layers[0] - began if layers else None,
        "last_written": prefill["layers"][-1] - began if layers else None,
        "layers_written": [at - began for at in prefill.get("layers", ())],
        "layers_taken": [at - began for at in layers],
        "same_tokens": decode["chosen"] == list(expected),
    }


def median(runs: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [run[name] for run in runs]
    return None if values[0] is None else statistics.median(values)


def show(
    tokens: int, mbit: float, quality: str, way: str, runs: Sequence[dict[str, Any]], recomputed: Sequence[float]
) -> None:  # fmt: skip
    """One row of the table; seconds. `recomputed`: of the same rounds."""
    names = ("prefill", "first_layer", "last_written", "ttft", "after_prefill", "fetch")
    seconds = [median(runs, name) for name in names]
    cells = [str(tokens), f"{mbit:g}" if mbit else "–", quality, f"{runs[0]['bytes'] / 1e6:.1f}", way]
    cells += ["–" if value is None else f"{value:.2f}" for value in seconds]
    rounds = list(zip(runs, recomputed, strict=True))
    cells.append(f"{statistics.median(run['ttft'] / each for run, each in rounds):.2f}")
    fetched = [each / run["fetch"] for run, each in rounds if run["fetch"] is not None]
    cells.append(f"{statistics.median(fetched):.1f}" if fetched else "–")
    print("|", " | ".join(cells), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[500, 1000, 2000])
    parser.add_argument("--mbit", type=float, nargs="+", default=[0, 1000, 200])
    parser.add_argument("--quality", nargs="+", default=["lossless"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    kvstore = str(Path(sys.executable).with_name("kvstore"))
    serve = [kvstore, "serve", "--listen", "127.0.0.1:0", "--host-capacity", "2GiB"]
    with server_process(serve) as address, workers(options.dtype) as (prefill, decode):
        for worker in (prefill, decode):
            ask(worker, "recompute", tokens=WARM_TOKENS)  # a model's first forward is slower
        print("|", " | ".join(HEADINGS), "|")
        print("|" + "---|" * len(HEADINGS), flush=True)
        for tokens in options.tokens:
            rounds: dict[tuple[float, str, str], list[dict[str, Any]]] = {}
            recomputed = []
            for number in range(options.rounds):
                reference = ask(decode, "recompute", tokens=tokens)
                recomputed.append(reference["first_at"] - reference["began"])
                for mbit in options.mbit:
                    with shaped(address.rpartition(":")[2], mbit) if mbit else nullcontext(address) as link:
                        for quality in options.quality:
                            for way, run in WAYS.items():
                                near = {"address": address, "run": f"{way} {number}", "quality": quality}
                                said = run(prefill, decode, tokens, near, {**near, "address": link})
                                ask(prefill, "forget", where=near)
                                measured = timed(said, quality, reference["chosen"])
                                rounds.setdefault((mbit, quality, way), []).append(measured)
            recompute_s = statistics.median(recomputed)
            print(f"| {tokens} | – | – | – | recompute | – | – | – | {recompute_s:.2f} | – | – | 1.00 | – |",
                  flush=True)  # fmt: skip
            for (mbit, quality, way), runs in rounds.items():
                show(tokens, mbit, quality, way, runs, recomputed)
                results.append({"tokens": tokens, "mbit": mbit, "quality": quality, "way": way, "runs": runs,
                                "recompute": recomputed})  # fmt: skip
    print("load average at the end:", " ".join(f"{load:.1f}" for load in os.getloadavg()))
    if options.json is not None:
        options.json.write_text(json.dumps({"options": {**vars(options), "json": None}, "results": results}, indent=1))


if __name__ == "__main__":
    main()
