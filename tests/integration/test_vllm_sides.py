"""The two sides of the vLLM connector against a real node; vLLM's own objects are stood in for by their fields.

The connector in real engines is tested in tests/integration/vllm.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from node_process import NodeProcess
from polling import wait_until
from vllm_sides import HELD, PROMPT, Engine, output, request, saved

from kvstore_client.integrations.vllm.identity import RequestKey
from kvstore_client.integrations.vllm.work import Save

LOOKUP_S = 20.0  # that a promise is waited for: no test does


@pytest.fixture
def engines(node: NodeProcess) -> Iterator[list[Engine]]:
    """Two, with other block sizes, of one node."""
    started = [Engine(node.address, 16), Engine(node.address, 32, deadline_s=2.0)]
    yield started
    for engine in started:
        engine.close()


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
    assert not reader.kv(blocks).any()
    assert reader.count("loads", outcome="failed") == 1
    assert reader.count("short_loads", reason="unavailable") == 1
    reader.scheduler.loaded(["r"], set(blocks))
    assert reader.scheduler.matched(asked, 0) == (0, False)  # computed, not tried for ever
    assert reader.matched(request("next")) == 0
    reader.worker.save(Save("r", RequestKey(), np.array(PROMPT[:64], np.uint32), 0, (1, 2)))
    wait_until(lambda: reader.count("saves", outcome="rejected") == 1, "the save is given up", deadline_s=30)
    reader.worker.close()


def test_blocks_that_a_load_did_not_fill_hold_zeros(engines: list[Engine]) -> None:
    """Nothing of what a damaged object may have left: attention multiplies it by zero, and no number stays none."""
    writer, reader = engines
    ours = list(range(1, 20))
    saved(writer, ours)
    asked = request()
    assert reader.matched(asked) == HELD
    blocks = [1, 2, 3, 4, 5, 6, 7, 8]
    reader.scheduler.allocated(asked, blocks, HELD)
    (load,), _ = reader.scheduler.step(output())
    others = reader.kv([9, 10])
    tokens = load.tokens.copy()
    tokens[192:] += 1  # nobody has stored that
    assert reader.loaded(replace(load, tokens=tokens)) == {7, 8}
    assert np.array_equal(reader.kv(blocks)[:, :, :192], writer.kv(ours)[:, :, :192])
    assert not reader.kv([7, 8]).any()
    assert np.array_equal(reader.kv([9, 10]), others)


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
    writer, reader = Engine(node.address, 16), Engine(node.address, 32, lookup_s=LOOKUP_S)
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
        # For a part of a chunk there is nothing to wait.
        began_s = time.monotonic()
        assert reader.matched(request("part", kv_transfer_params={"kvstore_tokens": HELD + 1})) == HELD
        assert time.monotonic() - began_s < LOOKUP_S / 2
        # Who is not told does not wait.
        assert writer.scheduler.finished("unknown") is None
        assert reader.matched(request("untold", cache_salt="x")) == 0
    finally:
        writer.close()
        reader.close()


def client_calls(engine: Engine, call: str) -> float:
    return engine.registry.get_sample_value("kvstore_client_call_seconds_count", {"call": call}) or 0.0
