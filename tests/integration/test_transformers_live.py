"""A real model's prefill is followed while it computes: the decode step gets the very same logits."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from node_process import NodeProcess
from prometheus_client import CollectorRegistry
from smollm2 import TEXT

from kvstore_client import Client, InvalidArgument, Unavailable
from kvstore_client.integrations.transformers import (
    FollowingCache,
    WritingCache,
    cache_from_kv,
    layout_for,
    passed_cache,
    returned_cache,
)

pytestmark = pytest.mark.model
StartNode = Callable[..., NodeProcess]
CHUNK = 128
DEADLINE_S = 60.0


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_a_decode_step_computes_while_its_prefill_is_written(smollm2: tuple[Any, Any], start_node: StartNode) -> None:
    model, tokenizer = smollm2
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, : 3 * CHUNK + 10]
    tokens = ids[0].tolist()
    stored = len(tokens) // CHUNK * CHUNK
    past = returned_cache(model(ids, use_cache=True))
    past.crop(stored - len(tokens))
    expected = model(ids[:, stored:], **passed_cache(model, past)).logits

    def prefill(cache: Any, first_token: int = 0, past: Any = None) -> None:
        with cache.writer(tokens, quality="lossless", first_token=first_token) as writer:
            following = WritingCache(writer, past)
            model(ids[:, first_token:], **passed_cache(model, following))
            model(ids[:, :1], **passed_cache(model, following))  # what comes after the prefill is not written
        assert writer.result.tokens == stored

    def decode(cache: Any) -> torch.Tensor:
        following = FollowingCache(cache.stream(tokens, wait=DEADLINE_S), len(tokens) - 1)
        assert following.get_seq_length() == stored
        return model(ids[:, stored:], **passed_cache(model, following)).logits

    node = start_node("--host-capacity", "256MiB")
    with (
        Client(node.address, deadline=DEADLINE_S, strict=True, registry=CollectorRegistry()) as client,
        ThreadPoolExecutor(1) as threads,
    ):
        cache = client.namespace(layout_for(model, chunk_tokens=CHUNK))
        decoding = threads.submit(decode, cache)
        prefill(cache)
        assert torch.equal(decoding.result(), expected)

        kv, n = cache.get(tokens[:CHUNK])
        cache.delete(tokens)
        cache.put(tokens[:CHUNK], kv, quality="lossless")
        decoding = threads.submit(decode, cache)
        prefill(cache, CHUNK, cache_from_kv(kv, n, model_or_config=model))
        # A prefill on top of a cached prefix sums in another order than one of everything, so the bits may differ.
        torch.testing.assert_close(decoding.result(), expected, rtol=0.1, atol=0.5)


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_a_decode_step_without_a_writer_or_with_one_that_dies(smollm2: tuple[Any, Any], start_node: StartNode) -> None:
    model, tokenizer = smollm2
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, : CHUNK + 1]
    tokens = ids[0].tolist()
    node = start_node()
    with Client(node.address, deadline=DEADLINE_S, registry=CollectorRegistry()) as client:
        cache = client.namespace(layout_for(model, chunk_tokens=CHUNK))
        empty = FollowingCache(cache.stream(tokens), len(tokens) - 1)
        assert empty.get_seq_length() == 0
        computed = model(ids, **passed_cache(model, empty)).logits
        assert torch.equal(computed, model(ids, use_cache=True).logits)

        writer = cache.writer(tokens)

        def die() -> None:
            with writer:
                k = v = torch.zeros(CHUNK + 1, 3, 64, dtype=torch.bfloat16)
                for layer in range(2):
                    writer.write(layer, k, v)
                following.append(FollowingCache(cache.stream(tokens, wait=DEADLINE_S), len(tokens) - 1))
                raise KeyError("the engine gave up")

        following: list[Any] = []
        with pytest.raises(KeyError):
            die()
        with pytest.raises(Unavailable, match="aborted"):
            model(ids[:, CHUNK:], **passed_cache(model, following[0]))
        with pytest.raises(InvalidArgument, match="batch"), cache.writer(tokens) as batch:
            model(ids.expand(2, -1), **passed_cache(model, WritingCache(batch)))
