"""The client fails open: 30 cycles of `make failopen`, and what its 1,000 cycles have found, one by one."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import failopen
import pytest
from failopen_calls import HELD, HELD_CHUNKS, LAYOUT, is_right, kv_of, tokens_of
from fault_relay import FaultRelay
from hostile_server import Held, HostileServer
from kv_objects import small_layout
from kv_strategies import random_kv
from node_process import NodeProcess
from polling import wait_until
from prometheus_client import CollectorRegistry

import kvstore_codec as codec
from kvstore_client import Client
from kvstore_proto.v1 import transfer_pb2

CYCLES = 30  # each fault once over each transport
LATE_MS_MAX, RECOVERY_S_MAX = 500.0, 8.0  # for a machine that is busy; `make failopen` has the real ones
DEADLINE_S, SLACK_S = 0.5, 2.0
PATIENT_S = 30.0
TOKENS = tokens_of(HELD, HELD_CHUNKS)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    node = NodeProcess(tmp_path, "--host-capacity", "128MiB")
    yield node
    node.kill()


@pytest.fixture
def relay(tmp_path: Path, node: NodeProcess) -> Iterator[FaultRelay]:
    """Before the node's gRPC."""
    relay = FaultRelay(tmp_path)
    relay.point([node.address])
    yield relay
    relay.close()


def connect(address: str, **options: Any) -> Client:
    usual: dict[str, Any] = {"deadline": PATIENT_S, "transport": "grpc", "registry": CollectorRegistry()}
    return Client(address, **(usual | options))


@contextmanager
def in_time() -> Iterator[None]:
    began_s = time.monotonic()
    yield
    assert time.monotonic() - began_s < DEADLINE_S + SLACK_S


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_call_fails_open_under_every_fault_over_every_transport(tmp_path: Path) -> None:
    cycles = failopen.run(tmp_path, CYCLES, seed=20260)
    print(failopen.table(cycles), failopen.growth(cycles), sep="\n")
    assert failopen.problems(cycles, LATE_MS_MAX, RECOVERY_S_MAX) == dict.fromkeys(failopen.PROBLEMS, 0)
    assert len({(done.fault, done.transport) for done in cycles}) == CYCLES
    met = [sum(done.found["errors"].values()) + done.found["counts"].get("miss", 0) for done in cycles]
    assert all(met), "every fault was felt"
    assert sum(done.found["ways"] for done in cycles if done.transport not in ("grpc", "auto")) > CYCLES // 2


def test_a_connection_that_swallows_everything_is_replaced(relay: FaultRelay) -> None:
    """gRPC by itself would find out after a minute."""
    with connect(relay.addresses[0]) as client:
        cache = client.namespace(LAYOUT)
        assert cache.put(TOKENS, kv_of(HELD, HELD_CHUNKS), quality="raw").stored == HELD_CHUNKS
        relay.strand()
        assert cache.get(TOKENS, deadline=0.1)[1] == 0
        wait_until(lambda: cache.get(TOKENS, deadline=DEADLINE_S)[1] == len(TOKENS), "there are hits again")
        kv, tokens = cache.get(TOKENS)
        assert is_right(kv, tokens, HELD, HELD_CHUNKS)


def test_a_path_that_is_not_found_in_time_leaves_time_for_grpc() -> None:
    held = Held.of(small_layout("unfound"), 2, seed=5)
    over = threading.Event()

    def hangs(request: transfer_pb2.ConnectRequest, context: object) -> transfer_pb2.ConnectResponse:
        over.wait(PATIENT_S)
        return transfer_pb2.ConnectResponse()

    with HostileServer(lookup=held.lookup, fetch=held.fetch, connect=hangs) as server:
        with connect(server.address, transport="tcp") as client:
            assert client.namespace(held.layout).get(held.tokens, deadline=1.5)[1] == len(held.tokens)
        over.set()


@pytest.mark.parametrize("call_under_way", ["lookup", "follow"])
def test_a_stream_under_way_outlives_the_connection_that_it_is_on(
    node: NodeProcess, relay: FaultRelay, call_under_way: str
) -> None:
    """It waits patiently for its writer while impatient calls have the connection replaced."""
    layout = small_layout("live", layers=4)
    tokens = list(range(2 * layout.chunk_tokens))
    kv = random_kv(layout, len(tokens), 3)
    with connect(relay.addresses[0]) as client, connect(node.address) as direct, ThreadPoolExecutor(1) as thread:
        cache = client.namespace(layout)
        cache.lookup(tokens)
        (connected,) = client._async._session.connections._nodes.values()
        first = connected.stub
        if call_under_way == "lookup":
            node.process.send_signal(signal.SIGSTOP)
        reading = thread.submit(lambda: list(cache.stream(tokens, wait=PATIENT_S)))
        threading.Event().wait(0.2)
        node.process.send_signal(signal.SIGSTOP)
        for _ in range(8):
            cache.lookup(tokens, deadline=0.1)
        node.process.send_signal(signal.SIGCONT)
        assert connected.stub is not first
        with direct.namespace(layout).writer(tokens, quality="raw") as writer:
            for layer in range(layout.num_layers):
                writer.write(layer, kv[layer, 0], kv[layer, 1])
        assert len(reading.result(PATIENT_S)) == layout.num_layers


def test_leaving_what_is_held_takes_no_longer_than_a_call(node: NodeProcess) -> None:
    with connect(node.address) as client:
        cache = client.namespace(LAYOUT)
        cache.put(TOKENS, kv_of(HELD, HELD_CHUNKS), quality="raw")
        holding = cache.held(TOKENS, lease_ms=60_000, deadline=DEADLINE_S)
        assert holding.__enter__().tokens == len(TOKENS)
        node.process.send_signal(signal.SIGSTOP)
        with in_time():
            holding.__exit__(None, None, None)


def test_a_put_behind_another_that_is_being_coded_ends_at_its_deadline(node: NodeProcess) -> None:
    """The threads that code are the client's, and everybody's."""
    layout = small_layout("coded", layers=32, head_dim=128)
    tokens = list(range(256 * layout.chunk_tokens))
    kv = codec.empty(layout, len(tokens))
    kv[...] = 1
    with connect(node.address, threads=1) as client, ThreadPoolExecutor(1) as thread:
        cache = client.namespace(layout)
        cache.lookup(tokens)
        long = thread.submit(cache.put, tokens, kv, quality="high")
        wait_until(lambda: client._async._session.executor._work_queue.qsize() > 64 or long.done(), "it is being coded")
        with in_time():
            done = cache.put(tokens[16:], kv[:, :, 16:], quality="high", deadline=DEADLINE_S)
        assert done.tokens == 0 or long.done()
        assert long.result().stored == 256
