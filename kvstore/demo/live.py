"""Layer streaming: a prefill hands on each layer when it has computed it, and the decode step in another process takes
it in while the prefill goes on.

Times are of the machine's monotonic clock, which its processes share.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from kvstore.demo import prompt
from kvstore_client import Client, Extras, KVLayout, Namespace
from kvstore_client.integrations.transformers import FollowingCache, WritingCache, passed_cache

CHUNKS = 2
DEADLINE_S = 120.0  # for one layer: of the slowest machine that the demo is to run on
QUALITY = "lossless"


def streamed_part(tokens: list[int]) -> list[int]:
    """The beginning of the prompt that is streamed: some whole chunks, and a token that the decode step computes."""
    return tokens[: CHUNKS * prompt.CHUNK_TOKENS + 1]


def store_of(client: Client, layout: KVLayout) -> Namespace:
    return client.namespace(layout, extras=Extras(salt="demo live"))


class TimedWriter:
    """A writer, and when each layer was handed to it."""

    def __init__(self, writer: Any) -> None:
        self._writer, self.times = writer, list[float]()

    def write(self, layer: int, k: Any, v: Any) -> None:
        self.times.append(time.monotonic())
        self._writer.write(layer, k, v)


class TimedStream:
    """A stream, and when each layer was taken out of it."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.times = stream, list[float]()

    @property
    def reason(self) -> str:
        reason: str = self._stream.reason
        return reason

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        layer = next(self._stream)
        self.times.append(time.monotonic())
        return layer


def write(model: Any, store: Namespace, tokens: list[int]) -> dict[str, Any]:
    """The prefill's side: when it began, when each layer was written and when it had computed."""
    began = time.monotonic()
    with store.writer(tokens, quality=QUALITY, deadline=DEADLINE_S) as writer:
        timed = TimedWriter(writer)
        model(torch.tensor([tokens]), **passed_cache(model, WritingCache(timed)), logits_to_keep=1)
        computed = time.monotonic()
    return {"prompt_tokens": len(tokens), "began": began, "layers": timed.times, "computed": computed}


def follow(model: Any, store: Namespace, tokens: list[int]) -> tuple[dict[str, Any], Any]:
    """(when each layer came and when the first token was there, that token's logits). It waits for the prefill."""
    stream = TimedStream(store.stream(tokens, wait=DEADLINE_S, min_quality=QUALITY, deadline=DEADLINE_S))
    cache = FollowingCache(stream, len(tokens) - 1)
    restored = cache.get_seq_length()
    ids = torch.tensor([tokens[restored:]])
    logits = model(ids, **passed_cache(model, cache), logits_to_keep=1).logits[0, -1]
    logits.argmax()
    return {"tokens": restored, "layers": stream.times, "first_token": time.monotonic()}, logits


def account(written: dict[str, Any], followed: dict[str, Any]) -> dict[str, Any]:
    """Both sides in seconds from the beginning of the prefill."""
    began = written["began"]
    return {
        "prompt_tokens": written["prompt_tokens"],
        "tokens": followed["tokens"],
        "same_logits": followed["same_logits"],
        "layers_written_seconds": [at - began for at in written["layers"]],
        "layers_taken_seconds": [at - began for at in followed["layers"]],
        "prefill_seconds": written["computed"] - began,
        "first_token_seconds": followed["first_token"] - began,
    }


def in_words(live: dict[str, Any]) -> str:
    """An account on one line."""
    taken, written = live["layers_taken_seconds"], live["layers_written_seconds"]
    if not taken:
        return "no layer came"
    return (
        f"layer 1 of {len(written)} taken in at {taken[0]:.2f} s, the last one written at {written[-1]:.2f} s, "
        f"first token at {live['first_token_seconds']:.2f} s"
    )


def problems(live: dict[str, Any]) -> list[str]:
    """What did not hold of an account, one line each."""
    found = []
    if live["tokens"] != CHUNKS * prompt.CHUNK_TOKENS:
        found.append(f"streaming: {live['tokens']} tokens were taken in")
    if not live["same_logits"]:
        found.append("streaming: other logits than without the store")
    taken, written = live["layers_taken_seconds"], live["layers_written_seconds"]
    if not taken or len(taken) != len(written) or taken[0] >= written[-1]:
        found.append("streaming: no layer was taken in before the prefill had written its last")
    return found
