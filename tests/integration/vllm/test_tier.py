"""kvstore's secondary tier in vLLM's own spec, factory and manager, against a real node.

vLLM does not offload on a CPU: the accelerator's part, rows filled and read, is the test's (support/vllm_tier.py).
"""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from disk_places import place_of
from kv_strategies import bits, random_kv
from node_process import NodeProcess
from polling import wait_until
from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, make_offload_key
from vllm.v1.kv_offload.config import OffloadingCacheConfig
from vllm.v1.kv_offload.tiering.base import TransferJob
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec
from vllm_tier import MODULE, Host, chain, offloading_config, tier_entry

import kvstore_codec as codec
from kvstore.index.entry import ObjectKey
from kvstore_client import Client, InvalidArgument, KVLayout, RoPE
from kvstore_client.integrations import vllm_tier
from kvstore_client.integrations.transformers import kv_from_cache, layout_for, returned_cache
from kvstore_proto.v1 import store_pb2 as pb

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

CHUNK = 32
LAYOUT = KVLayout.uniform(
    model="m", revision="vllm:1", num_layers=3, kv_heads=2, head_dim=64, chunk_tokens=CHUNK, rope=RoPE(theta=1e4)
)
LOOKUP_S = 0.5
StartHost = Callable[..., Host]


@pytest.fixture
def start_host(tmp_path: Path) -> Iterator[StartHost]:
    """Hosts that the test leaves running are shut down."""
    hosts: list[Host] = []

    def start(address: str, layout: KVLayout = LAYOUT, settings: dict[str, Any] | None = None, **shape: Any) -> Host:
        entry = tier_entry(address, layout, **{"lookup_s": 10.0, **(settings or {})})
        hosts.append(Host(offloading_config(layout, [entry], **shape)))
        return hosts[-1]

    yield start
    for host in hosts:
        host.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    node = NodeProcess(tmp_path, "--host-capacity", "256MiB", "--disk-path", str(tmp_path / "disk"))
    yield node
    node.kill()


def kv_of(chunks: int, seed: int = 1, layout: KVLayout = LAYOUT) -> npt.NDArray[Any]:
    kv: npt.NDArray[Any] = random_kv(layout, chunks * layout.chunk_tokens, seed)
    return kv


def stored(host: Host, keys: list[OffloadKey], kv: npt.NDArray[Any]) -> ReqContext:
    """A request that computed these chunks and offloaded them, all the way to the node."""
    context = host.request(keys)
    host.store(context, keys, kv)
    host.idle()
    return context


def counted(host: Host) -> dict[tuple[str, ...], int]:
    """The tier's counters since the last time, as vLLM exports them."""
    stats = host.tier.get_stats()
    return {} if stats is None else dict(stats.data["data"]["kvstore_vllm_tier_chunks"])


@pytest.mark.model
def test_real_kv_goes_from_one_engine_to_another_with_other_rows(
    node: NodeProcess, start_host: StartHost, smollm2: tuple[Any, Any]
) -> None:
    """SmolLM2's cache, bit for bit, from blocks of 16 tokens with tokens first to blocks of 32 with heads first."""
    from smollm2 import TEXT

    model, tokenizer = smollm2
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, : 8 * CHUNK]
    layout = layout_for(model, chunk_tokens=CHUNK)
    pairs = kv_from_cache(returned_cache(model(ids, use_cache=True)), layout)
    kv = codec.empty(layout, ids.shape[1])
    for layer, (k, v) in enumerate(pairs):
        for side, plane in enumerate((k, v)):
            kv[layer, side] = plane.view(torch.int16).numpy().view(kv.dtype)

    keys = chain("SmolLM2", 8)
    writer = start_host(node.address, layout, order="LBNHC", pages=2)
    stored(writer, keys, kv)
    assert counted(writer) == {("store", "stored"): 8}

    reader = start_host(node.address, layout, order="LBHNC", pages=1)
    context = reader.request(keys)
    assert reader.hits(context, keys) == 8
    assert bits(reader.kv(context, keys)) == bits(kv)
    assert counted(reader) == {("lookup", "hit"): 8, ("load", "loaded"): 8}


