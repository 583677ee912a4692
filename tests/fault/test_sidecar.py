"""A sidecar whose upstream is gone in one way or another: its clients have what it holds, and misses for the rest, at
once but for the first; nothing they get is wrong; and when the upstream is back it is used again by itself, and has
what it missed: puts, and deletes before anything is read from it."""

from __future__ import annotations

import itertools
import signal
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import kv_objects as kv
import pytest
import relayed_node
from bulk_peer import gauge
from fault_relay import FaultRelay
from node_process import NodeProcess
from oracle import CHUNK_TOKENS, LAYOUT, Conversation
from polling import wait_until
from prometheus_client import CollectorRegistry

from kvstore_client import Client
from kvstore_codec import Quality

DEADLINE_S = 2.0
SLACK_S = 0.5  # for a busy machine to schedule us
FAULT_S = 1.5
RECOVERY_S_MAX = 10.0  # promised are two seconds, on a machine that has nothing else to do
TIMEOUT_MS = 250
CHUNKS = 4
pytestmark = pytest.mark.slow


class Stack:
    """An upstream with a relay before each of its addresses, a sidecar, and a client of it whose every answer is
    checked. Both nodes have a disk, the upstream one that a put waits for: what it has taken outlives it."""

    def __init__(self, folder: Path, transport: str) -> None:
        self.folder, self.transport = folder, transport
        self.relay = FaultRelay(folder)
        self.upstream = self._upstream("127.0.0.1:0")
        self.start_sidecar()

    def start_sidecar(self) -> None:
        self.sidecar = NodeProcess(
            self.folder, "--upstream", self.relay.addresses[0], "--upstream-timeout-ms", str(TIMEOUT_MS),
            "--upstream-transport", self.transport,
            "--host-capacity", "256MiB", "--disk-path", str(self.folder / "sidecar"), "--disk-capacity", "256MiB",
            listen=f"unix://{self.folder}/sidecar.sock", role="sidecar",
        )  # fmt: skip
        self.client = Client(self.sidecar.address, deadline=DEADLINE_S, registry=CollectorRegistry())
        self._cache = self.client.namespace(LAYOUT)

    def _upstream(self, listen: str) -> NodeProcess:
        into = self.folder / "addresses"
        environment = (f"RELAYED_AT={','.join(self.relay.addresses[1:])}", f"RELAYED_INTO={into}")
        own = self.folder / f"{time.monotonic_ns()}.sock"
        node = NodeProcess(
            self.folder, "--bulk-listen", f"127.0.0.1:0,unix:{own}", "--host-capacity", "256MiB", "--disk-path",
            str(self.folder / "upstream"), "--disk-capacity", "256MiB", "--disk-write", "through", "--log-level",
            "warning", "--metrics-listen", "127.0.0.1:0", listen=listen,
            command=("env", *environment, sys.executable, relayed_node.__file__),
        )  # fmt: skip
        self.relay.point([node.address, *into.read_text().split("\n")])
        return node

    def bulk_connections(self) -> float:
        """That the upstream has open."""
        return gauge(self.upstream, "kvstore_bulk_connections")

    def put_upstream(self, talk: Conversation) -> None:
        kv.put(self.upstream.store, LAYOUT, talk.objects(CHUNKS, "high"))

    def get(self, talk: Conversation) -> int:
        """How many chunks came, each right and all in time."""
        began_s = time.monotonic()
        values, tokens = self._cache.get(talk.tokens(CHUNKS))
        assert time.monotonic() - began_s < DEADLINE_S + SLACK_S
        assert talk.wrong_chunks(values, tokens, Quality.HIGH) == []
        return int(tokens) // CHUNK_TOKENS

    def put(self, talk: Conversation) -> int:
        result = self._cache.put(talk.tokens(CHUNKS), talk.kv(CHUNKS))
        return result.stored + result.have

    def delete(self, talk: Conversation) -> tuple[str, ...]:
        """What the sidecar could not promise."""
        return self._cache.delete(talk.tokens(CHUNKS)).reasons

    def has_upstream(self, talk: Conversation) -> int:
        """How many chunks the upstream itself holds."""
        return len(kv.lookup(self.upstream.store, LAYOUT, talk.hashes(CHUNKS)))

    def upstream_state(self) -> str:
        (found,) = kv.stat(self.sidecar.store).upstreams
        return found.state

    def counters(self) -> Counter[str]:
        return Counter(self.client.stat(deadline=30.0).counters)

    def failures(self, call: str) -> int:
        return sum(count for name, count in self.counters().items() if f".{call}." in name and "upstream_fail" in name)

    def start_upstream_again(self) -> None:
        self.upstream = self._upstream(self.upstream.address)

    def close(self) -> None:
        self.client.close()
        self.relay.close()
        self.sidecar.kill()
        self.upstream.process.send_signal(signal.SIGCONT)
        self.upstream.kill()


@pytest.fixture
def stack(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stack]:
    found = Stack(tmp_path, getattr(request, "param", "auto"))
    yield found
    found.close()


