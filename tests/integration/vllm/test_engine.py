"""kvstore's connector in real vLLM engines (SmolLM2, CPU), separate processes around a real node.

Tokens are compared with those of the engine's own prefix cache at the same block size: recomputing a whole prompt in
one step rounds otherwise than computing its end on a cached prefix, and near-ties fall the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from node_process import NodeProcess
from polling import wait_until
from relay import Relay
from smollm2 import CACHE, TEXT
from transformers import AutoTokenizer
from vllm_engine import BLOCK_TOKENS, EngineProcess, kv_transfer

from kvstore.demo import model
from kvstore_client import Client

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

NEW_TOKENS = 24
StartEngine = Callable[..., EngineProcess]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Two of 1,600 and 700 tokens that share none."""
    tokenizer = AutoTokenizer.from_pretrained(model.model_folder(CACHE))
    tokens = tokenizer(TEXT * 4).input_ids
    return [tokens[:1600], tokens[900:1600]]


@pytest.fixture
def start_engine(tmp_path: Path) -> Iterator[StartEngine]:
    started: list[EngineProcess] = []

    def start(transfer: dict[str, Any] | None, **arguments: Any) -> EngineProcess:
        started.append(EngineProcess(tmp_path / f"engine-{len(started)}.log", transfer, **arguments))
        return started[-1]

    yield start
    for engine in started:
        engine.kill()


def whole_blocks(tokens: int) -> int:
    """Of a prompt of so many tokens, those that a prefix cache can give: all but the last, in whole blocks."""
    return (tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def test_what_one_engine_prefills_another_decodes(
    tmp_path: Path, start_engine: StartEngine, prompts: list[list[int]]
) -> None:
    node = NodeProcess(tmp_path)
    try:
        writer = start_engine(kv_transfer(node.address, role="kv_producer"))
        first = writer.generate(prompts, 1)
        assert first["cached"] == [0, 0]
        writer.wait_saved(sum(len(prompt) // BLOCK_TOKENS * BLOCK_TOKENS for prompt in prompts))
        native = writer.generate(prompts, NEW_TOKENS)
        assert native["cached"] == [whole_blocks(len(prompt)) for prompt in prompts]
        assert writer.stop() == 0

        reader = start_engine(kv_transfer(node.address, role="kv_consumer"))
        loaded = reader.generate(prompts, NEW_TOKENS)
        assert loaded["cached"] == native["cached"]
        assert loaded["tokens"] == native["tokens"]
        salted = reader.generate(prompts[1:], 1, ["somebody else's"])
        assert salted["cached"] == [0]
        counters = reader.counters()
        assert counters["kvstore_vllm_loads_total{whole}"] == 2
        assert counters["kvstore_vllm_tokens_total{load}"] == sum(native["cached"])
        assert "kvstore_vllm_tokens_total{save}" not in counters

        # A node that is gone: the engine's own cache is forgotten, so everything is computed, and is right.
        node.kill()
        reader.reset()
        alone = reader.generate(prompts[1:], NEW_TOKENS)
        assert alone["cached"] == [0]
        assert alone["reasons"] == ["length"]
        assert reader.counters()["kvstore_vllm_loads_total{whole}"] == 2
        assert reader.stop() == 0
    finally:
        node.kill()


def test_a_node_that_dies_during_a_load_costs_time_not_tokens(
    tmp_path: Path, start_engine: StartEngine, prompts: list[list[int]]
) -> None:
    """Its answers trickle, so that it dies when a part has come: that part is used, the rest computed."""
    node = NodeProcess(tmp_path)
    relay = Relay(int(node.address.rpartition(":")[2]))
    try:
        prompt = prompts[0]
        engine = start_engine(
            kv_transfer(relay.address, transport="grpc", lookup_s=10.0, deadline_s=120.0, planner=False)
        )  # fmt: skip
        first = engine.generate([prompt], NEW_TOKENS)
        engine.wait_saved(len(prompt) // BLOCK_TOKENS * BLOCK_TOKENS)
        engine.reset()
        relay.slow_down(1 << 16, 0.05)
        engine.send([prompt], NEW_TOKENS)
        with Client(node.address, transport="grpc") as client:
            wait_until(
                lambda: client.stat().counters.get("reads.host", 0) > 3, "the load is under way", deadline_s=60
            )  # fmt: skip
        node.kill()
        relay.close()
        interrupted = engine.answer()
        assert interrupted["reasons"] == ["length"]
        assert interrupted["tokens"] == first["tokens"]
        counters = engine.counters()
        assert counters.get("kvstore_vllm_loads_total{whole}", 0) == 0
        assert (
            counters.get("kvstore_vllm_loads_total{part}", 0) + counters.get("kvstore_vllm_loads_total{failed}", 0) == 1
        )
        assert engine.stop() == 0
    finally:
        relay.close()
        node.kill()