@pytest.mark.parametrize("order", ["LBNHC", "LBHNC"])
@pytest.mark.parametrize("pages", [1, 2])
def test_every_order_of_rows(node: NodeProcess, start_host: StartHost, order: str, pages: int) -> None:
    keys, kv = chain(f"{order} {pages}", 5), kv_of(5)
    stored(start_host(node.address, order=order, pages=pages), keys, kv)
    reader = start_host(node.address, order=order, pages=pages)
    untouched = reader._view.copy()
    context = reader.request(keys)
    assert reader.hits(context, keys) == 5
    assert bits(reader.kv(context, keys)) == bits(kv)
    assert np.array_equal(reader._view[5:], untouched[5:]), "nothing but the chunks' own rows is written"


def test_lossy_chunks_are_coded_at_their_positions(node: NodeProcess, start_host: StartHost) -> None:
    """Keys are un-rotated by their positions, which a key does not tell: the request's context does."""
    keys, kv = chain("lossy", 3), kv_of(3)
    stored(start_host(node.address, settings={"quality": "high"}), keys, kv)
    reader = start_host(node.address, settings={"quality": "high"})
    context = reader.request(keys)
    assert reader.hits(context, keys) == 3
    got = reader.kv(context, keys)
    for number in range(3):
        part = slice(number * CHUNK, (number + 1) * CHUNK)
        blob = codec.encode(kv[:, :, part], LAYOUT, quality="high", first_position=number * CHUNK)
        assert bits(got[:, :, part]) == bits(codec.decode(blob, LAYOUT))
    exact = start_host(node.address)
    assert exact.hits(exact.request(keys), keys) == 0, "an engine that wants better gets none of it"


def test_only_the_end_of_a_prompt_is_stored_and_loaded(node: NodeProcess, start_host: StartHost) -> None:
    """What the accelerator or the CPU tier has is not asked for; parents and positions are right all the same."""
    keys, kv = chain("end", 6), kv_of(6)
    writer = start_host(node.address)
    context = writer.request(keys)
    writer.store(context, keys[4:], kv[:, :, 4 * CHUNK :])
    writer.store(context, [keys[1], keys[0], keys[2]], kv[:, :, [*range(32, 64), *range(32), *range(64, 96)]])
    writer.idle()
    reader = start_host(node.address)
    late = reader.request(keys)
    assert reader.hits(late, keys[4:]) == 2
    assert bits(reader.kv(late, keys[4:])) == bits(kv[:, :, 4 * CHUNK :])
    assert reader.hits(late, keys) == 3, "chunk 3 was never stored"
    refs = codec.wrap_engine_hashes(LAYOUT, [key[:-4] for key in keys])
    listed = node.store.List(pb.ListRequest(namespace_id=LAYOUT.namespace_id), timeout=10)
    found = {entry.chunk_hash: (entry.parent_hash, entry.first_position, entry.tokens) for entry in listed.objects}
    assert found == {refs[n].hash: (refs[n].parent, n * CHUNK, CHUNK) for n in (0, 1, 2, 4, 5)}


def test_other_weights_and_other_names_share_nothing(node: NodeProcess, start_host: StartHost) -> None:
    keys, kv = chain("mine", 3), kv_of(3)
    stored(start_host(node.address), keys, kv)
    revised = start_host(node.address, replace(LAYOUT, revision="vllm:2"))
    assert revised.hits(revised.request(keys), keys) == 0
    reader = start_host(node.address)
    salted = chain("mine, salted", 3)
    assert reader.hits(reader.request(salted), salted) == 0
    assert reader.hits(reader.request(keys), keys) == 3
    counted(reader)
    short = [make_offload_key(key[:16], 0) for key in keys]  # as the xxhash modes make them
    context = reader.request(short)
    assert reader.hits(context, short) == 0
    reader.store(context, short, kv)
    reader.idle()
    assert counted(reader) == {("store", "failed"): 3}


