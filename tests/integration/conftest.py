"""Real nodes, processes on free ports: one for each test that asks, or one for all of a module's; and their clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bulk_peer import LAYOUT as BULK_LAYOUT
from node_process import NodeProcess
from profile_callers import CHUNK, Caller, names
from prometheus_client import CollectorRegistry
from small_profiles import transform_profile

import kvstore_codec as codec
from kvstore_client import Client, KVLayout, Profile

StartNode = Callable[..., NodeProcess]
DEADLINE_S = 30.0  # of what is not about time


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[StartNode]:
    """Starts nodes with the given flags; kills those that the test left running."""
    started: list[NodeProcess] = []

    def start(*flags: str, listen: str = "127.0.0.1:0", role: str = "serve") -> NodeProcess:
        node = NodeProcess(tmp_path, *flags, listen=listen, role=role)
        started.append(node)
        return node

    yield start
    for node in started:
        node.kill()


@pytest.fixture
def node(start_node: StartNode, tmp_path: Path) -> NodeProcess:
    """A node with a host and a disk tier."""
    return start_node("--host-capacity", "64MiB", "--disk-path", str(tmp_path / "disk"), "--disk-capacity", "256MiB")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """One node with a host and a disk tier for those of a module's tests that keep to a namespace of their own."""
    folder = tmp_path_factory.mktemp("shared")
    node = NodeProcess(folder, "--host-capacity", "256MiB", "--disk-path", str(folder / "disk"))
    yield node
    node.kill()


@pytest.fixture
def registry() -> CollectorRegistry:
    """Where a test's client counts."""
    return CollectorRegistry()


@pytest.fixture
def client(shared: NodeProcess, registry: CollectorRegistry) -> Iterator[Client]:
    """A strict client of the shared node."""
    with Client(shared.address, strict=True, deadline=DEADLINE_S, registry=registry) as client:
        yield client


@pytest.fixture
def layout() -> KVLayout:
    """A namespace, and so a profile, of a test's own."""
    return KVLayout.uniform(
        model=next(names), revision="r", num_layers=3, kv_heads=2, head_dim=16, dtype="bfloat16", chunk_tokens=CHUNK,
        rope=codec.RoPE(theta=10000.0),
    )  # fmt: skip


@pytest.fixture
def profile(layout: KVLayout) -> Profile:
    return transform_profile(layout)


@pytest.fixture
def caller() -> Iterator[Callable[..., Caller]]:
    """Makes clients with metrics of their own, which are closed when the test ends."""
    callers: list[Caller] = []

    def make(target: Any, **options: Any) -> Caller:
        callers.append(Caller(target, **options))
        return callers[-1]

    yield make
    for each in callers:
        each.client.close()


@pytest.fixture(scope="module")
def bulk_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """One for those of a module's tests that leave it as it was; its memory is small, its leases are short."""
    folder = tmp_path_factory.mktemp("bulk")
    node = NodeProcess(
        folder, "--host-capacity", "4MiB", "--disk-path", str(folder / "disk"), "--disk-capacity", "256MiB",
        "--metrics-listen", "127.0.0.1:0", "--lease-ms-max", "1500",
    )  # fmt: skip
    yield node
    node.kill()


@pytest.fixture
def nothing_stored(bulk_node: NodeProcess) -> Iterator[None]:
    """When the test has ended."""
    yield
    with Client(
        bulk_node.address, strict=True, deadline=20.0, transport="grpc", registry=CollectorRegistry()
    ) as client:
        client.namespace(BULK_LAYOUT).delete()
