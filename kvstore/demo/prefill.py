"""The prefill worker: runs the model over the prompt and puts its KV at every quality, then again layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kvstore.demo import live, prompt
from kvstore.demo.model import fast_dtype, load
from kvstore.demo.worker import progress, serve
from kvstore_client import Client
from kvstore_client.integrations.transformers import kv_from_cache, layout_for, returned_cache

PUT_DEADLINE_S = 60.0


def start(targets: Sequence[str], cache: Path) -> Mapping[str, Callable[[], dict[str, Any]]]:
    """`targets`: the node."""
    (target,) = targets
    model, tokenizer = load(cache, fast_dtype())
    tokens = prompt.prompt_tokens(tokenizer)
    layout = layout_for(model, chunk_tokens=prompt.CHUNK_TOKENS)

    def put() -> dict[str, Any]:
        began = time.perf_counter()
        past = returned_cache(model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1))
        prefill_s = time.perf_counter() - began
        progress(f"prefill: {len(tokens)} tokens computed in {prefill_s:.2f} s")
        kv = kv_from_cache(past, layout)
        puts = {}
        with Client(target, deadline=PUT_DEADLINE_S, strict=True) as client:
            for stored in prompt.READ_FROM:
                began = time.perf_counter()
                done = client.namespace(layout, extras=prompt.salt(stored)).put(
                    tokens, kv, quality=stored, durable=True
                )
                seconds = time.perf_counter() - began
                progress(f"prefill: put {done.tokens} tokens as {stored}, {done.bytes / 1e6:.2f} MB, {seconds:.2f} s")
                puts[stored] = {
                    "tokens": done.tokens, "bytes": done.bytes, "durable": done.durable, "seconds": seconds,
                }  # fmt: skip
        return {"prompt_tokens": len(tokens), "prefill_seconds": prefill_s, "puts": puts}

    def put_live() -> dict[str, Any]:
        with Client(target, strict=True) as client:
            written = live.write(model, live.store_of(client, layout), live.streamed_part(tokens))
        seconds = written["computed"] - written["began"]
        progress(f"prefill: {len(written['layers'])} layers written as they were computed, in {seconds:.2f} s")
        return written

    return {"put": put, "put_live": put_live}


if __name__ == "__main__":
    serve(start)