def killed(stack: Stack) -> Callable[[], None]:
    stack.upstream.kill()
    return stack.start_upstream_again


def stopped(stack: Stack) -> Callable[[], None]:
    stack.upstream.process.send_signal(signal.SIGSTOP)
    return lambda: stack.upstream.process.send_signal(signal.SIGCONT)


def swallowed(stack: Stack) -> Callable[[], None]:
    stack.relay.inject("blackhole")
    return stack.relay.heal


TRANSPORTS = pytest.mark.parametrize("stack", ["grpc", "tcp", "shm"], indirect=True)


@TRANSPORTS
def test_objects_come_the_way_that_is_configured(stack: Stack) -> None:
    talks = [Conversation(number) for number in range(8)]
    for talk in talks:
        stack.put_upstream(talk)
    assert [stack.get(talk) for talk in talks] == [CHUNKS] * len(talks)
    assert stack.bulk_connections() == (0 if stack.transport == "grpc" else 1), "one, used again"
    assert stack.counters()["reads.upstream"] == CHUNKS * len(talks)


@TRANSPORTS
@pytest.mark.parametrize("fault", [killed, stopped, swallowed])
def test_upstream_is_gone_and_comes_back(stack: Stack, fault: Callable[[Stack], Callable[[], None]]) -> None:
    here, there = Conversation(1), [Conversation(number) for number in range(100, 200)]
    assert stack.put(here) == CHUNKS
    for talk in there[:2]:
        stack.put_upstream(talk)
    wait_until(lambda: stack.get(there[0]) == CHUNKS, "it is read from upstream")
    heal = fault(stack)
    began_s, reads, missed = time.monotonic(), 0, []
    for talk in itertools.cycle(there[1:]):
        assert stack.get(talk) == 0
        assert stack.get(here) == stack.get(there[0]) == CHUNKS, "what is here is a hit"
        missed.append(Conversation(1000 + reads))
        assert stack.put(missed[-1]) == CHUNKS
        assert stack.get(missed[-1]) == CHUNKS
        reads += 1
        if time.monotonic() - began_s > FAULT_S and reads > 3:
            break
    told = stack.counters()
    assert told[f"upstream_circuit_changes.{stack.relay.addresses[0]}.open"] == 1
    assert stack.failures("lookup") + stack.failures("put") + stack.failures("fetch") <= 2, "then it is not asked"
    assert stack.upstream_state() != "closed"
    heal()
    healed_s = time.monotonic()
    stack.put_upstream(there[99])
    wait_until(lambda: stack.get(there[99]) == CHUNKS, "it is asked again", deadline_s=RECOVERY_S_MAX)
    print(f"{reads} rounds without upstream; asked again after {time.monotonic() - healed_s:.2f} s")
    late = Conversation(5000)
    assert stack.put(late) == CHUNKS
    wait_until(lambda: stack.has_upstream(late) == CHUNKS, "puts go there again")
    for talk in missed:
        wait_until(lambda talk=talk: stack.has_upstream(talk) == CHUNKS, "so does what it missed")  # type: ignore[misc]
    print(f"{CHUNKS * len(missed)} objects that it missed are there after {time.monotonic() - healed_s:.2f} s")
    sent = CHUNKS * (len(missed) - 1)  # the first may have been on its way
    wait_until(lambda: stack.counters()["upstream_repairs.sent"] >= sent, "they are counted")
    assert not [name for name in stack.counters() if name.startswith("integrity_failures")]


@pytest.mark.parametrize("fault", [killed, stopped, swallowed])
def test_what_is_deleted_meanwhile_does_not_come_back(
    stack: Stack, fault: Callable[[Stack], Callable[[], None]]
) -> None:
    kept, *deleted = [Conversation(number) for number in range(1, 5)]
    for talk in (kept, *deleted):
        stack.put_upstream(talk)
    wait_until(lambda: stack.get(deleted[0]) == CHUNKS, "it is read from upstream")
    heal = fault(stack)
    wait_until(lambda: stack.get(deleted[1]) == 0 and stack.upstream_state() != "closed", "it is away")
    for talk in deleted:
        assert stack.delete(talk) == (), "told as done"
    heal()
    while stack.get(kept) < CHUNKS:  # so soon as anything comes from there again
        for talk in deleted:
            assert stack.get(talk) == 0, "what somebody was told is gone came back"
    for talk in deleted:
        assert stack.get(talk) == 0
        assert stack.has_upstream(talk) == 0
    told = stack.counters()
    assert told["upstream_deletes.owed"] == told["upstream_deletes.told"] == CHUNKS * len(deleted)