def test_a_node_that_does_not_answer_delays_nobody(node: NodeProcess, start_host: StartHost) -> None:
    """No hook waits; a request waits for `lookup_s`, those after it for nothing; transfers end by their deadline."""
    host = start_host(node.address, settings={"lookup_s": LOOKUP_S, "deadline_s": 1.0})
    keys, kv, before = chain("stopped", 4), kv_of(4), chain("connected", 1)
    assert host.hits(host.request(before), before) == 0
    node.process.send_signal(signal.SIGSTOP)
    try:
        slowest = 0.0
        context = host.request(keys)
        began = time.monotonic()
        while True:
            at = time.monotonic()
            results = host.lookups(context, keys)
            host.step()
            slowest = max(slowest, time.monotonic() - at)
            if LookupResult.RETRY not in results:
                break
            threading.Event().wait(0.002)
        assert LOOKUP_S * 0.9 <= time.monotonic() - began < LOOKUP_S + 1.0
        assert results == [LookupResult.MISS]
        assert slowest < LOOKUP_S / 2
        _paused(host)

        at = time.monotonic()
        host.store(context, keys, kv)
        assert time.monotonic() - at < 0.5
        host.tier.drain_jobs()
        assert time.monotonic() - at < 1.0 + 1.0
        host.idle(1.0)
        assert not counted(host).get(("store", "stored"))
    finally:
        node.process.send_signal(signal.SIGCONT)
    other = chain("answered", 1)
    wait_until(lambda: _answered(host, other), "the node is asked again", deadline_s=20)


def _paused(host: Host) -> None:
    """Until a request is answered without the node. Pauses grow from 0.25 s on: a slow machine may miss the first."""
    prompts = (chain(f"next {number}", 4) for number in range(100))

    def paused() -> bool:
        keys = next(prompts)
        assert host.hits(host.request(keys), keys) == 0
        return counted(host).get(("lookup", "paused")) == 4

    wait_until(paused, "lookups are paused", deadline_s=20)


def _answered(host: Host, keys: list[OffloadKey]) -> bool:
    """Whether a new request is looked up at the node; nothing of it is there."""
    context = host.request(keys)
    assert host.hits(context, keys) == 0
    host.manager.on_request_finished(context)
    return ("lookup", "paused") not in counted(host)


def test_a_node_that_dies_is_a_miss_and_comes_back(tmp_path: Path, start_host: StartHost) -> None:
    """Promised chunks that do not come are recomputed, not promised again for ever."""
    disk = tmp_path / "disk"
    node = NodeProcess(tmp_path, "--disk-path", str(disk))
    try:
        keys, kv = chain("dies", 4), kv_of(4)
        stored(start_host(node.address), keys, kv)
        with Client(node.address) as client:
            wait_until(
                lambda: [tier.objects for tier in client.stat().tiers if tier.tier == "disk"] == [4], "all is on disk",
                deadline_s=20,
            )  # fmt: skip
        host = start_host(node.address, settings={"deadline_s": 2.0})
        context = host.request(keys)
        wait_until(lambda: _promised(host, context, keys), "the node has answered", deadline_s=20)
        node.kill()
        host.step()  # submits the load
        assert host.hits(context, keys) == 0
        assert counted(host)["load", "missed"] == 4
        host.manager.on_request_finished(context)
        node = NodeProcess(tmp_path, "--disk-path", str(disk), listen=node.address)
        found: list[int] = []

        def back() -> bool:
            again = host.request(keys)
            found.append(host.hits(again, keys))
            host.manager.on_request_finished(again)
            return found[-1] > 0

        wait_until(back, "the node is found again", deadline_s=20)
        again = host.request(keys)
        assert host.hits(again, keys) == found[-1] == 4
        assert bits(host.kv(again, keys)) == bits(kv)
    finally:
        node.kill()


