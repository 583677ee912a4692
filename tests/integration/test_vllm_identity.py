"""Adapters, salts, content, weights and settings in one node: the same tokens under each are bytes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from node_process import NodeProcess
from polling import wait_until
from prometheus_client import CollectorRegistry

from kvstore_client import Client
from kvstore_client.integrations.vllm.config import ConnectorConfig
from kvstore_client.integrations.vllm.identity import EngineFacts, Namespaces, RequestKey, layout_of
from kvstore_client.integrations.vllm.metrics import ConnectorMetrics
from kvstore_client.integrations.vllm.work import Load, Save
from kvstore_client.integrations.vllm.worker import WorkerSide

TOKENS = np.arange(500, 628, dtype=np.uint32)
CHUNK, PAGE, LAYERS, HEADS, DIM = 64, 16, 2, 2, 32
BLOCKS = tuple(range(1, 1 + len(TOKENS) // PAGE))


def weights(folder: Path, content: bytes) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(content)
    return str(folder)


def facts(model: str, **changes: Any) -> EngineFacts:
    rope = SimpleNamespace(model_type="llama", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    return replace(
        EngineFacts(model, None, "auto", "bfloat16", rope, {"quantization": None}, LAYERS, HEADS, DIM), **changes
    )


def key(**changes: Any) -> RequestKey:
    """Of a request as vLLM's scheduler has it."""
    plain: dict[str, Any] = {
        "prompt_token_ids": TOKENS.tolist(), "prompt_embeds": None, "resumable": False, "lora_request": None,
        "cache_salt": None, "mm_features": [],
    }  # fmt: skip
    made = RequestKey.of(SimpleNamespace(**{**plain, **changes}))
    assert made is not None
    return made


class Engine:
    def __init__(self, client: Client, of: EngineFacts, head_groups: int = 1, seed: int = 0) -> None:
        layout = layout_of(of, chunk_tokens=CHUNK, revision=None, head_groups=head_groups)
        generator = np.random.default_rng(seed)
        size = (2 * len(BLOCKS), PAGE, HEADS, DIM)
        dtype = ml_dtypes.bfloat16 if of.dtype == "bfloat16" else np.dtype(of.dtype)
        self.caches = [
            tuple(generator.standard_normal(size).astype(dtype) for _ in range(2)) for _ in range(LAYERS)
        ]  # fmt: skip
        self.namespaces = Namespaces(client, layout)
        config = ConnectorConfig("127.0.0.1:1", chunk_tokens=CHUNK)
        self.worker = WorkerSide(config, self.namespaces, ConnectorMetrics(CollectorRegistry()), self.caches)  # type: ignore[arg-type]

    def kv(self) -> list[npt.NDArray[Any]]:
        return [plane[list(BLOCKS)].copy() for pair in self.caches for plane in pair]

    def save(self, whose: RequestKey) -> None:
        self.worker.save(Save("r", whose, TOKENS, 0, BLOCKS))
        wait_until(lambda: not self.worker.saving, "it is saved", deadline_s=30)

    def load(self, whose: RequestKey) -> set[int]:
        """The blocks that did not come."""
        for pair in self.caches:
            for plane in pair:
                plane[...] = 0
        self.worker.load(Load("r", whose, TOKENS, 0, BLOCKS))
        wait_until(lambda: bool(self.worker.finished_loads()), "the load is over", deadline_s=30)
        return self.worker.failed_blocks()


@pytest.fixture
def client(node: NodeProcess) -> Iterator[Client]:
    with Client(node.address, registry=CollectorRegistry()) as client:
        yield client


def test_nothing_that_decides_kv_shares_a_byte(client: Client, tmp_path: Path) -> None:
    """Each identity finds nothing before it has stored, and its own KV afterwards, whatever else is there."""
    model = weights(tmp_path / "1" / "model", b"weights")
    adapters = [
        SimpleNamespace(lora_name=name, lora_path=weights(tmp_path / f"{name}-{number}", content))
        for name, number, content in (("a", 1, b"one"), ("a", 2, b"two"), ("b", 1, b"one"))
    ]
    image = {
        name: SimpleNamespace(mm_position=SimpleNamespace(offset=7, length=4), identifier=name)
        for name in ("cat", "dog")
    }
    keys = [
        key(), *(key(lora_request=adapter) for adapter in adapters), key(cache_salt="x"), key(cache_salt="y"),
        key(cache_salt="x", lora_request=adapters[0]), key(mm_features=[image["cat"]]), key(mm_features=[image["dog"]]),
    ]  # fmt: skip
    engines = [
        facts(model),
        facts(weights(tmp_path / "2" / "model", b"other")),  # another revision of the same name
        facts(model, dtype="float16"),
        facts(model, overrides={"quantization": "fp8"}),
    ]
    alike = [(each, whose, 1) for each in engines for whose in keys] + [(engines[0], keys[0], 2)]
    stored: list[tuple[Engine, RequestKey, list[npt.NDArray[Any]]]] = []
    for number, (of, whose, head_groups) in enumerate(alike):
        engine = Engine(client, of, head_groups, seed=number)
        kv = engine.kv()
        engine.save(whose)
        stored.append((engine, whose, kv))
        assert client.stat().objects == (number + 1) * 2 + (head_groups - 1) * 2, "two chunks of its own"
    for engine, whose, kv in stored:
        assert engine.load(whose) == set()
        for found, wanted in zip(engine.kv(), kv, strict=True):
            assert np.array_equal(found.view(np.uint16), wanted.view(np.uint16))


def test_an_identity_that_nobody_stored_gets_nothing(client: Client, tmp_path: Path) -> None:
    model = weights(tmp_path / "model", b"weights")
    adapter = SimpleNamespace(lora_name="a", lora_path=weights(tmp_path / "a", b"one"))
    engine = Engine(client, facts(model))
    engine.save(key())
    engine.save(key(cache_salt="x", lora_request=adapter))
    for whose in (key(lora_request=adapter), key(cache_salt="x"), key(cache_salt="X", lora_request=adapter)):
        assert engine.load(whose) == set(BLOCKS)
        assert not any(plane.any() for plane in engine.kv())
    Path(adapter.lora_path, "adapter_model.safetensors").write_bytes(b"trained on")
    assert engine.load(key(cache_salt="x", lora_request=adapter)) == set(BLOCKS)
