"""Engines of one worker and of two (gloo, a process each) read each other's chunks: a small Llama, four KV heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from node_process import NodeProcess
from polling import wait_until
from relay import Relay
from tiny_checkpoint import save
from vllm_engine import BLOCK_TOKENS, EngineProcess, kv_transfer

from kvstore_client import Client

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

NEW_TOKENS = 16
PROMPT_TOKENS = 5 * BLOCK_TOKENS + 20
HEAD_GROUPS = 2
WHOLE_CHUNKS = PROMPT_TOKENS // BLOCK_TOKENS


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(
        tmp_path_factory.mktemp("model"), hidden_size=256, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096,
    )  # fmt: skip


@pytest.fixture
def start_engine(tmp_path: Path, model_folder: Path) -> Iterator[Callable[..., EngineProcess]]:
    started: list[EngineProcess] = []

    def start(address: str, workers: int, **extra: Any) -> EngineProcess:
        # Without a planner: so small a model is computed sooner than its KV is loaded.
        transfer = kv_transfer(address, head_groups=HEAD_GROUPS, planner=False, **extra)
        started.append(EngineProcess(
            tmp_path / f"engine-{len(started)}.log", transfer, model=str(model_folder), tensor_parallel_size=workers,
            dtype="float32",
        ))  # fmt: skip
        return started[-1]

    yield start
    for engine in started:
        engine.kill()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    node = NodeProcess(tmp_path)
    yield node
    node.kill()


def prompt(seed: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(3, 250, PROMPT_TOKENS).tolist()
    return tokens


def test_one_worker_and_two_read_each_others_chunks(
    node: NodeProcess, start_engine: Callable[..., EngineProcess]
) -> None:
    one, two = start_engine(node.address, 1), start_engine(node.address, 2)
    with Client(node.address, transport="grpc") as client:
        for number, (writer, reader) in enumerate(((two, one), (one, two))):
            asked = [prompt(number)]
            assert writer.generate(asked, 1)["cached"] == [0]
            wait_stored(client, number + 1)
            native = writer.generate(asked, NEW_TOKENS)
            loaded = reader.generate(asked, NEW_TOKENS)
            assert loaded["cached"] == native["cached"] == [WHOLE_CHUNKS * BLOCK_TOKENS]
            assert loaded["tokens"] == native["tokens"]
    for engine in (one, two):
        assert engine.counters()["kvstore_vllm_lookups_total{hit}"] == 2  # of what it wrote, and of what it read
        assert engine.stop() == 0


def test_a_node_that_dies_in_a_load_of_two_workers_costs_no_tokens(
    node: NodeProcess, start_engine: Callable[..., EngineProcess]
) -> None:
    """Each worker reports what it lacks in a step of its own; the engine computes it, and goes on."""
    relay = Relay(int(node.address.rpartition(":")[2]))
    try:
        engine = start_engine(relay.address, 2, transport="grpc", lookup_s=10.0, deadline_s=60.0)
        asked = [prompt(7)]
        want = engine.generate(asked, NEW_TOKENS)
        with Client(node.address, transport="grpc") as client:
            wait_stored(client, 1)
            engine.reset()
            relay.slow_down(1 << 14, 0.05)
            engine.send(asked, NEW_TOKENS)
            wait_until(lambda: client.stat().counters.get("reads.host", 0) > 3, "the load is under way", deadline_s=60)
        node.kill()
        relay.close()
        got = engine.answer()
        assert got["reasons"] == ["length"]
        assert got["tokens"] == want["tokens"]
        again = engine.generate(asked, NEW_TOKENS)
        assert again["tokens"] == want["tokens"]
        assert engine.stop() == 0
    finally:
        relay.close()


def wait_stored(client: Client, prompts: int) -> None:
    """Until both workers' halves of so many prompts are in the node."""
    objects = prompts * WHOLE_CHUNKS * HEAD_GROUPS
    wait_until(lambda: client.stat().objects == objects, f"{objects} objects are stored", deadline_s=60)
