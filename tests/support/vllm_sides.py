"""Both sides of the vLLM connector as an engine has them, without vLLM: its objects stand there by their fields."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
from polling import wait_until
from prometheus_client import CollectorRegistry

from kvstore_client import Client, KVLayout
from kvstore_client.integrations.vllm.config import ConnectorConfig
from kvstore_client.integrations.vllm.events import StoredEvents
from kvstore_client.integrations.vllm.identity import Namespaces
from kvstore_client.integrations.vllm.metrics import ConnectorMetrics
from kvstore_client.integrations.vllm.scheduler import SchedulerSide
from kvstore_client.integrations.vllm.work import Load
from kvstore_client.integrations.vllm.worker import WorkerSide

LAYOUT = KVLayout.uniform(model="m", revision="r", num_layers=2, kv_heads=2, head_dim=32, chunk_tokens=64)
PROMPT = list(range(1000, 1300))  # four whole chunks and 44 tokens
HELD = 256


class Engine:
    """Blocks of `page_tokens`, and both sides of a connector."""

    def __init__(
        self, address: str, page_tokens: int, blocks: int = 24, *, recomputes: bool = True, **extra: Any
    ) -> None:
        self.config = ConnectorConfig(address, transport="grpc", **extra)
        self.registry = CollectorRegistry()
        self.clients = [
            Client(address, transport="grpc", registry=self.registry, strict=strict, tls=self.config.tls)
            for strict in (True, False)
        ]
        looking, moving = (Namespaces(client, LAYOUT) for client in self.clients)
        self.metrics = ConnectorMetrics(self.registry)
        self.page_tokens = page_tokens
        generator = np.random.default_rng(page_tokens)
        size = (blocks, page_tokens, 2, 32)
        self.caches = [
            (generator.standard_normal(size).astype(ml_dtypes.bfloat16),
             generator.standard_normal(size).astype(ml_dtypes.bfloat16))
            for _ in range(2)
        ]  # fmt: skip
        self.worker = WorkerSide(self.config, moving, self.metrics, self.caches)
        self.scheduler = SchedulerSide(
            self.config, looking, self.metrics, page_tokens=page_tokens, loads=True, saves=True,
            events=StoredEvents(page_tokens, workers=1), recomputes=recomputes,
        )  # fmt: skip

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"kvstore_vllm_{name}_total", labels) or 0.0

    def kv(self, block_ids: list[int]) -> Any:
        return np.stack(
            [np.stack([np.concatenate([plane[b] for b in block_ids]) for plane in kv]) for kv in self.caches]
        )

    def matched(self, request: Any, computed: int = 0) -> int:
        """Asked again and again, as a scheduler does."""
        answers: list[int] = []

        def answered() -> bool:
            tokens, asynchronously = self.scheduler.matched(request, computed)
            assert asynchronously == bool(tokens)
            answers.extend([] if tokens is None else [tokens])
            return bool(answers)

        wait_until(answered, "the lookup is over", deadline_s=20)
        return answers[0]

    def compute(self, tokens: int, tokens_per_s: float) -> None:
        """What the scheduler sees of a step that computes so many tokens of a prompt, so fast."""
        self.scheduler.step(output(new=[("else", [1], 0)], scheduled=[("else", tokens)]))
        began_s = time.monotonic()
        wait_until(lambda: time.monotonic() - began_s > tokens / tokens_per_s, "it is computed", deadline_s=30)
        self.scheduler.ended()

    def loaded(self, load: Load) -> set[int]:
        """The failed blocks of a load, when it is over."""
        self.worker.load(load)
        ended: set[str] = set()

        def over() -> bool:
            ended.update(self.worker.finished_loads())
            return bool(ended)

        wait_until(over, "the load is over", deadline_s=30)
        assert ended == {load.request_id}
        return self.worker.failed_blocks()

    def close(self) -> None:
        self.worker.close()
        self.scheduler.close()
        for client in self.clients:
            client.close()


def request(name: str = "r", **changes: Any) -> SimpleNamespace:
    fields: dict[str, Any] = {
        "request_id": name, "prompt_token_ids": PROMPT, "all_token_ids": list(PROMPT), "prompt_embeds": None,
        "resumable": False, "lora_request": None, "cache_salt": None, "mm_features": [], "block_hashes": [],
        "kv_transfer_params": None,
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


def output(new: Any = (), cached: Any = (), resumed: Any = (), scheduled: Any = ()) -> SimpleNamespace:
    """A scheduler's output. `new`: (id, blocks, computed); `cached`: (id, new blocks or None, computed)."""
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, block_ids=(blocks,), num_computed_tokens=computed)
            for name, blocks, computed in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, _, _ in cached],
            new_block_ids=[None if blocks is None else (blocks,) for _, blocks, _ in cached],
            num_computed_tokens=[computed for _, _, computed in cached],
            resumed_req_ids=set(resumed),
        ),
        num_scheduled_tokens=dict(scheduled),
    )


def saved(engine: Engine, blocks: list[int]) -> None:
    """PROMPT, computed in one step."""
    whole = request("saved")
    assert engine.matched(whole) == 0
    _, saves = engine.scheduler.step(output(new=[("saved", blocks, 0)], scheduled=[("saved", len(PROMPT))]))
    for save in saves:
        engine.worker.save(save)
    wait_until(lambda: engine.count("tokens", direction="save") == HELD, "it is saved", deadline_s=30)
    engine.scheduler.finished("saved")
