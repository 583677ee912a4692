"""The two sides of the vLLM connector against a real node; vLLM's own objects are stood in for by their fields.

The connector in real engines is tested in tests/integration/vllm.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from node_process import NodeProcess
from polling import wait_until
from prometheus_client import CollectorRegistry

from kvstore_client import Client, KVLayout
from kvstore_client.integrations.vllm.config import ConnectorConfig
from kvstore_client.integrations.vllm.identity import Namespaces, RequestKey
from kvstore_client.integrations.vllm.metrics import ConnectorMetrics
from kvstore_client.integrations.vllm.scheduler import SchedulerSide
from kvstore_client.integrations.vllm.work import Load, Save
from kvstore_client.integrations.vllm.worker import WorkerSide

LAYOUT = KVLayout.uniform(model="m", revision="r", num_layers=2, kv_heads=2, head_dim=32, chunk_tokens=64)
PROMPT = list(range(1000, 1300))  # four whole chunks and 44 tokens
HELD = 256


class Engine:
    """Blocks of `page_tokens`, and both sides of a connector as one process has them."""

    def __init__(self, address: str, page_tokens: int, blocks: int = 24, **extra: Any) -> None:
        self.config = ConnectorConfig(address, transport="grpc", **extra)
        self.registry = CollectorRegistry()
        self.client = Client(address, transport="grpc", registry=self.registry)
        metrics, namespaces = ConnectorMetrics(self.registry), Namespaces(self.client, LAYOUT)
        self.page_tokens = page_tokens
        generator = np.random.default_rng(page_tokens)
        size = (blocks, page_tokens, 2, 32)
        self.caches = [
            (generator.standard_normal(size).astype(ml_dtypes.bfloat16),
             generator.standard_normal(size).astype(ml_dtypes.bfloat16))
            for _ in range(2)
        ]  # fmt: skip
        self.worker = WorkerSide(self.config, namespaces, metrics, self.caches)
        self.scheduler = SchedulerSide(
            self.config, namespaces, metrics, page_tokens=page_tokens, loads=True, saves=True
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
        self.client.close()


@pytest.fixture
def engines(node: NodeProcess) -> Iterator[list[Engine]]:
    """Two, with other block sizes, of one node."""
    started = [Engine(node.address, 16), Engine(node.address, 32, deadline_s=2.0)]
    yield started
    for engine in started:
        engine.close()


def request(name: str = "r", **changes: Any) -> SimpleNamespace:
    fields: dict[str, Any] = {
        "request_id": name, "prompt_token_ids": PROMPT, "all_token_ids": list(PROMPT), "prompt_embeds": None,
        "resumable": False, "lora_request": None, "cache_salt": None, "mm_features": [],
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


def test_what_one_engine_saves_another_loads(engines: list[Engine]) -> None:
    writer, reader = engines
    ours = [3, 1, 4, 15, 9, 2, 6, 5, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19]
    saved(writer, ours)
    wanted = writer.kv(ours)[:, :, :HELD]

    # The reader has the first 96 tokens, in blocks that others use as well.
    theirs = [20, 11, 17, 5, 6, 7, 8, 9]
    before = reader.kv(list(range(1, 24)))
    asked = request()
    reader.scheduler.arrived(asked)
    assert reader.matched(asked, 96) == HELD - 96
    reader.scheduler.allocated(asked, [*theirs, 2], HELD - 96)
    (load,), _ = reader.scheduler.step(output())
    assert reader.loaded(load) == set()
    assert np.array_equal(reader.kv(theirs)[:, :, 96:], wanted[:, :, 96:])
    untouched = [block for block in range(1, 24) if block not in theirs[3:]]
    after = reader.kv(list(range(1, 24))).reshape(2, 2, 23, 32, 2, 32)
    before = before.reshape(after.shape)
    assert all(np.array_equal(after[:, :, b - 1], before[:, :, b - 1]) for b in untouched)
    assert reader.count("loads", outcome="whole") == 1
    reader.scheduler.loaded(["r"], set())
    # What was loaded is not saved again; what is computed behind it is, when a chunk is full and its tokens known.
    _, saves = reader.scheduler.step(output(new=[("r", [*theirs, 2, 3], HELD)], scheduled=[("r", 44)]))
    assert saves == []
    asked.all_token_ids += [7] * 20
    _, (save,) = reader.scheduler.step(output(cached=[("r", [4], 300)], scheduled=[("r", 30)]))
    assert (save.first_token, list(save.block_ids), len(save.tokens)) == (HELD, [2, 3], 320)

    # Another salt is another prompt, and an engine that wants better than what is stored gets none of it.
    assert reader.matched(request("salted", cache_salt="x")) == 0


def test_a_node_that_dies_costs_the_load_and_nothing_else(engines: list[Engine], node: NodeProcess) -> None:
    writer, reader = engines
    saved(writer, list(range(1, 20)))
    asked = request()
    assert reader.matched(asked) == HELD
    node.kill()
    blocks = [1, 2, 3, 4, 5, 6, 7, 8]
    reader.scheduler.allocated(asked, blocks, HELD)
    (load,), _ = reader.scheduler.step(output())
    assert reader.loaded(load) == set(blocks)
    assert reader.count("loads", outcome="failed") == 1
    reader.scheduler.loaded(["r"], set(blocks))
    assert reader.scheduler.matched(asked, 0) == (0, False)  # computed, not tried for ever
    assert reader.matched(request("next")) == 0
    reader.worker.save(Save("r", RequestKey(), np.array(PROMPT[:64], np.uint32), 0, (1, 2)))
    wait_until(lambda: reader.count("saves", outcome="rejected") == 1, "the save is given up", deadline_s=30)
    reader.worker.close()


def test_of_several_workers_the_one_that_failed_need_not_be_the_last(engines: list[Engine]) -> None:
    """What one lacks is reported in a step of its own, before the load has ended for all."""
    writer, reader = engines
    saved(writer, list(range(1, 20)))
    for first, expected in (({3, 4}, (0, False)), (set(), (HELD, True))):
        asked = request(f"after {len(first)}")
        assert reader.matched(asked) == HELD
        reader.scheduler.allocated(asked, [1, 2, 3, 4, 5, 6, 7, 8], HELD)
        reader.scheduler.step(output())
        reader.scheduler.loaded([], first)
        reader.scheduler.loaded([asked.request_id], set())
        assert reader.scheduler.matched(asked, 0) == expected
        reader.scheduler.finished(asked.request_id)


def test_saves_without_room_are_counted_and_a_failed_one_gives_its_room_back(node: NodeProcess) -> None:
    engine = Engine(node.address, 16, blocks=4200, stage_mib=1)  # room for 128 blocks
    try:
        tokens = np.arange(4096, dtype=np.uint32)
        engine.worker.save(Save("r", RequestKey(), tokens, 0, tuple(range(1, 257))))
        assert engine.count("saves", outcome="full") == 1
        lost = RequestKey(adapter=("gone", "/nowhere"))
        for _ in range(3):
            engine.worker.save(Save("r", lost, tokens[:1024], 0, tuple(range(1, 65))))
            wait_until(lambda: not engine.worker.saving, "it has failed", deadline_s=30)
        assert engine.count("saves", outcome="failed") == 3
        assert engine.count("saves", outcome="full") == 1
    finally:
        engine.close()


def test_prompts_that_tokens_do_not_tell_are_left_alone(node: NodeProcess) -> None:
    engine = Engine(node.address, 16)
    try:
        unknown = request(prompt_embeds=object())
        engine.scheduler.arrived(unknown)
        assert engine.scheduler.matched(unknown, 0) == (0, False)
        assert engine.scheduler.step(output(new=[("r", [1] * 19, 0)], scheduled=[("r", 300)])) == ([], [])
        assert engine.registry.get_sample_value("kvstore_vllm_unknown_requests_total") == 1
    finally:
        engine.close()


def test_a_decode_engine_waits_for_what_a_prefill_engine_promised(node: NodeProcess) -> None:
    writer, reader = Engine(node.address, 16), Engine(node.address, 32, lookup_s=20.0)
    try:
        prefilled = request("prefill", kv_transfer_params={"do_remote_decode": True})
        assert writer.matched(prefilled) == 0
        blocks = list(range(1, 20))
        _, saves = writer.scheduler.step(
            output(new=[("prefill", blocks, 0)], scheduled=[("prefill", len(PROMPT))])
        )  # fmt: skip
        told = writer.scheduler.finished("prefill")
        asked = request("decode", kv_transfer_params=told)
        reader.scheduler.arrived(asked)
        # The node has answered that it has none, and is asked again.
        wait_until(lambda: client_calls(reader, "lookup") > 1, "it asks again", deadline_s=20)
        assert reader.scheduler.matched(asked, 0) == (None, False)
        for save in saves:
            writer.worker.save(save)
        assert reader.matched(asked) == HELD
        assert reader.count("lookups", outcome="hit") == 1
        # Who is not told does not wait.
        assert writer.scheduler.finished("unknown") is None
        assert reader.matched(request("untold", cache_salt="x")) == 0
    finally:
        writer.close()
        reader.close()


def client_calls(engine: Engine, call: str) -> float:
    return engine.registry.get_sample_value("kvstore_client_call_seconds_count", {"call": call}) or 0.0
