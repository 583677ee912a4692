"""What the client promises beyond round trips: where a prefix lives, how much of it is held, and by when."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from node_process import NodeProcess
from prometheus_client import CollectorRegistry
from prompts import layout, prompt

import kvstore_codec as codec
from kvstore_client import Client

StartNode = Callable[..., NodeProcess]
LAYOUT = layout()
PROMPT = prompt(LAYOUT, 64)
LATE_S_MAX = 0.25
CODING_S = 0.02  # less than coding four chunks of 32 MiB takes on a fast machine
HANDSHAKE_S = 0.4


def connect(target: str | list[str], **options: Any) -> Client:
    usual: dict[str, Any] = {"deadline": 5.0, "strict": True, "registry": CollectorRegistry()}
    return Client(target, **(usual | options))


@contextmanager
def in_time(deadline_s: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took <= deadline_s + LATE_S_MAX, f"{took:.3f} s for a deadline of {deadline_s} s"


def test_a_prefix_and_its_continuation_live_on_one_node(start_node: StartNode) -> None:
    """`first_token` says which KV is at hand, not where it belongs."""
    nodes = [start_node(), start_node()]
    prompts = [prompt(LAYOUT, 64, seed) for seed in range(12)]
    with connect([node.address for node in nodes]) as client:
        cache = client.namespace(LAYOUT)
        for each in prompts:
            cache.put(each.tokens[:32], each.kv[:, :, :32], quality="raw")
            cache.put(each.tokens, each.kv[:, :, 32:], quality="raw", first_token=32)
        assert [cache.get(each.tokens)[1] for each in prompts] == [64] * 12


def test_what_is_put_after_a_gap_is_no_prefix(node: NodeProcess) -> None:
    with connect(node.address) as client:
        cache = client.namespace(LAYOUT)
        done = cache.put(PROMPT.tokens, PROMPT.kv[:, :, 32:], quality="raw", first_token=32)
        assert (done.stored, done.tokens) == (2, 0)
        assert cache.get(PROMPT.tokens)[1] == 0
        cache.put(PROMPT.tokens[:32], PROMPT.kv[:, :, :32], quality="raw")
        done = cache.put(PROMPT.tokens, PROMPT.kv[:, :, 32:], quality="raw", first_token=32)
        assert (done.have, done.tokens) == (2, 64)
        assert cache.get(PROMPT.tokens)[1] == 64


@pytest.mark.slow
@pytest.mark.parametrize("quality", ["high", "lossless"])
def test_coding_large_chunks_keeps_the_deadline(
    node: NodeProcess, quality: str, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    """32 MiB a chunk, as an 8B model has in 256 tokens: coding one takes longer than the call may."""
    large = codec.KVLayout.uniform(
        model="8B", revision="r1", num_layers=32, kv_heads=8, head_dim=128, dtype="bfloat16", chunk_tokens=256
    )
    of = prompt(large, 1024)
    registry = CollectorRegistry()
    with connect(node.address, strict=False, registry=registry) as client:
        cache = client.namespace(large)
        with in_time(CODING_S):
            assert cache.put(of.tokens, of.kv, quality=quality, deadline=CODING_S).rejected == 4
        assert registry.get_sample_value("kvstore_client_rejected_chunks_total", {"reason": "deadline"}) == 4
        assert cache.put(of.tokens, of.kv, quality=quality, deadline=60.0).stored == 4
        whole, tokens = cache.get(of.tokens, deadline=60.0)
        assert tokens == 1024
        with in_time(CODING_S):
            kv, n = cache.get(of.tokens, deadline=CODING_S)
        assert n < 1024
        assert kv.tobytes() == codec.token_slice(whole, 0, n).tobytes()
        gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


def test_a_far_away_node_can_be_connected_to(node: NodeProcess) -> None:
    """The first byte takes a while to come back: a slow handshake, not a dead node."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_distant, args=(listener, node.address), daemon=True).start()
        with connect(f"127.0.0.1:{listener.getsockname()[1]}", deadline=2.0) as client:
            assert client.stat().objects == 0


def _distant(listener: socket.socket, address: str) -> None:
    host, port = address.rsplit(":", 1)
    with suppress(OSError):
        while True:
            client, _ = listener.accept()
            server = socket.create_connection((host, int(port)))
            threading.Thread(target=_pump, args=(client, server, 0.0), daemon=True).start()
            threading.Thread(target=_pump, args=(server, client, HANDSHAKE_S), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, delay_s: float) -> None:
    threading.Event().wait(delay_s)
    with suppress(OSError), source, sink:
        while data := source.recv(1 << 16):
            sink.sendall(data)


FORK = """
import os, signal, sys
from kvstore_client import Client, InvalidArgument
client = Client(sys.argv[1], deadline=5.0)
client.stat()
child = os.fork()
if child == 0:
    signal.alarm(10)  # it must not outlive the test, whatever it does
    try:
        client.stat()
    except InvalidArgument as error:
        os.write(1, (str(error) + chr(10)).encode())
    os._exit(7)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), client.stat().objects)
"""


def test_a_forked_child_is_told_rather_than_left_hanging(node: NodeProcess) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, node.address], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "7 0"
    assert "fork" in done.stdout.splitlines()[0]
