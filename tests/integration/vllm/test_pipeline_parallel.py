"""Engines of one pipeline stage and of two (a process each) read each other's chunks of SmolLM2's KV."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from disk_places import place_of
from node_process import NodeProcess
from polling import wait_until
from relay import Relay
from tiny_checkpoint import save
from vllm_engine import BLOCK_TOKENS, EngineProcess, kv_transfer

import kvstore_codec as codec
from kvstore.index.entry import ObjectKey
from kvstore.tiers.disk_index import IndexFile
from kvstore_client import Client

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

NEW_TOKENS = 16
WHOLE_CHUNKS = 5
PROMPT_TOKENS = WHOLE_CHUNKS * BLOCK_TOKENS + 20
LAYER_GROUPS = 2
#: vLLM 0.32's worker for the CPU makes the memory for what a stage gets from the one before only where it warms up, and
#: that only where it compiles. With this it traces the model, and computes what it computes without.
TRACED: dict[str, Any] = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}


@pytest.fixture
def start_engine(tmp_path: Path) -> Iterator[Callable[..., EngineProcess]]:
    started: list[EngineProcess] = []

    def start(
        address: str, stages: int, settings: Mapping[str, Any] = MappingProxyType({}), **extra: Any
    ) -> EngineProcess:  # fmt: skip
        # Without a planner and with patience: what is tested is what is loaded, on a busy machine too.
        patience: dict[str, Any] = {"planner": False, "lookup_s": 10.0, "deadline_s": 60.0}
        transfer = kv_transfer(address, layer_groups=LAYER_GROUPS, **patience, **extra)
        log = tmp_path / f"engine-{len(started)}.log"
        started.append(EngineProcess(log, transfer, pipeline_parallel_size=stages, **TRACED, **settings))
        return started[-1]

    yield start
    for engine in started:
        engine.kill()


def prompt(seed: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(1000, 40000, PROMPT_TOKENS).tolist()
    return tokens


def test_one_stage_and_two_read_each_others_chunks(tmp_path: Path, start_engine: Callable[..., EngineProcess]) -> None:
    node = NodeProcess(tmp_path)
    try:
        one, two = start_engine(node.address, 1), start_engine(node.address, 2)
        with Client(node.address, transport="grpc", deadline=30.0) as client:
            for number, (writer, reader) in enumerate(((two, one), (one, two))):
                asked = [prompt(number)]
                assert writer.generate(asked, 1)["cached"] == [0]
                wait_stored(client, number + 1)
                native = writer.generate(asked, NEW_TOKENS)
                loaded = reader.generate(asked, NEW_TOKENS)
                assert loaded["cached"] == native["cached"] == [WHOLE_CHUNKS * BLOCK_TOKENS]
                assert loaded["tokens"] == native["tokens"]
            several = [prompt(seed) for seed in range(10, 14)]  # in the pipeline at the same time
            native = one.generate(several, NEW_TOKENS)
            wait_stored(client, 2 + len(several))
            loaded = two.generate(several, NEW_TOKENS)
            assert loaded["cached"] == [WHOLE_CHUNKS * BLOCK_TOKENS] * len(several)
            one.reset()
            assert one.generate(several, NEW_TOKENS)["tokens"] == loaded["tokens"]
        for engine in (one, two):
            assert engine.stop() == 0
    finally:
        node.kill()


def test_two_stages_of_two_tensor_parallel_workers(tmp_path: Path, start_engine: Callable[..., EngineProcess]) -> None:
    """Each of the four has a quarter of a chunk; SmolLM2's three KV heads do not halve, so it is a small Llama."""
    folder = tmp_path / "model"
    folder.mkdir()
    model = save(
        folder, hidden_size=256, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=4096,
    )  # fmt: skip
    node = NodeProcess(tmp_path)
    try:
        settings: dict[str, Any] = {"model": str(model), "dtype": "float32"}
        four = start_engine(node.address, 2, settings={**settings, "tensor_parallel_size": 2}, head_groups=2)
        one = start_engine(node.address, 1, settings=settings, head_groups=2)
        with Client(node.address, transport="grpc", deadline=30.0) as client:
            for number, (writer, reader) in enumerate(((four, one), (one, four))):
                asked = [[token % 250 + 3 for token in prompt(number)]]
                assert writer.generate(asked, 1)["cached"] == [0]
                wait_stored(client, 2 * (number + 1))  # halves of heads as well
                native = writer.generate(asked, NEW_TOKENS)
                loaded = reader.generate(asked, NEW_TOKENS)
                assert loaded["cached"] == native["cached"] == [WHOLE_CHUNKS * BLOCK_TOKENS]
                assert loaded["tokens"] == native["tokens"]
        for engine in (four, one):
            assert engine.stop() == 0
    finally:
        node.kill()