def test_a_delete_that_meets_the_fault_is_no_promise_but_is_kept(stack: Stack) -> None:
    """The sidecar does not know yet that nobody answers: its caller's deadline ends the call."""
    talk, other = Conversation(1), Conversation(2)
    stack.put_upstream(talk)
    stack.put_upstream(other)
    wait_until(lambda: stack.get(talk) == CHUNKS, "it is read from upstream")
    heal = stopped(stack)
    assert stack.delete(talk) != ()
    assert stack.get(talk) == 0
    heal()
    wait_until(lambda: stack.get(other) == CHUNKS, "it is asked again", deadline_s=RECOVERY_S_MAX)
    assert stack.get(talk) == 0
    assert stack.has_upstream(talk) == 0


def test_a_sidecar_that_is_killed_knows_what_its_upstream_missed(stack: Stack) -> None:
    gone, talks = Conversation(1), [Conversation(number) for number in range(10, 14)]
    stack.put_upstream(gone)
    wait_until(lambda: stack.get(gone) == CHUNKS, "it is read from upstream")
    heal = stopped(stack)
    wait_until(lambda: stack.get(Conversation(2)) == 0 and stack.upstream_state() != "closed", "it is away")
    assert stack.delete(gone) == ()
    for talk in talks:
        assert stack.put(talk) == CHUNKS
    wait_until(lambda: owed_objects(stack.folder) == CHUNKS * len(talks), "it is on disk")
    stack.client.close()
    stack.sidecar.kill()
    stack.start_sidecar()
    assert stack.get(gone) == 0
    heal()
    for talk in talks:
        wait_until(lambda talk=talk: stack.has_upstream(talk) == CHUNKS, "it has it now", deadline_s=RECOVERY_S_MAX)  # type: ignore[misc]
    assert stack.get(gone) == stack.has_upstream(gone) == 0
    wait_until(lambda: owed_objects(stack.folder) == 0, "nothing is owed any more")


def owed_objects(folder: Path) -> int:
    """As a sidecar would find them that is started now."""
    with closing(sqlite3.connect(folder / "sidecar" / "upstream.sqlite")) as database:
        (count,) = database.execute("SELECT count(*) FROM objects").fetchone()
    return int(count)


@TRANSPORTS
def test_upstream_dies_while_a_prompt_is_read(stack: Stack) -> None:
    """What came counts, the rest is a miss."""
    talk = Conversation(1)
    stack.put_upstream(talk)
    wait_until(lambda: stack.get(talk) == CHUNKS, "it is read from upstream")
    others = [Conversation(number) for number in range(10, 60)]
    for other in others:
        stack.put_upstream(other)
    stack.relay.pause_s = 0.01
    killer = threading.Timer(0.2, stack.upstream.kill)
    killer.start()
    came = [stack.get(other) for other in others]
    killer.join()
    assert came[-1] == 0
    assert stack.get(talk) == CHUNKS
    stack.start_upstream_again()
    fresh = Conversation(500)
    stack.put_upstream(fresh)
    stack.relay.pause_s = 0
    wait_until(lambda: stack.get(fresh) == CHUNKS, "it is asked again", deadline_s=RECOVERY_S_MAX)


@TRANSPORTS
@pytest.mark.parametrize("fault", ["garbage", "flip", "reset"])
def test_what_upstream_sends_wrongly_is_a_miss(stack: Stack, fault: str) -> None:
    """Never a wrong value (`get` looks), nor a late one."""
    talks = [Conversation(number) for number in range(12)]
    for talk in talks:
        stack.put_upstream(talk)
    assert stack.get(talks[0]) == CHUNKS
    stack.relay.inject(fault)
    came = [stack.get(talk) for talk in talks[1:5]]
    stack.relay.heal()
    assert came == [0] * 4 or fault != "garbage"
    wait_until(lambda: stack.get(talks[-1]) == CHUNKS, "it is asked again", deadline_s=RECOVERY_S_MAX)


def test_a_sidecar_starts_without_upstream(tmp_path: Path) -> None:
    upstream = NodeProcess(tmp_path, "--host-capacity", "64MiB")
    upstream.kill()
    sidecar = NodeProcess(
        tmp_path, "--upstream", upstream.address, "--host-capacity", "64MiB", listen=f"unix://{tmp_path}/sidecar.sock",
        role="sidecar",
    )  # fmt: skip
    try:
        with Client(sidecar.address, deadline=DEADLINE_S, registry=CollectorRegistry()) as client:
            cache, talk, other = client.namespace(LAYOUT), Conversation(1), Conversation(2)
            assert cache.put(talk.tokens(CHUNKS), talk.kv(CHUNKS)).stored == CHUNKS
            assert cache.get(talk.tokens(CHUNKS))[1] == CHUNKS * CHUNK_TOKENS
            upstream = NodeProcess(tmp_path, "--host-capacity", "64MiB", listen=upstream.address)
            kv.put(upstream.store, LAYOUT, other.objects(CHUNKS, "high"))
            wait_until(
                lambda: len(cache.lookup(other.tokens(CHUNKS)).chunks) == CHUNKS, "it is found",
                deadline_s=RECOVERY_S_MAX,
            )  # fmt: skip
    finally:
        sidecar.kill()
        upstream.kill()
