"""Load or compute in a real engine: over a link on which loading takes longer, and over one on which it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from node_process import NodeProcess
from shaped_relay import ShapedRelay
from smollm2 import CACHE, TEXT
from transformers import AutoTokenizer
from vllm_engine import BLOCK_TOKENS, EngineProcess, kv_transfer

from kvstore.demo import model
from kvstore_client import Client

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

NEW_TOKENS = 8
#: A prompt's KV is tens of megabytes, and takes this link longer than any prefill of it.
SLOW_BYTES_PER_S = 5e5


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Four of 700 tokens that share none."""
    tokens = AutoTokenizer.from_pretrained(model.model_folder(CACHE))(TEXT * 4).input_ids
    return [tokens[first : first + 700] for first in range(0, 2800, 700)]


def whole(prompt: list[int]) -> int:
    """Tokens of a prompt's whole chunks."""
    return len(prompt) // BLOCK_TOKENS * BLOCK_TOKENS


def test_a_load_that_takes_longer_than_computing_is_not_made(tmp_path: Path, prompts: list[list[int]]) -> None:
    node = NodeProcess(tmp_path)
    link = ShapedRelay(int(node.address.rpartition(":")[2]), SLOW_BYTES_PER_S)
    engine = EngineProcess(
        tmp_path / "engine.log",
        kv_transfer(link.address, transport="grpc", lookup_s=10.0, deadline_s=120.0),
    )  # fmt: skip
    try:
        prompt = prompts[0]
        cold = engine.generate([prompt], NEW_TOKENS)
        engine.wait_saved(whole(prompt))
        with Client(node.address) as client:
            stored_bytes = client.stat().counters["stored_bytes"]
        loading_s = stored_bytes / SLOW_BYTES_PER_S
        sent_bytes = engine.counters()["kvstore_client_stream_bytes_total{out}"]
        assert cold["first_token_s"][0] < loading_s / 2, "this machine computes too slowly for this test"
        counters: dict[str, float] = {}
        tries = 0
        while not counters.get("kvstore_vllm_plans_total{compute}") and tries < 6:
            tries += 1
            engine.reset()
            again = engine.generate([prompt], NEW_TOKENS)
            assert again["tokens"] == cold["tokens"]
            assert again["first_token_s"][0] < loading_s
            counters = engine.counters()
        # A try that is given up in silence is a doubt, for longer each time: some later ones are not made.
        assert counters.get("kvstore_vllm_plans_total{compute}", 0) >= 1
        tried = sum(counters.get(f"kvstore_vllm_plans_total{{{choice}}}", 0) for choice in ("probe", "load", "part"))
        assert counters.get("kvstore_client_misses_total{slower}", 0) == tried
        assert counters.get("kvstore_vllm_loads_total{whole}", 0) == 0
        # What is computed although the node has it is not saved again; what a load did not bring is offered, not sent.
        engine.reset()
        assert engine.generate([prompt], NEW_TOKENS)["tokens"] == cold["tokens"]
        counters = engine.counters()
        engine.wait_saved(whole(prompt) * round(1 + counters["kvstore_vllm_loads_total{failed}"]))
        counters = engine.counters()
        assert counters["kvstore_vllm_saves_total{stored}"] == 1 + counters["kvstore_vllm_loads_total{failed}"]
        assert counters["kvstore_client_stream_bytes_total{out}"] == sent_bytes
        assert engine.stop() == 0
    finally:
        engine.kill()
        link.close()
        node.kill()


def test_a_load_that_is_faster_is_made(tmp_path: Path, prompts: list[list[int]]) -> None:
    node = NodeProcess(tmp_path)
    writer = EngineProcess(tmp_path / "writer.log", kv_transfer(node.address, role="kv_producer"))
    try:
        for prompt in prompts[:2]:
            writer.generate([prompt], 1)
        writer.wait_saved(sum(map(whole, prompts[:2])))
        native = [writer.generate([prompt], NEW_TOKENS) for prompt in prompts[:2]]
        assert writer.stop() == 0

        reader = EngineProcess(tmp_path / "reader.log", kv_transfer(node.address))
        try:
            first = reader.generate([prompts[0]], NEW_TOKENS)  # nothing was computed yet
            computed = reader.generate([prompts[2]], 1)
            second = reader.generate([prompts[1]], NEW_TOKENS)
            assert [first["tokens"], second["tokens"]] == [each["tokens"] for each in native]
            assert [first["cached"], second["cached"]] == [each["cached"] for each in native]
            assert second["first_token_s"][0] < computed["first_token_s"][0]
            counters = reader.counters()
            assert counters["kvstore_vllm_plans_total{probe}"] == 1
            assert counters["kvstore_vllm_plans_total{load}"] == 1
            assert counters["kvstore_vllm_loads_total{whole}"] == 2
            assert reader.stop() == 0
        finally:
            reader.kill()
    finally:
        writer.kill()
        node.kill()


def test_a_follow_up_turn_loads_only_what_is_new(tmp_path: Path, prompts: list[list[int]]) -> None:
    """Another engine has answered the turns in between."""
    node = NodeProcess(tmp_path)
    engines = [
        EngineProcess(tmp_path / f"{name}.log", kv_transfer(node.address, planner=False)) for name in ("one", "two")
    ]
    try:
        one, two = engines
        start, longer = prompts[0], prompts[0] + prompts[1]
        one.generate([start], 1)
        one.wait_saved(whole(start))
        two.generate([longer], 1)
        two.wait_saved(whole(longer) - whole(start))
        continued = one.generate([longer], NEW_TOKENS)
        assert continued["cached"] == [whole(longer[:-1])]
        counters = one.counters()
        assert counters["kvstore_client_tokens_total{hit}"] == whole(longer[:-1]) - whole(start)
        assert counters["kvstore_vllm_loads_total{whole}"] == 1
        assert continued["tokens"] == two.generate([longer], NEW_TOKENS)["tokens"]
        assert [engine.stop() for engine in engines] == [0, 0]
    finally:
        for engine in engines:
            engine.kill()
        node.kill()
