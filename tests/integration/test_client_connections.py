"""The client's connections: a node killed and back, unix sockets, seeds that are dead."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from client_prompts import CHUNK, DEADLINE_S, counted, new_layout, prompt
from kv_strategies import bits
from node_process import NodeProcess
from prometheus_client import CollectorRegistry

from kvstore_client import Client, Hit, Unavailable

StartNode = Callable[..., NodeProcess]


def test_a_durable_put_survives_kill_9_and_the_client_reconnects(start_node: StartNode, tmp_path: Path) -> None:
    flags = ("--host-capacity", "64MiB", "--disk-path", str(tmp_path / "disk"), "--disk-capacity", "256MiB")
    node = start_node(*flags)
    layout = new_layout()
    tokens, kv = prompt(layout, 3)
    with Client(node.address, deadline=DEADLINE_S, registry=CollectorRegistry()) as client:
        cache = client.namespace(layout)
        result = cache.put(tokens, kv, quality="lossless", durable=True)
        assert (result.stored, result.durable) == (3, True)
        again = cache.put(tokens, kv, quality="lossless", durable=True)
        assert (again.have, again.durable) == (3, True)
        node.kill()
        start_node(*flags, listen=node.address)
        got, n = cache.get(tokens, min_quality="lossless")
        assert (n, bits(got)) == (3 * CHUNK, bits(kv))
        assert {chunk.tier for chunk in cache.lookup(tokens).chunks} <= {"host", "disk"}


def test_a_put_in_memory_does_not_claim_to_be_durable(start_node: StartNode) -> None:
    node = start_node("--host-capacity", "64MiB")
    layout = new_layout()
    with Client(node.address, strict=True, deadline=DEADLINE_S) as client:
        result = client.namespace(layout).put(*prompt(layout, 2), durable=True)
    assert not result.durable


def test_a_unix_socket(start_node: StartNode, tmp_path: Path) -> None:
    path = tmp_path / "node.sock"
    start_node(listen=f"unix:{path}")
    layout = new_layout()
    tokens, kv = prompt(layout, 2)
    for target in (f"unix://{path}", f"unix:{path}"):
        with Client(target, strict=True, deadline=DEADLINE_S) as client:
            client.namespace(layout).put(tokens, kv, quality="raw")
            assert bits(client.namespace(layout).get(tokens)[0]) == bits(kv)


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def test_one_of_several_seeds_is_dead(shared: NodeProcess) -> None:
    """Whichever seed a prompt belongs to, the one that lives serves it; also where the client is strict."""
    dead = f"127.0.0.1:{closed_port()}"
    registry = CollectorRegistry()
    layout = new_layout()
    with Client([dead, shared.address], strict=True, deadline=5.0, registry=registry) as client:
        cache = client.namespace(layout)
        for seed in range(8):
            tokens, kv = prompt(layout, 2, seed=seed)
            assert cache.put(tokens, kv, quality="raw").stored == 2
            assert bits(cache.get(tokens)[0]) == bits(kv)
        assert client.stat().node == shared.address
        with pytest.raises(Unavailable, match=dead):
            cache.delete()
    assert counted(registry, "failures", call="put", reason="unavailable") > 0
    with Client(f"{dead},{shared.address}", deadline=5.0, registry=CollectorRegistry()) as lenient:
        deleted = lenient.namespace(layout).delete()
    assert deleted.objects == 16
    (reason,) = deleted.reasons
    assert reason.startswith(f"{dead}: ")


def test_no_node_at_all(registry: CollectorRegistry, caplog: pytest.LogCaptureFixture) -> None:
    layout = new_layout()
    tokens, kv = prompt(layout, 2)
    target = f"127.0.0.1:{closed_port()}"
    with Client(target, deadline=1.0, registry=registry) as client:
        cache = client.namespace(layout)
        with caplog.at_level(logging.WARNING, "kvstore_client"):
            for _ in range(3):
                assert (cache.lookup(tokens), cache.get(tokens)[1]) == (Hit(), 0)
                assert cache.put(tokens, kv).rejected == 2
        with pytest.raises(Unavailable):
            client.stat()
    assert counted(registry, "misses", reason="unavailable") == 6
    assert counted(registry, "rejected_chunks", reason="unavailable") == 6
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["lookup", "get", "put"]
    with Client(target, deadline=1.0, strict=True) as client:
        for call in (client.namespace(layout).lookup, client.namespace(layout).get):
            with pytest.raises(Unavailable, match=target):
                call(tokens)
