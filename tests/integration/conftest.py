"""A node for each test that asks: a real process on a free port, gone when the test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from node_process import NodeProcess

StartNode = Callable[..., NodeProcess]


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
