"""An engine, its sidecar over shared memory, a node upstream: what a restart of each costs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from node_process import NodeProcess
from polling import wait_until
from smollm2 import CACHE, TEXT
from transformers import AutoTokenizer
from vllm_engine import BLOCK_TOKENS, EngineProcess, kv_transfer

from kvstore.demo import model
from kvstore_client import Client

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1500)]

PROMPT_TOKENS, NEW_TOKENS = 7 * BLOCK_TOKENS + 50, 16
HELD = 7 * BLOCK_TOKENS


@pytest.fixture
def prompts() -> list[list[int]]:
    tokens = AutoTokenizer.from_pretrained(model.model_folder(CACHE))(TEXT * 5).input_ids
    return [tokens[300 * number : 300 * number + PROMPT_TOKENS] for number in range(2)]


@pytest.fixture
def ending() -> Iterator[list[NodeProcess | EngineProcess]]:
    started: list[NodeProcess | EngineProcess] = []
    yield started
    for each in reversed(started):
        each.kill()


def test_restarts_of_engine_and_sidecar(
    tmp_path: Path, prompts: list[list[int]], ending: list[NodeProcess | EngineProcess]
) -> None:
    node = NodeProcess(tmp_path, "--host-capacity", "1GiB")
    ending.append(node)

    def start_sidecar() -> NodeProcess:
        ending.append(
            NodeProcess(
                tmp_path, "--upstream", node.address, "--upstream-timeout-ms", "5000", "--host-capacity", "1GiB",
                "--disk-path", str(tmp_path / "disk"), "--disk-capacity", "1GiB",
                listen=f"unix:{tmp_path}/sidecar.sock", role="sidecar",
            )
        )  # fmt: skip
        return ending[-1]  # type: ignore[return-value]

    def start_engine(name: str, address: str) -> EngineProcess:
        ending.append(EngineProcess(tmp_path / f"{name}.log", kv_transfer(address, transport="shm", lookup_s=10.0)))
        return ending[-1]  # type: ignore[return-value]

    sidecar = start_sidecar()
    first = start_engine("first", sidecar.address)
    cold = first.generate(prompts[:1], NEW_TOKENS)
    assert cold["cached"] == [0]
    first.wait_saved(HELD)
    native = first.generate(prompts[:1], NEW_TOKENS)
    with Client(node.address) as upstream:
        wait_until(
            lambda: upstream.stat().objects >= HELD // BLOCK_TOKENS, "the sidecar has written through", deadline_s=30
        )

    # The engine dies. The sidecar has what it saved, and needs nobody for it.
    first.kill()
    node.kill()
    second = start_engine("second", sidecar.address)
    warm = second.generate(prompts[:1], NEW_TOKENS)
    assert warm["cached"] == [HELD]
    assert warm["tokens"] == native["tokens"]

    # The sidecar is away: the engine computes. It is back, with what its disk holds: the engine loads, and saves.
    assert sidecar.stop() == 0
    second.reset()
    away = second.generate(prompts, NEW_TOKENS)
    assert away["cached"] == [0, 0]
    assert away["reasons"] == ["length", "length"]
    sidecar = start_sidecar()

    def loads_again() -> bool:
        second.reset()
        answer = second.generate(prompts[:1], NEW_TOKENS)
        assert answer["tokens"] == native["tokens"] or answer["cached"] == [0]
        return bool(answer["cached"] == [HELD])

    wait_until(loads_again, "it loads from the sidecar that is back", deadline_s=60)
    saved = second.counters()["kvstore_vllm_tokens_total{save}"]
    second.generate(prompts[1:], 1, ["to be saved"])
    second.wait_saved(int(saved) + HELD)
    assert second.stop() == 0