def _promised(host: Host, context: ReqContext, keys: list[OffloadKey]) -> bool:
    """Whether the tier has promised the chunks; steps only to get the lookup out, so that no load begins."""
    results = host.lookups(context, keys)
    if LookupResult.RETRY in results:
        host.tier.on_schedule_end(None)
        return False
    assert results == [LookupResult.HIT_PENDING] * len(keys)
    return True


def test_a_damaged_chunk_ends_the_load_before_it(tmp_path: Path, start_host: StartHost) -> None:
    node = NodeProcess(tmp_path, "--disk-path", str(tmp_path / "disk"))
    try:
        keys, kv = chain("damaged", 4), kv_of(4)
        stored(start_host(node.address), keys, kv)
        assert node.stop() == 0
        third = codec.wrap_engine_hashes(LAYOUT, [key[:-4] for key in keys])[2]
        place_of(tmp_path / "disk", ObjectKey(LAYOUT.namespace_id, third.hash, 0)).flip(2000, 3)
        node = NodeProcess(tmp_path, "--disk-path", str(tmp_path / "disk"))
        host = start_host(node.address)
        context = host.request(keys)
        assert host.hits(context, keys) == 2
        assert bits(host.kv(context, keys[:2])) == bits(kv[:, :, : 2 * CHUNK])
        assert counted(host)["load", "missed"] == 2
    finally:
        node.kill()


def test_drain_and_shutdown_are_exact(node: NodeProcess, start_host: StartHost) -> None:
    """After a drain every result is there; after a shutdown nothing touches the rows and no thread is left."""
    host = start_host(node.address, rows=64)
    for number in range(8):
        keys = chain(f"drained {number}", 4)
        host.store(host.request(keys), keys, kv_of(4, number))
    submitted = set(host.manager._jobs)
    assert len(submitted) == 8
    host.tier.drain_jobs()
    results = {result.job_id: result.success for result in host.tier.get_finished_jobs()}
    assert results == dict.fromkeys(submitted, True)
    assert list(host.tier.get_finished_jobs()) == []

    entry = tier_entry(node.address, LAYOUT)
    other = Host(offloading_config(LAYOUT, [entry], rows=64))
    for number in range(8):
        keys = chain(f"shut {number}", 4)
        other.store(other.request(keys), keys, kv_of(4, number))
    region = Path(other.manager.primary_tier._mmap_region.mmap_path)
    assert region.exists()
    before = {thread.name for thread in threading.enumerate()}
    assert any(name.startswith("kvstore-tier") for name in before)
    other.close()
    assert not region.exists()
    gc.collect()
    assert region.name not in Path("/proc/self/maps").read_text(), "somebody still has a view of the rows"
    host.close()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("kvstore-tier")]
    assert left == []


def test_what_is_put_again_is_there(node: NodeProcess, start_host: StartHost) -> None:
    keys, kv = chain("again", 3), kv_of(3)
    first, second = start_host(node.address), start_host(node.address)
    stored(first, keys, kv)
    stored(second, keys, kv)
    assert counted(second) == {("store", "have"): 3}


