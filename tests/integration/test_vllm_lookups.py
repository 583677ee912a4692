"""What a node that is away costs the vLLM connector's requests: a few lookups, then nothing; and TLS to it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority
from node_process import NodeProcess
from polling import wait_until
from vllm_sides import HELD, Engine, request, saved

from kvstore_client.circuit import FAILURES_MAX
from kvstore_client.integrations.vllm.lookups import LOOKUPS_MAX

StartNode = Callable[..., NodeProcess]
BLOCKS = list(range(1, 20))
LOOKUP_S = 1.0


@pytest.fixture
def start_engine() -> Iterator[Callable[..., Engine]]:
    started: list[Engine] = []

    def start(address: str, **extra: Any) -> Engine:
        started.append(Engine(address, 16, **extra))
        return started[-1]

    yield start
    for engine in started:
        engine.close()


def give_up(engine: Engine) -> None:
    """As many requests, one after the other, as it takes."""
    for number in range(FAILURES_MAX):
        assert engine.matched(request(f"failing-{number}")) == 0
    assert engine.count("lookups", outcome="failed") == FAILURES_MAX
    assert engine.count("circuit_changes", state="open") == 1


def skip(engine: Engine) -> None:
    """Twenty requests that wait for nobody."""
    began_s = time.monotonic()
    for number in range(20):
        assert engine.scheduler.matched(request(f"skipped-{number}"), 0) == (0, False)
    assert time.monotonic() - began_s < LOOKUP_S
    assert engine.count("lookups", outcome="skipped") == 20
    # One of them may have been a try, which nobody waited for.
    assert engine.count("lookups", outcome="failed") <= FAILURES_MAX + 1


def found_again(engine: Engine) -> None:
    numbers = iter(range(10_000))

    def hit() -> bool:
        return engine.matched(request(f"back-{next(numbers)}")) == HELD

    wait_until(hit, "the node is asked again", deadline_s=30)
    assert engine.count("circuit_changes", state="closed") == 1


def test_a_node_that_is_silent_is_not_waited_for(node: NodeProcess, start_engine: Callable[..., Engine]) -> None:
    engine = start_engine(node.address, lookup_s=LOOKUP_S)
    saved(engine, BLOCKS)
    node.process.send_signal(signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        give_up(engine)
        assert time.monotonic() - began_s > 2 * LOOKUP_S
        skip(engine)
    finally:
        node.process.send_signal(signal.SIGCONT)
    found_again(engine)


def test_a_crowd_of_requests_waits_for_a_silent_node_once(
    node: NodeProcess, start_engine: Callable[..., Engine]
) -> None:
    engine = start_engine(node.address, lookup_s=LOOKUP_S)
    saved(engine, BLOCKS)
    crowd = [request(f"r-{number}") for number in range(8 * LOOKUPS_MAX)]
    node.process.send_signal(signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        for each in crowd:
            engine.scheduler.arrived(each)
        assert [engine.matched(each) for each in crowd] == [0] * len(crowd)
        assert time.monotonic() - began_s < 4 * LOOKUP_S
        assert engine.count("lookups", outcome="failed") <= 2 * LOOKUPS_MAX
    finally:
        node.process.send_signal(signal.SIGCONT)


def test_a_node_that_was_killed_is_found_again(
    start_node: StartNode, start_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    flags = ("--host-capacity", "16MiB", "--disk-path", str(tmp_path / "disk"), "--disk-capacity", "64MiB")
    node = start_node(*flags)
    engine = start_engine(node.address, lookup_s=LOOKUP_S)
    saved(engine, BLOCKS)
    assert node.stop() == 0  # what it holds is on disk then
    give_up(engine)
    skip(engine)
    start_node(*flags, listen=node.address)
    found_again(engine)


def test_over_tls(start_node: StartNode, start_engine: Callable[..., Engine], tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    server, ours = authority.certificate("node", "DNS:node"), authority.certificate("engine")
    node = start_node(
        "--host-capacity", "16MiB", "--tls-cert", str(server.cert), "--tls-key", str(server.key),
        "--tls-client-ca", str(authority.ca),
    )  # fmt: skip
    keys = {"tls_ca": str(authority.ca), "tls_server_name": "node"}
    mine = {"tls_cert": str(ours.cert), "tls_key": str(ours.key)}
    saved(start_engine(node.address, **keys, **mine), BLOCKS)
    assert start_engine(node.address, **keys, **mine).matched(request()) == HELD
    for wrong in ({}, keys, {**keys, **mine, "tls_ca": str(stranger.ca)}, {**keys, **mine, "tls_server_name": "other"}):
        engine = start_engine(node.address, **wrong)
        assert engine.matched(request()) == 0
        assert engine.count("lookups", outcome="failed") == 1
