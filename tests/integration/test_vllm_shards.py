"""Tensor and pipeline parallelism of the vLLM connector: engines whose workers share heads and layers in other ways
read each other's chunks of real KV, through the connector's own page views and worker class. The real engine's part is
in tests/integration/vllm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from node_process import NodeProcess
from polling import wait_until
from prometheus_client import CollectorRegistry
from smollm2 import TEXT

from kvstore_client import Client, InvalidArgument, KVLayout
from kvstore_client.integrations.transformers import kv_from_cache, layout_for, returned_cache
from kvstore_client.integrations.vllm.config import ConnectorConfig
from kvstore_client.integrations.vllm.identity import EngineFacts, Namespaces, RequestKey, layout_of
from kvstore_client.integrations.vllm.metrics import ConnectorMetrics
from kvstore_client.integrations.vllm.pages import PageOrder, PageShape, views
from kvstore_client.integrations.vllm.scheduler import SchedulerSide
from kvstore_client.integrations.vllm.work import Load, Save
from kvstore_client.integrations.vllm.worker import WorkerSide

pytestmark = pytest.mark.model

TOKENS, CHUNK, PAGE = 256, 64, 16
HEADS, DIM, LAYERS = 12, 64, 30
ORDERS = {1: PageOrder.CPU_AMX, 2: PageOrder.CPU_VEC, 4: PageOrder.PACKED_NHD}  # as engines may differ


@dataclass
class Real:
    ids: npt.NDArray[np.uint32]
    kv: npt.NDArray[Any]  # `[layers, 2, tokens, heads, dim]`


@pytest.fixture(scope="module")
def real(smollm2: tuple[Any, Any]) -> Real:
    """SmolLM2's KV. Its three heads do not halve: those of four passages stand side by side as twelve."""
    model, tokenizer = smollm2
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    layout = layout_for(model, chunk_tokens=CHUNK)
    passages = []
    for number in range(HEADS // 3):
        passage = ids[:, number * 40 : number * 40 + TOKENS]
        pairs = kv_from_cache(returned_cache(model(passage, use_cache=True)), layout)
        passages.append(np.stack([np.stack([as_numpy(plane) for plane in pair]) for pair in pairs]))
    return Real(ids[0, :TOKENS].numpy().astype(np.uint32), np.concatenate(passages, axis=3))


def as_numpy(plane: torch.Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = plane.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return array


class Engine:
    """The sides of a connector of an engine with so many workers a stage of its pipeline, and each worker's pages."""

    def __init__(
        self, address: str, workers: int, *, head_groups: int = 4, stages: int = 1, layer_groups: int = 1,
        quality: str = "lossless",
    ) -> None:  # fmt: skip
        self.config = ConnectorConfig(
            address, quality=quality, chunk_tokens=CHUNK, head_groups=head_groups, layer_groups=layer_groups
        )
        self.client = Client(address, registry=CollectorRegistry())
        facts = EngineFacts("SmolLM2", None, "auto", "bfloat16", None, {}, LAYERS, HEADS, DIM)
        self.layers, self.heads = LAYERS // stages, HEADS // workers
        self.layout = layout = layout_of(
            facts, chunk_tokens=CHUNK, revision="1", layer_groups=self.config.layer_groups_for([self.layers] * stages),
            head_groups=self.config.head_groups_for(HEADS, workers),
        )  # fmt: skip
        self.metrics = ConnectorMetrics(CollectorRegistry())
        self.scheduler = SchedulerSide(
            self.config, Namespaces(self.client, layout), self.metrics, page_tokens=PAGE, loads=True, saves=True
        )
        self.degree, self.workers, self.caches = workers, [], []
        for stage in range(stages):  # vLLM's order of workers
            layers = range(stage * self.layers, (stage + 1) * self.layers)
            for rank in range(workers):
                caches = [pages(ORDERS[workers], self.heads) for _ in layers]
                self.caches.append(caches)
                namespaces = Namespaces(self.client, layout, stage=layers, rank=rank, workers=workers)
                self.workers.append(WorkerSide(self.config, namespaces, self.metrics, caches))

    def fill(self, real: Real, block_ids: list[int]) -> None:
        """As the engine's attention would."""
        for worker, caches in enumerate(self.caches):
            stage, rank = divmod(worker, self.degree)
            layers = real.kv[stage * self.layers : (stage + 1) * self.layers]
            mine = layers[:, :, :, rank * self.heads : (rank + 1) * self.heads]
            for layer, pair in enumerate(caches):
                for side, plane in enumerate(pair):
                    for number, block in enumerate(block_ids):
                        page = mine[layer, side, number * PAGE : (number + 1) * PAGE]
                        plane[block] = page.reshape(plane[block].shape)

    def kv(self, block_ids: list[int]) -> npt.NDArray[Any]:
        size = (len(block_ids) * PAGE, self.heads, DIM)
        shards = [
            np.stack([np.stack([plane[block_ids].reshape(size) for plane in pair]) for pair in caches])
            for caches in self.caches
        ]
        stages = [shards[first : first + self.degree] for first in range(0, len(shards), self.degree)]
        return np.concatenate([np.concatenate(stage, axis=3) for stage in stages])

    def save(self, real: Real, block_ids: list[int]) -> None:
        for worker in self.workers:
            worker.save(Save("r", RequestKey(), real.ids, 0, tuple(block_ids)))
        wait_until(lambda: not any(worker.saving for worker in self.workers), "it is saved", deadline_s=60)

    def load(self, real: Real, block_ids: list[int]) -> set[int]:
        """The blocks that some worker lacks."""
        ended: set[int] = set()
        for worker in self.workers:
            worker.load(Load("r", RequestKey(), real.ids, 0, tuple(block_ids)))

        def over() -> bool:
            ended.update(rank for rank, worker in enumerate(self.workers) if worker.finished_loads())
            return len(ended) == len(self.workers)

        wait_until(over, "all workers have loaded", deadline_s=60)
        return set().union(*(worker.failed_blocks() for worker in self.workers))

    def held(self, real: Real) -> int:
        """Tokens that the scheduler's side finds stored."""
        return self.scheduler._lookups.start(RequestKey(), real.ids.tolist(), TOKENS).result().tokens

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.scheduler.close()
        self.client.close()


def pages(order: PageOrder, heads: int, blocks: int = 40) -> tuple[Any, Any]:
    """(k, v) views of one layer's pages in this order, as numpy."""
    shape = PageShape(PAGE, heads, DIM)
    inner = (PAGE, heads, 2 * DIM) if order is PageOrder.PACKED_NHD else (heads, PAGE, 2 * DIM)
    memory = torch.zeros((blocks, *inner), dtype=torch.bfloat16)
    k, v = (plane.view(torch.int16).numpy().view(ml_dtypes.bfloat16) for plane in views(memory, order, shape))
    return k, v


@pytest.fixture
def engines(node: NodeProcess) -> Iterator[dict[int, Engine]]:
    started = {workers: Engine(node.address, workers) for workers in (1, 2, 4)}
    yield started
    for engine in started.values():
        engine.close()


@pytest.mark.parametrize(("writer", "reader"), [(1, 2), (2, 1), (4, 2), (2, 4)])
def test_engines_of_other_tp_degrees_read_each_others_chunks(
    engines: dict[int, Engine], real: Real, writer: int, reader: int
) -> None:
    ours, theirs = list(range(1, 17)), [39, 3, 38, 4, 37, 5, 36, 6, 35, 7, 34, 8, 33, 9, 32, 10]
    engines[writer].fill(real, ours)
    assert engines[reader].held(real) == 0
    engines[writer].save(real, ours)
    assert engines[reader].held(real) == TOKENS
    assert engines[reader].load(real, theirs) == set()
    assert np.array_equal(engines[reader].kv(theirs).view(np.uint16), real.kv.view(np.uint16))


def test_what_one_worker_could_not_store_nobody_is_promised(engines: dict[int, Engine], real: Real) -> None:
    two, one = engines[2], engines[1]
    blocks = list(range(1, 17))
    two.fill(real, blocks)
    two.workers[0].save(Save("r", RequestKey(), real.ids, 0, tuple(blocks)))
    wait_until(lambda: not two.workers[0].saving, "its half is saved", deadline_s=60)
    assert (one.held(real), two.held(real)) == (0, 0)
    half = Save("r", RequestKey(), real.ids[:128], 0, tuple(blocks[:8]))
    two.workers[1].save(half)
    wait_until(lambda: not two.workers[1].saving, "some of the other half is", deadline_s=60)
    assert (one.held(real), two.held(real)) == (128, 128)
    assert one.load(real, blocks) == set(blocks[8:])  # as if it had been promised more


def test_engines_that_do_not_agree_on_head_groups_share_nothing(node: NodeProcess, real: Real) -> None:
    two, one = Engine(node.address, 2, head_groups=2), Engine(node.address, 1, head_groups=1)
    try:
        blocks = list(range(1, 17))
        two.fill(real, blocks)
        two.save(real, blocks)
        assert (two.held(real), one.held(real)) == (TOKENS, 0)
    finally:
        two.close()
        one.close()


@dataclass(frozen=True)
class Shape:
    """How an engine shares its KV: pipeline stages, workers of each."""

    stages: int
    workers: int


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        (Shape(1, 1), Shape(2, 1)), (Shape(2, 1), Shape(1, 1)), (Shape(3, 1), Shape(2, 1)), (Shape(2, 2), Shape(3, 1)),
        (Shape(1, 2), Shape(2, 2)), (Shape(2, 4), Shape(1, 1)),
    ],
)  # fmt: skip
def test_pipelines_of_other_lengths_read_each_others_chunks(
    node: NodeProcess, real: Real, writer: Shape, reader: Shape
) -> None:
    started = [
        Engine(node.address, each.workers, stages=each.stages, layer_groups=6, head_groups=4)
        for each in (writer, reader)
    ]
    try:
        one, other = started
        ours, theirs = list(range(1, 17)), [39, 3, 38, 4, 37, 5, 36, 6, 35, 7, 34, 8, 33, 9, 32, 10]
        one.fill(real, ours)
        one.save(real, ours)
        assert other.held(real) == TOKENS
        assert other.load(real, theirs) == set()
        assert np.array_equal(other.kv(theirs).view(np.uint16), real.kv.view(np.uint16))
    finally:
        for engine in started:
            engine.close()


