"""Chunks named by an engine's hashes, and gets that begin behind what the caller has, by every way."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kv_objects import small_layout
from kv_strategies import bits, random_kv
from node_process import NodeProcess
from prometheus_client import CollectorRegistry

from kvstore_client import Client, EngineHashes, Extras, InvalidArgument, LayoutError
from kvstore_client.transports.bulk_path import Transport

CHUNK = 16
CHUNKS = 6


def hashes(name: str, chunks: int = CHUNKS) -> EngineHashes:
    """As of an engine: of a name, each of all before it."""
    chain = [hashlib.sha256(name.encode()).digest()]
    for _ in range(1, chunks):
        chain.append(hashlib.sha256(chain[-1]).digest())
    return EngineHashes(chain, CHUNK)


@pytest.mark.parametrize("transport", ["grpc", "tcp", "shm"])
@pytest.mark.parametrize("quality", ["raw", "high"])
def test_a_get_may_begin_behind_what_the_caller_has(shared: NodeProcess, transport: Transport, quality: str) -> None:
    layout = small_layout(f"engine-hashes-{transport}-{quality}")
    prompt = hashes("prompt")
    kv = random_kv(layout, len(prompt), seed=1)
    with Client(
        shared.address, strict=True, deadline=20.0, transport=transport, registry=CollectorRegistry()
    ) as client:
        cache = client.namespace(layout)
        # An engine's jobs: the end of a prompt, and its beginning later.
        assert cache.put(prompt, kv[:, :, 64:], quality=quality, first_token=64).stored == 2
        assert cache.lookup(prompt).tokens == 0
        behind = cache.lookup(prompt, first_token=64)
        assert (behind.tokens, len(behind.chunks)) == (96, 2)
        got, n = cache.get(prompt, first_token=64)
        assert n == 32
        shorter = EngineHashes(prompt.hashes[:4], CHUNK)
        assert cache.put(shorter, kv[:, :, :64], quality=quality).stored == 4
        whole, all_tokens = cache.get(prompt)
        assert all_tokens == 96
        assert bits(whole[:, :, 64:]) == bits(got)
        assert quality != "raw" or bits(whole) == bits(kv)
        room = np.zeros((layout.num_layers, 2, 20, *kv.shape[3:]), kv.dtype)
        part, n = cache.get(prompt, first_token=48, out=room)
        assert n == CHUNK  # as many whole chunks as there is room for
        assert bits(part) == bits(whole[:, :, 48:64])
        assert not room[:, :, 16:].any()
        assert cache.get(prompt, first_token=96).n == 0
        assert cache.get(hashes("another"), first_token=16).n == 0


def test_an_engines_hash_is_not_trusted_alone(shared: NodeProcess) -> None:
    """The same hash under other weights, and as tokens of the same namespace, is another object."""
    prompt, layout = hashes("prompt"), small_layout("engine-hashes-wrapped")
    kv = random_kv(layout, len(prompt), seed=2)
    with Client(shared.address, strict=True, deadline=20.0, registry=CollectorRegistry()) as client:
        cache = client.namespace(layout)
        assert cache.put(prompt, kv, quality="raw").stored == CHUNKS
        others = replace(layout, revision="r2")
        assert client.namespace(others).lookup(prompt).tokens == 0
        assert cache.lookup(range(len(prompt))).tokens == 0
        with pytest.raises(InvalidArgument, match="without extras"):
            client.namespace(layout, extras=Extras(salt="s")).lookup(prompt)
        with pytest.raises(InvalidArgument, match=r"of the layout's chunks.*got=32"):
            cache.lookup(EngineHashes(prompt.hashes, 32))
        with pytest.raises(LayoutError, match="use the sha256 mode"):
            cache.lookup(EngineHashes([b"12345678"], CHUNK))
        with pytest.raises(InvalidArgument, match="multiple of chunk_tokens"):
            cache.get(prompt, first_token=8)
        with pytest.raises(InvalidArgument, match="starts at the first token"):
            cache.get(prompt, first_token=16, refine=True)
    with Client(shared.address, tenant_key=bytes(32), registry=CollectorRegistry()) as stranger:
        assert stranger.namespace(layout).lookup(prompt).tokens == 0


def test_the_end_of_a_prompt_is_where_its_beginning_is(tmp_path: Path) -> None:
    """Nodes are chosen by a prompt's first chunk, also in calls that do not ask for it."""
    nodes = [NodeProcess(tmp_path), NodeProcess(tmp_path)]
    try:
        layout = small_layout("engine-hashes-placed")
        target = [node.address for node in nodes]
        with Client(target, strict=True, deadline=20.0, registry=CollectorRegistry()) as client:
            cache = client.namespace(layout)
            for number in range(8):
                prompt = hashes(f"placed {number}")
                cache.put(prompt, random_kv(layout, len(prompt), seed=number), quality="raw")
                assert [cache.lookup(prompt, first_token=first).tokens for first in (16, 48, 80)] == [96, 96, 96]
                assert cache.get(prompt, first_token=80).n == CHUNK
    finally:
        for node in nodes:
            node.kill()
