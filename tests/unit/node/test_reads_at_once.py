"""What memory holds of a chain, read in one go: the same as object by object, counted the same."""

from __future__ import annotations

from pathlib import Path

import kv_objects as kv
import pytest
from engine_node import ROOMY, config, opened, put, tiers_of
from fake_clock import FakeClock
from prometheus_client import CollectorRegistry
from tier_objects import LAYOUT, key_of

from kvstore.engine.node import Node
from kvstore_codec import Quality

COUNTED = ("kvstore_reads_total", "kvstore_read_bytes_total", "kvstore_reads_by_quality", "kvstore_operation_bytes")


def counted(registry: CollectorRegistry) -> dict[str, float]:
    samples = [sample for metric in registry.collect() for sample in metric.samples]
    return {
        f"{each.name} {each.labels}": each.value
        for each in samples
        if each.name.startswith(COUNTED) and not each.name.endswith("_created") and each.value
    }


def added(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in after.items() if value != before.get(name, 0.0)}


@pytest.mark.parametrize("quality", [Quality.RAW, Quality.HIGH, Quality.MEDIUM, Quality.LOW])
async def test_it_is_as_reading_one_by_one(quality: Quality) -> None:
    chunks = kv.chunks(LAYOUT, 6, seed=1, quality="high")
    registry = CollectorRegistry()
    node = await Node.open(config(None), clock=FakeClock(), registry=registry)
    try:
        await put(node, chunks)
        keys = [key_of(chunk) for chunk in chunks]
        start = counted(registry)
        one_by_one = [await node.read(key, quality) for key in keys]
        between = counted(registry)
        at_once = node.read_at_once(keys, quality, float("inf"))
        end = counted(registry)
        reads = [node._holdings.index.get(key).reads for key in keys]  # type: ignore[union-attr]
    finally:
        await node.aclose()
    assert [bytes(each) for each in at_once] == [bytes(each) for each in one_by_one if each is not None]
    assert added(start, between) == added(between, end)
    assert added(start, between)
    assert reads == [2] * len(keys)


async def test_it_ends_at_what_memory_lacks_and_at_enough_bytes(tmp_path: Path) -> None:
    chunks = kv.chunks(LAYOUT, 8, seed=2)
    size = len(chunks[0].blob)
    async with opened(config(tmp_path, host=6 * (size + 512), disk=ROOMY)) as node:
        await put(node, chunks, durable=True)
        in_memory = ["host" in tiers_of(node, chunk) for chunk in chunks]
        assert 0 < sum(in_memory) < len(chunks)
        keys = [key_of(chunk) for chunk in chunks]
        first = in_memory.index(True)
        run = [*in_memory[first:], False].index(False)
        assert len(node.read_at_once(keys[first:], Quality.RAW, float("inf"))) == run
        assert len(node.read_at_once(keys[first:], Quality.RAW, 1)) == 1
        assert len(node.read_at_once(keys[first:], Quality.RAW, size + 1)) == min(2, run)
        lacking = in_memory.index(False)
        assert node.read_at_once(keys[lacking:], Quality.RAW, float("inf")) == []
        assert node.read_at_once([], Quality.RAW, float("inf")) == []
        absent = kv.chunks(LAYOUT, 1, seed=3)
        assert node.read_at_once([key_of(absent[0])], Quality.RAW, float("inf")) == []
