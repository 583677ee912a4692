"""The decode worker: gets the prompt's KV, continues from it, and compares with never having used a store.

The reference computes the prompt itself and goes on from the same token in the same steps, as an engine's own
prefix cache would, so that an exact store must give the same logits bit for bit. KL divergence is computed in
float32 from the same KV: in bfloat16 the model's own rounding would drown that of the better qualities.
"""

from __future__ import annotations

import copy
import hashlib
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from transformers import DynamicCache

from kvstore.demo import live, prompt
from kvstore.demo.model import fast_dtype, load
from kvstore.demo.worker import progress, serve
from kvstore_client import Client, KvClientError
from kvstore_client.integrations.transformers import cache_from_kv, layout_for, passed_cache, returned_cache
from kvstore_codec.layout import DTYPE_BYTES

GET_DEADLINE_S = 30.0
DOWN_DEADLINE_S = 1.0
ROUNDS = 3  # of each timing, interleaved
STORED_AS = {quality: stored for stored, qualities in prompt.READ_FROM.items() for quality in qualities}


class Decoder:
    """Reads through its sidecar, and from the node itself where it says so."""

    def __init__(self, sidecar: str, node: str, cache: Path) -> None:
        self._model, tokenizer = load(cache, fast_dtype())
        self._model_float32 = copy.deepcopy(self._model).float()
        self._tokens = prompt.prompt_tokens(tokenizer)
        self._detokenise = tokenizer.decode
        self._live_logits: Any = None
        self._layout = layout_for(self._model, chunk_tokens=prompt.CHUNK_TOKENS)
        self._registry = CollectorRegistry()
        self._client = Client(sidecar, deadline=GET_DEADLINE_S, registry=self._registry)
        self._node = Client(node, deadline=GET_DEADLINE_S, registry=CollectorRegistry())

    def measure(self) -> dict[str, Any]:
        """Every quality: what was restored, from how many bytes, how fast, and what the model makes of it."""
        whole_chunks = len(self._tokens) // prompt.CHUNK_TOKENS * prompt.CHUNK_TOKENS
        progress("decode: computing the reference without the store")
        reference = self._computed(whole_chunks)
        expected = self._greedy(reference)
        distributions = self._distributions(reference, expected)
        rows = {}
        for quality in STORED_AS:
            kv, tokens, received = self._get(quality)
            row = {
                "tokens": tokens,
                "received_bytes": received,
                "kv_digest": _digest(kv),
                **self._sizes(tokens, received),
            }
            if tokens:
                past = cache_from_kv(kv, tokens, model_or_config=self._model)
                continued = self._greedy(past)
                row["matching_tokens"] = _common_prefix(expected, continued)
                row["mean_kl"] = _mean_kl(distributions, self._distributions(past, expected))
                progress(f"decode: {quality}: {tokens} tokens from {received / 1e6:.2f} MB")
            rows[quality] = row
        for quality, seconds in self._timings().items():
            rows.setdefault(quality, {})["ttft_seconds"] = seconds
        return {
            "rows": rows, "dtype": self._layout.dtype, "continuation": self._detokenise(expected),
            "continuation_tokens": len(expected),
        }  # fmt: skip

    def compute_live(self) -> dict[str, Any]:
        """The logits that `follow_live` must find: of the same tokens in the same two pieces, without a store."""
        tokens = live.streamed_part(self._tokens)
        past = returned_cache(self._model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1))
        past.crop(-1)
        ids = torch.tensor([tokens[-1:]])
        self._live_logits = self._model(ids, **passed_cache(self._model, past), logits_to_keep=1).logits[0, -1]
        return {}

    def follow_live(self) -> dict[str, Any]:
        """From the node itself: a sidecar has what is stored, not what is being written."""
        tokens = live.streamed_part(self._tokens)
        followed, logits = live.follow(self._model, live.store_of(self._node, self._layout), tokens)
        return {**followed, "same_logits": torch.equal(logits, self._live_logits)}

    def get_all(self) -> dict[str, Any]:
        """What each quality restores from the node now, or as soon as it answers: tokens and a digest of the KV."""
        self._wait_for_node()
        restored = {}
        for quality in STORED_AS:
            kv, tokens = self._namespace(self._node, quality).get(self._tokens, quality=quality)
            restored[quality] = {"tokens": tokens, "kv_digest": _digest(kv)}
        return restored

    def get_while_down(self) -> dict[str, Any]:
        """A get from a dead node: a miss, soon. From the sidecar: what it has read before."""
        began = time.perf_counter()
        _, tokens = self._namespace(self._node, "lossless").get(self._tokens, deadline=DOWN_DEADLINE_S)
        seconds = time.perf_counter() - began
        began = time.perf_counter()
        _, beside = self._namespace(self._client, "lossless").get(self._tokens)
        return {
            "tokens": tokens, "seconds": seconds, "deadline_seconds": DOWN_DEADLINE_S,
            "sidecar": {"tokens": beside, "seconds": time.perf_counter() - began},
        }  # fmt: skip

    def _wait_for_node(self) -> None:
        """A client reconnects within about a second; until then it answers misses."""
        end = time.monotonic() + GET_DEADLINE_S
        while True:
            try:
                self._node.stat(deadline=1.0)
            except KvClientError:
                if time.monotonic() > end:
                    raise
                threading.Event().wait(0.05)
            else:
                return

    def _namespace(self, client: Client, quality: str) -> Any:
        return client.namespace(self._layout, extras=prompt.salt(STORED_AS[quality]))

    def _get(self, quality: str) -> tuple[Any, int, int]:
        before = self._received()
        kv, tokens = self._namespace(self._client, quality).get(self._tokens, quality=quality)
        return kv, tokens, self._received() - before

    def _received(self) -> int:
        return int(self._registry.get_sample_value("kvstore_client_stream_bytes_total", {"direction": "in"}) or 0)

    def _sizes(self, tokens: int, received: int) -> dict[str, Any]:
        raw = tokens * self._layout.bytes_per_token
        elements = raw // DTYPE_BYTES[self._layout.dtype]
        return {"raw_bytes": raw, "bits_per_element": 8 * received / elements if elements else None}

    def _computed(self, tokens: int) -> Any:
        """The cache of the prompt's first `tokens` tokens, out of a prefill of all of it, as the prefill worker's."""
        past = returned_cache(self._model(torch.tensor([self._tokens]), use_cache=True, logits_to_keep=1))
        past.crop(tokens - len(self._tokens))
        return past

    def _first_logits(self, past: Any) -> Any:
        """Logits of the next token after the prompt; `past` grows by the rest of the prompt."""
        ids = torch.tensor([self._tokens[past.get_seq_length() :]])
        return self._model(ids, **passed_cache(self._model, past), logits_to_keep=1).logits[0, -1]

    def _greedy(self, past: Any) -> list[int]:
        past = copy.deepcopy(past)
        chosen = [int(self._first_logits(past).argmax())]
        while len(chosen) < prompt.CONTINUATION_TOKENS:
            ids = torch.tensor([chosen[-1:]])
            logits = self._model(ids, **passed_cache(self._model, past), logits_to_keep=1).logits
            chosen.append(int(logits[0, -1].argmax()))
        return chosen

    def _distributions(self, past: Any, continuation: list[int]) -> Any:
        """Log-probabilities [CONTINUATION_TOKENS, vocabulary] of each next token, given the reference's tokens."""
        exact = DynamicCache()
        for index, layer in enumerate(past.layers):
            exact.update(layer.keys.float(), layer.values.float(), index)
        ids = self._tokens[exact.get_seq_length() :] + continuation[:-1]
        logits = self._model_float32(
            torch.tensor([ids]), **passed_cache(self._model_float32, exact), logits_to_keep=prompt.CONTINUATION_TOKENS
        ).logits[0]
        return logits.double().log_softmax(-1)

    def _timings(self) -> dict[str, float]:
        """Median seconds from the question to the first token: all computed, or fetched and the rest computed."""
        seconds: dict[str, list[float]] = {name: [] for name in ("recompute", *STORED_AS)}
        for number in range(ROUNDS):
            progress(f"decode: timing, round {number + 1} of {ROUNDS}")
            for name, found in seconds.items():
                began = time.perf_counter()
                if name == "recompute":
                    self._model(torch.tensor([self._tokens]), use_cache=True, logits_to_keep=1).logits.argmax()
                else:
                    kv, tokens, _ = self._get(name)
                    past = cache_from_kv(kv, tokens, model_or_config=self._model) if tokens else DynamicCache()
                    self._first_logits(past).argmax()
                found.append(time.perf_counter() - began)
        return {name: statistics.median(found) for name, found in seconds.items()}


def _digest(kv: Any) -> str:
    return hashlib.blake2b(kv.tobytes(), digest_size=16).hexdigest()


def _common_prefix(expected: list[int], got: list[int]) -> int:
    differing = (index for index, pair in enumerate(zip(expected, got, strict=True)) if pair[0] != pair[1])
    return next(differing, len(expected))


def _mean_kl(reference: Any, other: Any) -> float:
    return float((reference.exp() * (reference - other)).sum(-1).mean())


def start(targets: Sequence[str], cache: Path) -> Mapping[str, Callable[[], dict[str, Any]]]:
    """`targets`: the sidecar, and the node upstream of it."""
    sidecar, node = targets
    decoder = Decoder(sidecar, node, cache)
    return {
        "compute_live": decoder.compute_live, "follow_live": decoder.follow_live, "measure": decoder.measure,
        "get_all": decoder.get_all, "get_while_down": decoder.get_while_down,
    }  # fmt: skip


if __name__ == "__main__":
    serve(start)