def test_vllm_exports_the_tiers_counters() -> None:
    entry = tier_entry("127.0.0.1:1", LAYOUT)
    definitions = TieringOffloadingSpec.build_metric_definitions({"secondary_tiers": [entry]})
    assert definitions["kvstore_vllm_tier_chunks"].labelnames == ("operation", "outcome")


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({"adress": "a:1"}, {}, "has no key 'adress': did you mean 'address'"),
        ({"chunk_tokens": 64}, {}, "has no key 'chunk_tokens': it takes address, quality"),
        ({"locality": "NEAR"}, {}, r"locality is one of LOCAL, REMOTE .got=NEAR"),
        ({"lookup_s": 0}, {}, "lookup_s is a positive number"),
        ({"layout": None}, {}, "use kv_connector KVStoreOffloadingConnector"),
        ({}, {"kv_cache_layout": "BLNHC"}, r"set VLLM_KV_CACHE_LAYOUT to LBNHC or LBHNC .got=BLNHC"),
        ({}, {"kv_cache_layout": None}, "rows in this order are not known"),
        ({}, {"worker_kv_bytes_per_block": 3 * CHUNK * 512 + 64}, "padded pages"),
        ({}, {"workers": 2}, '"canonical_layout": true'),
        ({}, {"pages": 2, "cache": None}, "a row is not a chunk"),
    ],
)  # fmt: skip
def test_what_is_refused_at_start(settings: dict[str, Any], shape: dict[str, Any], message: str) -> None:
    """By the tier, made by vLLM's factory; nothing is left behind."""
    if "cache" in shape:
        shape = {**shape, "cache": OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=1)}
    entry = {**tier_entry("127.0.0.1:1", LAYOUT), **settings}
    if entry["layout"] is None:
        del entry["layout"]
    spec = TieringOffloadingSpec(offloading_config(LAYOUT, [entry], **shape))
    with pytest.raises(InvalidArgument, match=message):
        spec.get_manager()
    assert not list(Path("/dev/shm").glob(f"*{spec.config.engine_id}*"))


def test_rows_that_pages_do_not_divide_are_refused(start_host: StartHost) -> None:
    """Heads first, several pages a row: then each page is one of the codec's, at the same distance from the next."""
    odd = KVLayout.uniform(model="odd", revision="1", num_layers=1, kv_heads=1, head_dim=24, chunk_tokens=CHUNK)
    spec = TieringOffloadingSpec(offloading_config(odd, [tier_entry("127.0.0.1:1", odd)], pages=2))
    with pytest.raises(InvalidArgument, match="leave blocks_per_chunk at 1"):
        spec.get_manager()
    assert not list(Path("/dev/shm").glob(f"*{spec.config.engine_id}*"))
    start_host("127.0.0.1:1", odd, order="LBNHC", pages=2)


def test_two_workers_share_rows_in_vllms_canonical_layout(node: NodeProcess, start_host: StartHost) -> None:
    """There a page holds all heads, whoever computed them: an engine with one worker reads the same chunks."""
    keys, kv = chain("canonical", 3), kv_of(3)
    stored(start_host(node.address, workers=2, canonical=True), keys, kv)
    alone = start_host(node.address)
    context = alone.request(keys)
    assert alone.hits(context, keys) == 3
    assert bits(alone.kv(context, keys)) == bits(kv)


def test_it_is_found_by_vllms_factory() -> None:
    cls = SecondaryTierFactory.get_tier_class({"type": "KVStoreTierManager", "module_path": MODULE})
    assert cls.medium is not None
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        SecondaryTierFactory.get_tier_class({"type": "Nothing", "module_path": MODULE})


def test_jobs_of_unknown_places_end_as_failed(node: NodeProcess, start_host: StartHost) -> None:
    """A context without positions, such as another engine's request over vLLM's own peer tier."""
    host = start_host(node.address)
    keys = chain("nowhere", 2)
    context = ReqContext("external")
    assert host.tier.lookup(keys[0], context) is LookupResult.MISS
    host.tier.submit_store(TransferJob(7, keys, np.array([0, 1], np.int32), False, context))
    host.tier.drain_jobs()
    (result,) = host.tier.get_finished_jobs()
    assert (result.job_id, result.transfer_bytes) == (7, 0)
    assert counted(host) == {("store", "failed"): 2}


@pytest.mark.parametrize("name", ["KVStoreTierManager", "KVStoreOffloadingConnector"])
def test_another_version_is_refused_before_it_is_found_to_lack_something(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("vllm.__version__", "0.31.0")
    with pytest.raises(InvalidArgument, match=r"knows vLLM 0.32.*found=0.31.0"):
        getattr(vllm_tier, name)
