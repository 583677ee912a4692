"""SIGTERM: calls in flight finish, nothing acknowledged is lost, the process exits 0 and leaves no trace."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import kv_objects as kv
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from node_process import NodeProcess
from polling import wait_until

from kvstore_proto.v1 import store_pb2 as pb

LAYOUT = kv.small_layout("wide", layers=64, head_dim=256)
StartNode = Callable[..., NodeProcess]


def watch_health(node: NodeProcess) -> Any:
    """A health stream that has seen SERVING."""
    stub = health_pb2_grpc.HealthStub(node.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=kv.DEADLINE_S)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    return watch


def stat_status(node: NodeProcess) -> grpc.StatusCode:
    try:
        kv.stat(node.store)
    except grpc.RpcError as error:
        call: Any = error
        status: grpc.StatusCode = call.code()
        return status
    return grpc.StatusCode.OK


def test_a_put_in_flight_finishes_and_survives(start_node: StartNode, tmp_path: Path) -> None:
    flags = ("--disk-path", str(tmp_path / "disk"))
    node = start_node(*flags)
    chunks = kv.chunks(LAYOUT, 2, seed=1)
    watch = watch_health(node)
    stream = kv.PutStream(node.store)
    stream.offer(LAYOUT, chunks)
    stream.whole(0, chunks[0].blob)

    node.process.send_signal(signal.SIGTERM)
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    stream.whole(1, chunks[1].blob)
    assert [result.outcome for result in stream.results()] == [pb.OUTCOME_STORED] * 2
    assert node.wait() == 0

    again = start_node(*flags)
    assert again.ready["objects"] == 2
    assert kv.fetch(again.store, LAYOUT, [chunk.hash for chunk in chunks]) == [chunk.blob for chunk in chunks]


def test_a_fetch_in_flight_finishes(start_node: StartNode) -> None:
    node = start_node()
    chunks = kv.chunks(LAYOUT, 8, seed=2)
    kv.put(node.store, LAYOUT, chunks)
    watch = watch_health(node)
    request = pb.FetchRequest(namespace_id=LAYOUT.namespace_id, chunk_hashes=b"".join(chunk.hash for chunk in chunks))
    stream = node.store.Fetch(request, timeout=kv.DEADLINE_S)
    received = len(next(stream).data)
    node.process.send_signal(signal.SIGTERM)
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    received += sum(len(piece.data) for piece in stream)
    assert received == sum(len(chunk.blob) for chunk in chunks)
    assert node.wait() == 0


def test_memory_puts_are_written_out_before_exit(start_node: StartNode, tmp_path: Path) -> None:
    flags = ("--disk-path", str(tmp_path / "disk"))
    node = start_node(*flags)
    chunks = kv.chunks(LAYOUT, 4, seed=3)
    kv.put(node.store, LAYOUT, chunks, durable=False)
    assert node.stop() == 0
    again = start_node(*flags)
    assert len(kv.lookup(again.store, LAYOUT, [chunk.hash for chunk in chunks])) == 4


def test_the_grace_ends(start_node: StartNode) -> None:
    node = start_node("--shutdown-grace-s", "0.3")
    stream = kv.PutStream(node.store)
    stream.offer(LAYOUT, kv.chunks(LAYOUT, 1, seed=4))
    began = time.monotonic()
    node.process.send_signal(signal.SIGTERM)
    with pytest.raises(grpc.RpcError):
        stream.receive()
    assert node.wait() == 0
    assert 0.3 <= time.monotonic() - began < 10


def test_a_second_signal_ends_the_grace(start_node: StartNode) -> None:
    node = start_node("--shutdown-grace-s", "600")
    watch = watch_health(node)
    stream = kv.PutStream(node.store)
    stream.offer(LAYOUT, kv.chunks(LAYOUT, 1, seed=5))
    node.process.send_signal(signal.SIGTERM)
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    node.process.send_signal(signal.SIGINT)
    with pytest.raises(grpc.RpcError):
        stream.receive()
    assert node.wait() == 0


def test_a_health_watcher_does_not_hold_up_the_exit(start_node: StartNode) -> None:
    node = start_node("--shutdown-grace-s", "60")
    watch = watch_health(node)
    began = time.monotonic()
    assert node.stop() == 0
    assert time.monotonic() - began < 10
    watch.cancel()


def test_no_new_calls_after_the_signal(start_node: StartNode) -> None:
    node = start_node()
    watch = watch_health(node)
    holding = kv.PutStream(node.store)
    holding.offer(LAYOUT, kv.chunks(LAYOUT, 1, seed=6))
    node.process.send_signal(signal.SIGTERM)
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    # the node stops listening right after that, not in the same instant
    refused = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    wait_until(lambda: stat_status(node) in refused, "new calls are refused")
    holding.cancel()
    assert node.wait() == 0
