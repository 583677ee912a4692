"""Real nodes that share a real Redis: what one stored the other serves, and Redis makes no client wait.

Through every fault each call of a client ends within its deadline, what it gives is what was put, puts are stored by
the node itself, and when the fault is over the nodes share again by themselves.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import kv_objects as kv
import numpy as np
import pytest
from node_process import NodeProcess
from oracle import CHUNK_TOKENS, LAYOUT, Conversation
from polling import wait_until
from prometheus_client import CollectorRegistry
from redis_process import RedisCluster, RedisProcess
from relay import Relay
from typing_extensions import Self

import kvstore_codec as codec
from kvstore.tiers.redis import OBJECT_BYTES_MAX
from kvstore_client import Client, Hit
from kvstore_client.circuit import PAUSE_S_MAX
from kvstore_codec import Quality

DEADLINE_S = 1.0
SLACK_S = 0.05
FAULT_S = 4.0
RECOVERY_S_MAX = PAUSE_S_MAX + 10.0
CHUNKS = 6
Start = Callable[..., "User"]
pytestmark = pytest.mark.slow


class User:
    """A node and a client of it, whose every call is timed and whose every answer is checked."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.node = NodeProcess(folder, "--host-capacity", "64MiB", "--log-level", "warning", *flags)
        self._client = Client(self.node.address, deadline=DEADLINE_S, registry=CollectorRegistry())
        self._cache = self._client.namespace(LAYOUT)
        self.late: list[str] = []
        self.slowest_s = 0.0

    def put(self, talk: Conversation, quality: str = "high") -> int:
        """How many of its chunks are held now."""
        with self._timed("put"):
            result = self._cache.put(talk.tokens(CHUNKS), talk.kv(CHUNKS), quality=quality)
        return result.stored + result.have

    def lookup(self, talk: Conversation) -> Hit:
        with self._timed("lookup"):
            return self._cache.lookup(talk.tokens(CHUNKS))

    def tiers(self, talk: Conversation) -> list[str]:
        return [chunk.tier for chunk in self.lookup(talk).chunks]

    def get(self, talk: Conversation, quality: str = "raw") -> int:
        """How many chunks came, each right."""
        with self._timed("get"):
            values, tokens = self._cache.get(talk.tokens(CHUNKS), quality=quality)
        assert talk.wrong_chunks(values, tokens, Quality.parse(quality)) == []
        return int(tokens) // CHUNK_TOKENS

    def delete(self, talk: Conversation | None) -> None:
        """Without an end: that it is done is what counts."""
        self._cache.delete(None if talk is None else talk.tokens(CHUNKS), deadline=30.0)

    def counters(self) -> dict[str, int]:
        return self._client.stat(deadline=30.0).counters

    def close(self) -> None:
        self._client.close()
        self.node.kill()

    @contextlib.contextmanager
    def _timed(self, call: str) -> Iterator[None]:
        began_s = time.monotonic()
        yield
        took_s = time.monotonic() - began_s
        self.slowest_s = max(self.slowest_s, took_s)
        if took_s > DEADLINE_S + SLACK_S:
            self.late.append(f"{call} took {took_s:.3f} s")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisProcess]:
    found = RedisProcess(tmp_path / "redis", "--appendonly", "yes", "--appendfsync", "always")
    yield found
    found.stop(signal.SIGKILL)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a node on a redis_url, and its client."""
    with contextlib.ExitStack() as started:

        def begin(url: str, *flags: str) -> User:
            user = User(tmp_path, "--redis-url", url, *flags)
            started.callback(user.close)
            return user

        yield begin


# Shared


def test_a_second_node_serves_what_the_first_put_and_keeps_it(server: RedisProcess, start: Start) -> None:
    first, second = start(server.url, "--redis-write", "through"), start(server.url)
    talk = Conversation(1)
    lengths = [[len(chunk.blob) for chunk in talk.objects(CHUNKS, "high")]]
    lengths += [[codec.parse_header(chunk.blob).layer_bytes[0] for chunk in talk.objects(CHUNKS, "high")]]
    whole_bytes, low_bytes = map(sum, lengths)
    assert first.put(talk) == CHUNKS
    assert second.tiers(talk) == ["redis"] * CHUNKS
    assert {chunk.quality for chunk in second.lookup(talk).chunks} == {Quality.HIGH}
    before = sent_bytes(server)
    assert second.get(talk, "low") == CHUNKS
    assert low_bytes <= sent_bytes(server) - before < (low_bytes + whole_bytes) / 2, "a prefix is what travels"
    assert second.tiers(talk) == ["redis"] * CHUNKS, "a prefix is not kept"
    assert second.get(talk) == CHUNKS
    assert second.tiers(talk) == ["host"] * CHUNKS
    before = sent_bytes(server)
    assert second.get(talk) == CHUNKS
    assert sent_bytes(server) - before < low_bytes, "it is served from memory"
    counters = second.counters()
    assert (counters["reads.redis"], counters["reads.host"]) == (2 * CHUNKS, CHUNKS)
    assert counters["lookup_chunks.shared"] >= CHUNKS


def test_the_start_here_and_the_rest_in_redis_is_one_prefix(server: RedisProcess, start: Start) -> None:
    first, second = start(server.url, "--redis-write", "through"), start(server.url)
    talk = Conversation(1)
    kv.put(second.node.store, LAYOUT, talk.objects(2, "high"))
    assert first.put(talk) == CHUNKS
    assert second.tiers(talk) == ["host"] * 2 + ["redis"] * (CHUNKS - 2)
    assert second.get(talk) == CHUNKS
    assert second.tiers(talk) == ["host"] * CHUNKS


def test_delete_and_purge_reach_redis(server: RedisProcess, start: Start) -> None:
    first, second = start(server.url, "--redis-write", "through"), start(server.url)
    one, other = Conversation(1), Conversation(2)
    for talk in (one, other):
        assert first.put(talk) == CHUNKS
    first.delete(one)
    assert second.tiers(one) == []
    assert second.tiers(other) == ["redis"] * CHUNKS
    first.delete(None)
    assert second.tiers(other) == []
    assert server.command("DBSIZE") == 0


@pytest.mark.parametrize("write", ["off", "behind", "through"])
def test_what_is_put_goes_to_redis_as_configured(server: RedisProcess, start: Start, write: str) -> None:
    node, writer = start(server.url, "--redis-write", write), start(server.url, "--redis-write", "through")
    assert node.put(Conversation(1)) == CHUNKS
    if write == "behind":
        wait_until(lambda: server.command("DBSIZE") == CHUNKS, "it arrives behind the put")
    else:
        assert server.command("DBSIZE") == (CHUNKS if write == "through" else 0)
    assert writer.put(Conversation(2)) == CHUNKS
    assert node.get(Conversation(2)) == CHUNKS, "it reads from there in any case"


def test_an_object_too_large_for_redis_stays_here(server: RedisProcess, start: Start) -> None:
    node = start(server.url, "--redis-write", "through")
    layout = kv.small_layout("wide", layers=48, head_dim=1536)
    chunks = kv.chunks(layout, 2, seed=1)
    assert min(len(chunk.blob) for chunk in chunks) > OBJECT_BYTES_MAX
    results = kv.put(node.node.store, layout, chunks)
    assert [result.reason for result in results] == ["", ""]
    assert kv.fetch(node.node.store, layout, [chunk.hash for chunk in chunks]) == [chunk.blob for chunk in chunks]
    assert server.command("DBSIZE") == 0
    assert node.counters()["redis_failures.large"] == 2


def test_a_worse_version_does_not_replace_a_better_one(server: RedisProcess, start: Start) -> None:
    first, second = start(server.url, "--redis-write", "through"), start(server.url, "--redis-write", "through")
    talk, seen = Conversation(1), Conversation(1)
    assert first.put(talk, "low") == CHUNKS
    assert first.put(talk, "high") == CHUNKS
    kv.put(second.node.store, LAYOUT, talk.objects(CHUNKS, "medium"))  # as by a client that did not look it up
    assert {chunk.quality for chunk in start(server.url).lookup(seen).chunks} == {Quality.HIGH}


# Faults


class Load:
    """Calls without end to a node, by several threads, while a block runs: new conversations are put, those of before
    and a shared one are looked up and read."""

    def __init__(self, user: User, shared: Conversation, seed: int) -> None:
        self._user, self._shared = user, shared
        self._numbers = itertools.count(1000 * seed)
        self._stop = threading.Event()
        self._problems: list[BaseException] = []
        self._lock = threading.Lock()
        self.counts: Counter[tuple[str, bool]] = Counter()  # (what, whether all chunks of it)

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._run) for _ in range(3)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self._problems, self._problems[0]

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                talk = Conversation(next(self._numbers))
                self._count("stored", self._user.put(talk))
                self._count("read", self._user.get(talk))
                self._count("shared", self._user.get(self._shared, "low"))
                self._user.lookup(Conversation(next(self._numbers)))
                self._stop.wait(0.02)
        except BaseException as problem:  # noqa: BLE001 - of a thread, told by the one that waits for it
            self._problems.append(problem)

    def _count(self, what: str, chunks: int) -> None:
        with self._lock:
            self.counts[what, chunks == CHUNKS] += 1


def under_fault(start: Start, url: str, fault: Callable[[], object], heal: Callable[[], object], *flags: str) -> User:
    """A node through a fault and after it; a second one tells what is shared."""
    writer = start(url, "--redis-write", "through", *flags)
    user = start(url, *flags)
    shared = Conversation(7)
    assert writer.put(shared) == CHUNKS
    assert user.get(shared, "low") == CHUNKS
    with Load(user, shared, seed=1) as load:
        threading.Event().wait(0.5)
        fault()
        threading.Event().wait(FAULT_S)
        heal()
        numbers = itertools.count(5000)

        def shares_again() -> bool:
            talk = Conversation(next(numbers))
            user.put(talk)
            return writer.get(talk) == CHUNKS

        wait_until(shares_again, "what one puts the other reads", deadline_s=RECOVERY_S_MAX)
    print(dict(load.counts), f"slowest {user.slowest_s:.3f} s", user.counters())
    assert user.late == []
    assert load.counts["stored", True] == load.counts["read", True] > 10
    assert load.counts["stored", False] == load.counts["read", False] == 0, load.counts
    assert not [name for name in user.counters() if name.startswith("integrity_failures")]
    return user


@pytest.mark.parametrize("keeps", [True, False], ids=["full", "empty"])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_redis_stops_and_is_started_again(server: RedisProcess, start: Start, how: signal.Signals, keeps: bool) -> None:
    def heal() -> None:
        server.start()
        if not keeps:
            server.command("FLUSHALL")

    user = under_fault(start, server.url, lambda: server.stop(how), heal)
    assert user.counters()["redis_failures.connection"] > 0
    wait_until(lambda: user.get(Conversation(7), "low") == (CHUNKS if keeps else 0), "Redis says what it kept")


def test_redis_is_paused(server: RedisProcess, start: Start) -> None:
    user = under_fault(start, server.url, server.pause, server.resume)
    assert user.counters()["redis_failures.timeout"] > 0
    wait_until(lambda: user.get(Conversation(7), "low") == CHUNKS, "what it holds is read again")


def test_redis_is_paused_and_goes_on_now_and_then(server: RedisProcess, start: Start) -> None:
    """No circuit settles: each pause is shorter than those of the circuit."""
    stop = threading.Event()

    def flicker() -> None:
        while not stop.is_set():
            server.pause()
            stop.wait(0.4)
            server.resume()
            stop.wait(0.2)

    thread = threading.Thread(target=flicker)

    def heal() -> None:
        stop.set()
        thread.join()

    under_fault(start, server.url, thread.start, heal)


@pytest.mark.parametrize(
    ("piece_bytes", "pause_s"), [(1, 0.06), (4096, 0.2), (1 << 16, 0.15)], ids=["trickles", "slow", "far"]
)
def test_redis_is_slow(server: RedisProcess, start: Start, piece_bytes: int, pause_s: float) -> None:
    relay = Relay(server.port)
    try:
        under_fault(start, relay.url, lambda: relay.slow_down(piece_bytes, pause_s), relay.speed_up)
    finally:
        relay.close()


def test_questions_do_not_wait_behind_what_is_being_written(server: RedisProcess, start: Start) -> None:
    relay = Relay(server.port)
    try:
        user = start(relay.url)
        shared, talks = Conversation(7), [Conversation(number) for number in range(10, 30)]
        start(server.url, "--redis-write", "through").put(shared)
        relay.slow_down(1 << 16, 0.1)
        for talk in talks:
            assert {result.reason for result in kv.put(user.node.store, LAYOUT, talk.objects(CHUNKS, "high"))} == {""}
        assert user.get(shared, "low") == CHUNKS
        assert server.command("DBSIZE") < len(talks) * CHUNKS, "they are still on their way"
        wait_until(lambda: server.command("DBSIZE") == (len(talks) + 1) * CHUNKS, "they arrive", deadline_s=30)
        assert user.late == []
    finally:
        relay.close()


def test_what_is_deleted_while_it_is_on_its_way_to_redis_stays_away(server: RedisProcess, start: Start) -> None:
    relay = Relay(server.port)
    try:
        user, other = start(relay.url), start(server.url)
        relay.slow_down(1 << 16, 0.05)
        for number, whole in ((1, False), (2, True)):
            talk = Conversation(number)
            kv.put(user.node.store, LAYOUT, talk.objects(CHUNKS, "high"))
            user.delete(None if whole else talk)
            assert user.counters().get("tier_failures.redis.put", 0) == 0
            assert server.command("DBSIZE") == 0
            assert other.tiers(talk) == user.tiers(talk) == []
    finally:
        relay.close()


def test_redis_evicts_while_it_is_read(server: RedisProcess, start: Start) -> None:
    """A Redis that has no room for what is put, beside one conversation that everybody reads."""

    def shrink() -> None:
        server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-random")
        server.command("CONFIG", "SET", "maxmemory", "3mb")

    def heal() -> None:
        assert evicted(server) > 50
        server.command("CONFIG", "SET", "maxmemory", "0")

    user = under_fault(start, server.url, shrink, heal)
    assert "redis_circuit_changes" not in "".join(user.counters())


def test_redis_takes_nothing(server: RedisProcess, start: Start) -> None:
    def fill() -> None:
        server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
        server.command("CONFIG", "SET", "maxmemory", "1")

    user = under_fault(start, server.url, fill, lambda: server.command("CONFIG", "SET", "maxmemory", "0"))
    assert user.counters()["redis_failures.full"] > 0


@pytest.mark.parametrize("how", ["killed", "paused"])
def test_a_master_of_a_cluster_is_gone(cluster: RedisCluster, start: Start, how: str) -> None:
    victim = cluster.masters[1]
    fault, heal = (
        (victim.pause, victim.resume) if how == "paused" else (lambda: victim.stop(signal.SIGKILL), victim.start)
    )
    under_fault(start, cluster.url, fault, heal, "--redis-cluster")


def test_two_nodes_share_a_cluster(cluster: RedisCluster, start: Start) -> None:
    first = start(cluster.url, "--redis-cluster", "--redis-write", "through")
    second = start(cluster.url, "--redis-cluster")
    talk = Conversation(1)
    assert first.put(talk) == CHUNKS
    assert sum(bool(master.command("DBSIZE")) for master in cluster.masters) > 1, "it is spread"
    assert second.tiers(talk) == ["redis"] * CHUNKS
    assert second.get(talk, "low") == CHUNKS
    assert second.get(talk) == CHUNKS
    assert second.tiers(talk) == ["host"] * CHUNKS
    first.delete(talk)
    assert [master.command("DBSIZE") for master in cluster.masters] == [0, 0, 0]


def test_a_node_starts_without_redis(server: RedisProcess, start: Start) -> None:
    server.stop()
    user = start(server.url)
    talk = Conversation(1)
    assert user.put(talk) == CHUNKS
    assert user.get(talk) == CHUNKS
    server.start()
    numbers = itertools.count(10)

    def shares() -> bool:
        user.put(Conversation(next(numbers)))
        return bool(server.command("DBSIZE"))

    wait_until(shares, "puts go there once it is there", deadline_s=RECOVERY_S_MAX)
    assert user.late == []


def sent_bytes(server: RedisProcess) -> int:
    return int(info(server, "stats")["total_net_output_bytes"])


def evicted(server: RedisProcess) -> int:
    return int(info(server, "stats")["evicted_keys"])


def info(server: RedisProcess, section: str) -> dict[str, str]:
    text: str = server.command("INFO", section).decode()
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def test_the_oracle_sees_what_is_wrong() -> None:
    """Or the tests above would see nothing."""
    talk = Conversation(3)
    values = np.array(talk.kv(2))
    assert talk.wrong_chunks(values, 2 * CHUNK_TOKENS) == []
    assert talk.wrong_chunks(values, 2 * CHUNK_TOKENS, Quality.LOW) == []  # raw is all there is of it
    assert Conversation(4).wrong_chunks(values, 2 * CHUNK_TOKENS) == [0, 1]
    values[3, 1, CHUNK_TOKENS, 0, 0] += 1
    assert talk.wrong_chunks(values, 2 * CHUNK_TOKENS) == [1]
    (chunk,) = talk.objects(1, "high")
    ends = codec.parse_header(chunk.blob).layer_bytes
    assert [talk.is_legal_object(0, chunk.blob[:end]) for end in ends] == [True] * 3
    assert [talk.is_legal_object(0, chunk.blob[:end], Quality.MEDIUM) for end in ends] == [False, True, True]
    assert not talk.is_legal_object(0, chunk.blob[: ends[0] + 1])
    assert not talk.is_legal_object(0, bytes([chunk.blob[0] ^ 1]) + chunk.blob[1:])
