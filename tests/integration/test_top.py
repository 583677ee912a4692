"""`kvstore admin top` on a node under load, through a restart, and in scripts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import kv_objects as kv
import pytest
from command import OK, UNREACHABLE, admin, admin_json, error_line, run
from node_process import KVSTORE, NodeProcess, clean_environment
from polling import wait_until

LAYOUT = kv.small_layout()
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def heed_ctrl_c() -> None:
    """In the child: tests that run in the background of a shell inherit that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def load(node: NodeProcess) -> Iterator[None]:
    """Puts, lookups with as many hits as misses, and reads at low quality, until the block ends."""
    chunks = kv.chunks(LAYOUT, 4, seed=1, quality="high")
    hashes = [chunk.hash for chunk in chunks]
    kv.put(node.store, LAYOUT, chunks, durable=True)
    done = threading.Event()

    def work() -> None:
        seed = 1
        while not done.is_set():
            seed += 1
            kv.put(node.store, LAYOUT, kv.chunks(LAYOUT, 1, seed, quality="high"))
            kv.lookup(node.store, LAYOUT, [*hashes, *(bytes([number]) * 32 for number in range(4))])
            kv.fetch(node.store, LAYOUT, hashes, quality=4)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        yield
    finally:
        done.set()
        worker.join()


@pytest.fixture
def measured_node(start_node: Callable[..., NodeProcess], tmp_path: Path) -> NodeProcess:
    return start_node(
        "--host-capacity", "64MiB", "--disk-path", str(tmp_path / "disk"), "--metrics-listen", "127.0.0.1:0"
    )


def test_once_tells_rates(measured_node: NodeProcess) -> None:
    node = measured_node
    with load(node):
        rates = admin_json(node, "top", "--once", "--interval", "1", "--metrics", node.ready["metrics"])
        text = admin(node, "top", "--once", "--interval", "0.3", "--metrics", node.ready["metrics"]).stdout
    assert 0.9 < rates["interval_seconds"] < 10
    assert rates["hit_ratio"] == pytest.approx(0.5, abs=0.1)
    assert rates["lookup_chunks_per_s"] > 0
    host = next(tier for tier in rates["tiers"] if tier["tier"] == "host")
    assert host["reads_per_s"] == pytest.approx(rates["reads_by_quality_per_s"]["low"])
    assert host["read_bytes_per_s"] > host["reads_per_s"]
    assert rates["puts_per_s"]["stored"] > 0
    # A cycle of the load looks up eight chunks and reads four, where it is cut by the interval's ends.
    assert rates["lookup_chunks_per_s"] == pytest.approx(2 * host["reads_per_s"], rel=0.5)
    assert rates["stored_bytes_per_s"] > 0
    assert rates["answer_ms"] > 0
    for operation in ("lookup", "read", "commit"):
        latency = rates["latencies"][operation]
        assert latency["per_s"] > 0
        assert 0 < latency["p50_ms"] <= latency["p99_ms"]
    assert rates["tier_states"] == {"disk": "ok"}
    assert rates["queue_bytes"].keys() == {"disk", "redis", "upstream"}
    assert node.ready["node_id"] in text
    for word in ("host", "disk", "chunks/s", "stored", "p99", "commit"):
        assert word in text


def test_a_quiet_node_has_no_hit_ratio(node: NodeProcess) -> None:
    rates = admin_json(node, "top", "--once", "--interval", "0.1")
    assert (rates["hit_ratio"], rates["lookup_chunks_per_s"], rates["latencies"]) == (None, 0, None)


def test_json_lines_through_a_restart(start_node: Callable[..., NodeProcess]) -> None:
    """A line an interval while the node is there; one line on stderr when it goes; lines again when it is back."""
    first = start_node()
    top = subprocess.Popen(
        [KVSTORE, "admin", "top", "--json", "--interval", "0.1", "--target", first.address],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment(), preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    try:
        assert top.stdout is not None
        assert top.stderr is not None
        before = json.loads(top.stdout.readline())
        first.kill()
        assert re.fullmatch(rf"kvstore: trying again: {first.address} cannot be reached.*\n", top.stderr.readline())
        second = start_node(listen=first.address)
        kv.put(second.store, LAYOUT, kv.chunks(LAYOUT, 3, seed=1))
        lines = (json.loads(line) for line in top.stdout)
        after = next(line for line in lines if line["objects"] == 3)
        assert after["node_id"] == before["node_id"]
        assert all(rate >= 0 for rate in after["puts_per_s"].values()), "a restart is no negative rate"
        top.send_signal(signal.SIGINT)
        _, rest = top.communicate(timeout=20)
        assert (top.returncode, rest) == (OK, ""), "one line for the whole outage, none for ctrl-C"
    finally:
        top.kill()
        top.communicate()


class Terminal:
    """A process on a terminal of its own; `shown` is all it has written, without escape sequences."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = os.openpty()
        self.process = subprocess.Popen(
            arguments, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=heed_ctrl_c,
            env=clean_environment(COLUMNS="110", LINES="40", TERM="xterm-256color"),
        )  # fmt: skip
        os.close(theirs)
        self._bytes = bytearray()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def shown(self) -> str:
        return ESCAPES.sub("", self._bytes.decode(errors="replace"))

    def forget(self) -> None:
        self._bytes.clear()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        os.close(self._ours)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._ours, 1 << 16)
            except OSError:  # the process has ended
                return
            self._bytes.extend(data)


def test_live_until_ctrl_c(start_node: Callable[..., NodeProcess]) -> None:
    first = start_node("--node-id", "first")
    terminal = Terminal(str(KVSTORE), "admin", "top", "--interval", "0.1", "--target", first.address)
    try:
        wait_until(lambda: "first · kvstore" in terminal.shown, "top shows the node", deadline_s=30)
        assert "chunks/s" in terminal.shown
        first.kill()
        wait_until(lambda: "trying again" in terminal.shown, "top says that the node is away", deadline_s=30)
        terminal.forget()
        start_node("--node-id", "second", listen=first.address)
        wait_until(lambda: "second · kvstore" in terminal.shown, "top shows the node that came back", deadline_s=30)
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(20) == OK
        assert "Traceback" not in terminal.shown
        assert "interrupted" not in terminal.shown
    finally:
        terminal.close()


def test_nobody_there() -> None:
    error_line(run("admin", "top", "--once", "--target", "127.0.0.1:1"), UNREACHABLE)


def test_metrics_that_are_none(node: NodeProcess) -> None:
    line = error_line(admin(node, "top", "--once", "--metrics", "http://127.0.0.1:1/metrics"), UNREACHABLE)
    assert "metrics_listen" in line
    assert "http://" in error_line(admin(node, "top", "--once", "--metrics", "127.0.0.1:9464"), 2)