def test_a_chunk_that_one_stage_lacks_is_computed_by_both(
    tmp_path: Path, start_engine: Callable[..., EngineProcess]
) -> None:
    """The node promises it, and finds the second stage's part damaged when that is read; the first stage's is whole."""
    disk = tmp_path / "disk"
    node = NodeProcess(tmp_path, "--disk-path", str(disk))
    try:
        engine = start_engine(node.address, 2)
        asked = [prompt(20)]
        assert engine.generate(asked, 1)["cached"] == [0]
        with Client(node.address, transport="grpc", deadline=30.0) as client:
            wait_stored(client, 1)
        want = engine.generate(asked, NEW_TOKENS)  # from its own cache
        assert want["cached"] == [WHOLE_CHUNKS * BLOCK_TOKENS]
        assert node.stop() == 0
        place_of(disk, part_of_chunk(disk, chunk=2, part=1)).flip(2000, 3)
        node = NodeProcess(tmp_path, "--disk-path", str(disk), listen=node.address)
        assert engine.reset()
        got = engine.generate(asked, NEW_TOKENS)
        assert got["tokens"] == want["tokens"]
        with Client(node.address, transport="grpc", deadline=30.0) as client:
            wait_stored(client, 1)  # the second stage has saved its part anew
        assert engine.reset()
        again = engine.generate(asked, NEW_TOKENS)
        assert (again["cached"], again["tokens"]) == (want["cached"], want["tokens"])
        assert engine.log().count("Recovered from KV load failure") == 1
        assert engine.stop() == 0
    finally:
        node.kill()


def test_a_node_that_dies_in_a_load_of_two_stages_costs_no_tokens(
    tmp_path: Path, start_engine: Callable[..., EngineProcess]
) -> None:
    node = NodeProcess(tmp_path)
    relay = Relay(int(node.address.rpartition(":")[2]))
    try:
        engine = start_engine(relay.address, 2, transport="grpc")
        asked = [prompt(7)]
        engine.generate(asked, 1)
        with Client(node.address, transport="grpc", deadline=30.0) as client:
            wait_stored(client, 1)
            want = engine.generate(asked, NEW_TOKENS)
            assert engine.reset()
            relay.slow_down(1 << 14, 0.05)
            engine.send(asked, NEW_TOKENS)
            wait_until(lambda: client.stat().counters.get("reads.host", 0) > 3, "the load is under way", deadline_s=60)
        node.kill()
        relay.close()
        got = engine.answer()
        assert got["reasons"] == ["length"]
        assert got["tokens"] == want["tokens"]
        assert engine.generate(asked, NEW_TOKENS)["tokens"] == want["tokens"]
        assert engine.stop() == 0
    finally:
        relay.close()
        node.kill()


def wait_stored(client: Client, prompts: int) -> None:
    """Until both stages' halves of so many prompts are in the node."""
    objects = prompts * WHOLE_CHUNKS * LAYER_GROUPS
    wait_until(lambda: client.stat().objects == objects, f"{objects} objects are stored", deadline_s=60)


def part_of_chunk(root: Path, *, chunk: int, part: int) -> ObjectKey:
    """Of the one prompt that is stored."""
    index = IndexFile(root / "index")
    try:
        loaded, _ = index.load()
        contents = [index.read(slot) for slot in loaded.slots.tolist()]
    finally:
        index.close()
    headers = [codec.parse_header(content.header_bytes) for content in contents if content is not None]
    assert len(headers) == WHOLE_CHUNKS * LAYER_GROUPS
    (found,) = [each for each in headers if (each.first_position, each.part) == (chunk * BLOCK_TOKENS, part)]
    return ObjectKey(found.namespace_id, found.chunk_hash, found.part)