def test_a_block_that_one_stage_lacks_is_computed_by_all(node: NodeProcess, real: Real) -> None:
    engine = Engine(node.address, 1, head_groups=1, stages=2, layer_groups=2)
    try:
        blocks = list(range(1, 17))
        engine.fill(real, blocks)
        first, second = engine.workers
        first.save(Save("r", RequestKey(), real.ids, 0, tuple(blocks)))
        wait_until(lambda: not first.saving, "the first stage's half is saved", deadline_s=60)
        assert engine.held(real) == 0
        second.save(Save("r", RequestKey(), real.ids[:128], 0, tuple(blocks[:8])))
        wait_until(lambda: not second.saving, "some of the second's is", deadline_s=60)
        assert engine.held(real) == 128
        assert engine.load(real, blocks) == set(blocks[8:])  # as if more had been promised
    finally:
        engine.close()


def test_pipelines_that_do_not_agree_on_layer_groups_share_nothing(node: NodeProcess, real: Real) -> None:
    """Nor is a stage's share ever taken for all layers, or for another's: each other division is a namespace."""
    ways = [(1, 1), (2, 2), (2, 6), (1, 2), (3, 3), (1, 30)]
    engines = [Engine(node.address, 1, head_groups=1, stages=s, layer_groups=g) for s, g in ways]
    try:
        blocks = list(range(1, 17))
        stored: set[int] = set()
        for engine in engines:
            groups = engine.layout.partition.layer_groups
            assert engine.held(real) == (TOKENS if groups in stored else 0)
            engine.fill(real, blocks)
            engine.save(real, blocks)
            stored.add(groups)
        assert len({engine.layout.namespace_id for engine in engines}) == len(stored) == 5
    finally:
        for engine in engines:
            engine.close()


def test_a_stage_that_would_have_half_a_group_is_refused(node: NodeProcess) -> None:
    engine = Engine(node.address, 1, stages=2, layer_groups=2)
    try:
        with pytest.raises(InvalidArgument, match="whole groups of layers"):
            Namespaces(engine.client, engine.layout, stage=range(14))
        with pytest.raises(InvalidArgument, match="whole groups of layers and of heads"):
            Namespaces(engine.client, engine.layout, stage=range(15), workers=3)
    finally:
        engine.close()


def test_a_layout_of_one_part_is_what_it_was() -> None:
    """An engine alone has the namespace that it had before there were parts."""
    facts = EngineFacts("m", None, "auto", "bfloat16", None, {}, 2, 4, 32)
    layout = layout_of(facts, chunk_tokens=64, revision="1")
    assert layout == KVLayout.uniform(
        model="m", revision=layout.revision, num_layers=2, kv_heads=4, head_dim=32, chunk_tokens=64
    )
