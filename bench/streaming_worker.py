"""A worker of `bench.streaming`: it prefills or decodes with the real model; a JSON line asked, a JSON line answered.

Times are of the machine's monotonic clock, which its processes share. One thread a worker: two of them run at a time,
and threads that wait for each other would measure the scheduler.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from transformers import DynamicCache

from bench.kv import TEXTS
from kvstore.demo import model as smollm2
from kvstore.demo.live import TimedStream, TimedWriter
from kvstore_client import Client, Extras, Namespace
from kvstore_client.integrations.transformers import (
    FollowingCache,
    WritingCache,
    cache_from_kv,
    kv_from_cache,
    layout_for,
    passed_cache,
)

CHUNK_TOKENS = 256
CONTINUED = 4  # tokens that are compared
CALL_S = 300.0
MODELS = Path(__file__).resolve().parents[1] / ".cache/models"


class Worker:
    """A question is the name of a method and its arguments: the prompt's `tokens`; `where`: store and quality."""

    def __init__(self, dtype: str) -> None:
        torch.set_num_threads(1)
        model, tokenizer = smollm2.load(MODELS)
        self._model = model.to(getattr(torch, dtype)) if dtype != "bfloat16" else model
        self._tokens: list[int] = tokenizer("\n".join(text.read_text("utf-8") for text in TEXTS)).input_ids
        self._layout = layout_for(self._model, chunk_tokens=CHUNK_TOKENS, revision="bench")
        self._clients: dict[str, Client] = {}

    def write(self, tokens: int, where: dict[str, str]) -> dict[str, Any]:
        """A prefill whose layers are written while it computes."""
        ids, began = self._tokens[:tokens], time.monotonic()
        with self._store(where).writer(ids, quality=where["quality"]) as writer:
            timed = TimedWriter(writer)
            self._forward(ids, WritingCache(timed))
            computed = time.monotonic()
        result = writer.result
        assert result is not None
        return {"began": began, "computed": computed, "stored": time.monotonic(), "layers": timed.times,
                "bytes": result.bytes, "kept": result.tokens}  # fmt: skip

    def put(self, tokens: int, where: dict[str, str]) -> dict[str, Any]:
        """A prefill, and then a put of everything."""
        ids, began = self._tokens[:tokens], time.monotonic()
        past = DynamicCache()
        self._forward(ids, past)
        computed = time.monotonic()
        result = self._store(where).put(ids, kv_from_cache(past, self._layout), quality=where["quality"])
        return {"began": began, "computed": computed, "stored": time.monotonic(), "bytes": result.bytes,
                "kept": result.tokens}  # fmt: skip

    def follow(self, tokens: int, where: dict[str, str]) -> dict[str, Any]:
        """The first token out of a prefill that still runs, and the next ones for comparison."""
        ids = self._tokens[:tokens]
        stream = TimedStream(self._store(where).stream(ids, wait=CALL_S))
        cache = FollowingCache(stream, tokens - 1)
        return {**self._continued(ids, cache), "layers": stream.times}

    def get(self, tokens: int, where: dict[str, str]) -> dict[str, Any]:
        """The same out of what is stored."""
        ids, began = self._tokens[:tokens], time.monotonic()
        kv, restored = self._store(where).get(ids)
        past = cache_from_kv(kv, min(restored, tokens - 1), model_or_config=self._model)
        return {**self._continued(ids, past), "began": began}

    def recompute(self, tokens: int) -> dict[str, Any]:
        """The same without a store; then the continuation of the others' pieces: the prompt's last token alone."""
        ids, began = self._tokens[:tokens], time.monotonic()
        past = DynamicCache()
        int(self._forward(ids, past).argmax())
        first_at = time.monotonic()
        past.crop(-1)
        return {**self._continued(ids, past), "began": began, "first_at": first_at}

    def forget(self, where: dict[str, str]) -> dict[str, Any]:
        self._store(where).delete()
        return {}

    def _store(self, where: dict[str, str]) -> Namespace:
        """The whole prompt, a partial last chunk included, under this run's name."""
        address = where["address"]
        if address not in self._clients:
            self._clients[address] = Client(
                address, deadline=CALL_S, strict=True, registry=CollectorRegistry(), transport="grpc"
            )  # fmt: skip
        return self._clients[address].namespace(self._layout, extras=Extras(salt=where["run"]), tail=True)

    def _forward(self, ids: list[int], cache: Any) -> Any:
        """Logits of the token after `ids`, which lie behind what is in `cache`."""
        return self._model(torch.tensor([ids]), **passed_cache(self._model, cache), logits_to_keep=1).logits[0, -1]

    def _continued(self, ids: list[int], cache: Any) -> dict[str, Any]:
        restored = cache.get_seq_length()
        chosen = [int(self._forward(ids[restored:], cache).argmax())]
        first_at = time.monotonic()
        while len(chosen) < CONTINUED:
            chosen.append(int(self._forward(chosen[-1:], cache).argmax()))
        return {"first_at": first_at, "restored": restored, "chosen": chosen}


def main() -> None:
    with torch.no_grad():
        worker = Worker(sys.argv[1])
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            name, arguments = json.loads(line)
            print(json.dumps({"result": getattr(worker, name)(**arguments)}), flush=True)


if __name__ == "__main__":
    main()
