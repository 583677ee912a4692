"""Adapters and salts in a real engine: the same prompt under each is computed once and then loaded, each its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from node_process import NodeProcess
from polling import wait_until
from safetensors.torch import save_file
from tiny_checkpoint import save
from vllm_engine import BLOCK_TOKENS, EngineProcess, kv_transfer

from kvstore_client import Client

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

NEW_TOKENS, CHUNKS, LAYERS, HIDDEN, RANK = 12, 3, 4, 256, 8
PROMPT = np.random.default_rng(3).integers(3, 250, CHUNKS * BLOCK_TOKENS + 20).tolist()


def adapter(folder: Path, seed: int) -> Path:
    """Random LoRA weights of every layer's queries and values, as PEFT saves them."""
    folder.mkdir(parents=True)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 4 * RANK, "lora_dropout": 0.0,
        "bias": "none", "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_{side}.weight": 0.2
        * torch.randn((RANK, HIDDEN) if side == "A" else (HIDDEN, RANK), generator=generator)
        for layer in range(LAYERS) for name in "qv" for side in "AB"
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_two_adapters_and_two_salts_in_one_engine(tmp_path: Path) -> None:
    folder = save(
        tmp_path / "model", hidden_size=HIDDEN, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096,
    )  # fmt: skip
    one, two = (str(adapter(tmp_path / name, seed)) for seed, name in enumerate(("one", "two")))
    asked: list[dict[str, Any]] = [
        {}, {"adapter": ("a", one)}, {"adapter": ("a", two)}, {"salts": ["x"]}, {"salts": ["y"]},
        {"adapter": ("a", one), "salts": ["x"]},
    ]  # fmt: skip
    node = NodeProcess(tmp_path)
    engine = None
    try:
        engine = EngineProcess(
            tmp_path / "engine.log", kv_transfer(node.address, planner=False), model=str(folder), dtype="float32",
            enable_lora=True, max_loras=2, max_lora_rank=RANK,
        )  # fmt: skip
        native = []
        with Client(node.address, transport="grpc") as client:
            for number, whose in enumerate(asked):
                first = engine.generate([PROMPT], 1, **whose)
                assert first["cached"] == [0], f"{whose} found what another stored"
                objects = (number + 1) * CHUNKS
                wait_until(lambda n=objects: client.stat().objects == n, f"{objects} objects", deadline_s=60)  # type: ignore[misc]
                native.append(engine.generate([PROMPT], NEW_TOKENS, **whose)["tokens"])
        assert len({str(tokens) for tokens in native[:3]}) == 3, "the adapters do make a difference"
        engine.reset()
        for whose, tokens in zip(asked, native, strict=True):
            loaded = engine.generate([PROMPT], NEW_TOKENS, **whose)
            assert loaded["cached"] == [CHUNKS * BLOCK_TOKENS]
            assert loaded["tokens"] == tokens
        assert engine.counters()["kvstore_vllm_loads_total{whole}"] == len(asked)
        assert engine.stop() == 0
    finally:
        if engine is not None:
            engine.kill()
        node.kill()
