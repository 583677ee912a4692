"""The Redis tier on servers that stop, hang, forget, fill up, slow down and refuse.

Through all of it every call ends within `CALL_S_MAX`, what cannot be had is a miss, and once the fault is over the
tier is back by itself within `RECOVERY_S_MAX`.
"""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kv_objects as kv
import pytest
from polling import wait_until
from redis_process import HOST, RedisProcess, TlsFiles
from redis_tiers import RECOVERY_S_MAX, TIMEOUT_S, Told, bounded, redis_tier
from relay import Relay
from tier_objects import LAYOUT, key_of, put, whole

from kvstore.errors import TierFailed, TierFull
from kvstore.index.entry import ObjectKey
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_connection import Credentials
from kvstore_client.circuit import FAILURES_MAX

CHUNKS = kv.chunks(LAYOUT, 8, seed=1, quality="low")
Launch = Callable[..., RedisProcess]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Starts a server, with options; it is gone when the test ends."""
    with contextlib.ExitStack() as started:

        def start(*options: str, **more: Any) -> RedisProcess:
            server = RedisProcess(tmp_path / "redis", *options, **more)
            started.callback(server.stop, signal.SIGKILL)
            return server

        yield start


@pytest.fixture
def server(launch: Launch) -> RedisProcess:
    return launch()


@pytest.fixture
def tier(server: RedisProcess, told: Told) -> Iterator[RedisTier]:
    found = redis_tier(server, told, timeout_s=TIMEOUT_S)
    yield found
    found.close()


def assert_all_miss(tier: RedisTier) -> None:
    """Every kind of call, each bounded: reads miss, changes raise."""
    key = key_of(CHUNKS[0])
    assert bounded(lambda: tier.read(key, 1)) is None
    assert bounded(lambda: tier.read_many([(key_of(chunk), 1) for chunk in CHUNKS])) == [None] * len(CHUNKS)
    assert bounded(lambda: tier.find(LAYOUT.namespace_id, [chunk.hash for chunk in CHUNKS], 0)) == []
    assert not bounded(tier.probe)
    changes: list[Callable[[], object]] = [
        lambda: put(tier, CHUNKS[0]), lambda: tier.delete(key), lambda: tier.truncate(key, 1),
        lambda: tier.purge(LAYOUT.namespace_id),
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(TierFailed):
            bounded(change)


def wait_for(tier: RedisTier, chunk: kv.StoredChunk) -> None:
    """Until the object is read again, as clients would: each call is bounded."""
    wait_until(lambda: bounded(lambda: whole(tier, chunk)) == chunk.blob, "it reads again", deadline_s=RECOVERY_S_MAX)


def wait_for_put(tier: RedisTier, chunk: kv.StoredChunk) -> None:
    def stored() -> bool:
        try:
            bounded(lambda: put(tier, chunk))
        except TierFailed:
            return False
        return True

    wait_until(stored, "it takes puts again", deadline_s=RECOVERY_S_MAX)


# Stopped and restarted


def test_stopped_and_restarted_empty(server: RedisProcess, tier: RedisTier, told: Told) -> None:
    put(tier, CHUNKS[0])
    server.stop()
    for _ in range(3):
        assert_all_miss(tier)
    assert tier.state == "open"
    assert told.circuits == ["open"], "told once"
    assert told.kinds() == {"connection", "open"}
    server.start()
    wait_for_put(tier, CHUNKS[1])
    assert told.circuits == ["open", "closed"]
    assert whole(tier, CHUNKS[0]) is None
    assert whole(tier, CHUNKS[1]) == CHUNKS[1].blob


@pytest.mark.parametrize("keeps", ["appendonly", "snapshot"])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_restarted_full(launch: Launch, told: Told, keeps: str, how: signal.Signals) -> None:
    options = ["--appendonly", "yes", "--appendfsync", "always"] if keeps == "appendonly" else []
    server = launch(*options)
    tier = redis_tier(server, told, timeout_s=TIMEOUT_S, ttl_s=1000)
    for chunk in CHUNKS:
        put(tier, chunk)
    if keeps == "snapshot":
        server.command("SAVE")
    server.stop(how)
    assert bounded(lambda: whole(tier, CHUNKS[0])) is None
    server.start()
    wait_for(tier, CHUNKS[0])
    assert [whole(tier, chunk) for chunk in CHUNKS] == [chunk.blob for chunk in CHUNKS]
    assert not told.damages
    tier.close()


def test_a_restart_that_nobody_noticed_is_no_failure(server: RedisProcess, tier: RedisTier, told: Told) -> None:
    """Connections from before are known to be dead before they are used."""
    put(tier, CHUNKS[0])
    server.stop()
    server.start()
    bounded(lambda: put(tier, CHUNKS[0]))
    assert whole(tier, CHUNKS[0]) == CHUNKS[0].blob
    server.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    assert whole(tier, CHUNKS[0]) == CHUNKS[0].blob
    assert not told.failures


@pytest.mark.slow
def test_while_it_loads_what_it_kept(launch: Launch, told: Told) -> None:
    """A large Redis answers LOADING for minutes after a restart. Here: 3 ms a key."""
    server = launch("--key-load-delay", "3000", "--loading-process-events-interval-bytes", "1024")
    tier = redis_tier(server, told, timeout_s=TIMEOUT_S)
    for chunk in CHUNKS:
        put(tier, chunk)
    for number in range(600):
        server.command("SET", f"other:{number}", bytes(2000))
    server.command("SAVE")
    server.stop()
    server.start(wait=False)
    wait_until(lambda: bounded(lambda: whole(tier, CHUNKS[0])) is None and "loading" in told.kinds(), "it says LOADING")
    server.wait()
    wait_for(tier, CHUNKS[0])
    assert [whole(tier, chunk) for chunk in CHUNKS] == [chunk.blob for chunk in CHUNKS]
    tier.close()


def test_not_there_when_the_node_starts(launch: Launch, told: Told) -> None:
    server = launch()
    server.stop()
    tier = redis_tier(server, told, timeout_s=TIMEOUT_S)
    assert_all_miss(tier)
    server.start()
    wait_for_put(tier, CHUNKS[0])
    tier.close()


# Paused


def test_paused_it_costs_a_timeout_a_pause_and_not_one_a_call(
    server: RedisProcess, tier: RedisTier, told: Told
) -> None:
    put(tier, CHUNKS[0])
    server.pause()
    end_s = time.monotonic() + 4
    calls = slow = 0
    while time.monotonic() < end_s:
        start_s = time.monotonic()
        assert bounded(lambda: whole(tier, CHUNKS[0])) is None
        calls += 1
        slow += time.monotonic() - start_s > TIMEOUT_S / 2
        threading.Event().wait(0.005)
    server.resume()
    assert calls > 100
    # It opens after FAILURES_MAX; then pauses of at least 0.25, 0.5, 1 and 2 s end within the 4 s.
    assert FAILURES_MAX <= slow <= FAILURES_MAX + 4
    wait_for(tier, CHUNKS[0])
    assert told.circuits == ["open", "closed"]


def test_paused_in_the_middle_of_calls_of_many_threads(server: RedisProcess, told: Told) -> None:
    tier = redis_tier(server, told, timeout_s=TIMEOUT_S)
    for chunk in CHUNKS:
        put(tier, chunk)
    stop = threading.Event()
    problems: list[BaseException] = []

    def use(seed: int) -> None:
        rng = random.Random(seed)
        try:
            while not stop.is_set():
                chunk = rng.choice(CHUNKS)
                assert bounded(lambda: whole(tier, chunk)) in (None, chunk.blob)  # noqa: B023
                stop.wait(0.001)
        except AssertionError as problem:
            problems.append(problem)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        server.pause()
        wait_until(lambda: tier.state == "open", "the circuit opens")
        server.resume()
        wait_until(lambda: tier.state == "closed", "the circuit closes", deadline_s=RECOVERY_S_MAX)
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]
    assert sorted(told.circuits) == ["closed"] * 3 + ["open"] * 3, "each change is told once, by whichever thread"
    tier.close()


# Slow


def test_a_server_that_sleeps(server: RedisProcess, tier: RedisTier, told: Told) -> None:
    put(tier, CHUNKS[0])
    sleeper = threading.Thread(target=lambda: server.command("DEBUG", "SLEEP", "2"))
    sleeper.start()
    wait_until(lambda: bounded(lambda: whole(tier, CHUNKS[0])) is None, "it sleeps")
    assert "timeout" in told.kinds()
    for _ in range(5):
        bounded(lambda: whole(tier, CHUNKS[0]))
    sleeper.join()
    wait_for(tier, CHUNKS[0])


@pytest.fixture
def relay(server: RedisProcess) -> Iterator[Relay]:
    found = Relay(server.port)
    yield found
    found.close()


def test_an_answer_that_trickles_is_given_up(relay: Relay, told: Told) -> None:
    """Each byte comes well within the timeout, the answer would take minutes."""
    tier = redis_tier(relay, told, timeout_s=TIMEOUT_S)
    put(tier, CHUNKS[0])
    relay.slow_down(1, TIMEOUT_S / 4)
    start_s = time.monotonic()
    assert bounded(lambda: whole(tier, CHUNKS[0])) is None
    assert time.monotonic() - start_s > 2 * TIMEOUT_S, "not for its first pause"
    for _ in range(FAILURES_MAX):
        assert bounded(lambda: whole(tier, CHUNKS[0])) is None
    assert tier.state == "open"
    assert "timeout" in told.kinds()
    relay.speed_up()
    wait_for(tier, CHUNKS[0])
    tier.close()


def test_an_answer_that_is_slow_but_steady_arrives(relay: Relay, told: Told) -> None:
    """It takes longer than one timeout, each piece less."""
    tier = redis_tier(relay, told, timeout_s=TIMEOUT_S)
    key = ObjectKey(LAYOUT.namespace_id, bytes(32), 0)
    tier.put(key, bytes(32), bytes(400_000))
    relay.slow_down(20_000, 0.015)
    start_s = time.monotonic()
    data = bounded(lambda: tier.read(key, 400_000))
    assert data is not None
    assert time.monotonic() - start_s > TIMEOUT_S
    assert not told.failures
    tier.close()


def test_a_server_that_does_not_take_what_it_is_sent(server: RedisProcess, tier: RedisTier) -> None:
    """The put of an object larger than what sockets buffer."""
    key = ObjectKey(LAYOUT.namespace_id, bytes(32), 0)
    large = bytes(8 << 20)
    bounded(lambda: tier.put(key, bytes(32), large))
    server.pause()
    with pytest.raises(TierFailed):
        bounded(lambda: tier.put(key, bytes(32), large))
    server.resume()
    wait_for_put(tier, CHUNKS[0])
    data = tier.read(key, len(large))
    assert data is None or bytes(data) == large, "the old version, the new one or none"


# Full


def test_full_without_eviction_takes_nothing_and_still_answers(
    server: RedisProcess, tier: RedisTier, told: Told
) -> None:
    keys = [put(tier, chunk) for chunk in CHUNKS]
    server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
    server.command("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(TierFull, match="maxmemory"):
        bounded(lambda: put(tier, CHUNKS[0]))
    assert [whole(tier, chunk) for chunk in CHUNKS] == [chunk.blob for chunk in CHUNKS]
    assert tier.delete_many(keys) == len(keys)
    assert tier.state == "closed", "a full server is no broken one"
    assert told.failures == {("put", "full"): 1}
    server.command("CONFIG", "SET", "maxmemory", "100mb")
    put(tier, CHUNKS[0])


def fill(tier: RedisTier, rng: random.Random, size_bytes: int) -> None:
    """Objects of a namespace that nobody asks for."""
    for _ in range(size_bytes // 50_000):
        tier.put(ObjectKey(bytes(32), rng.randbytes(32), 0), bytes(32), bytes(50_000))


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random", "volatile-ttl"])
def test_eviction_between_find_and_read_is_a_miss(server: RedisProcess, told: Told, policy: str) -> None:
    tier = redis_tier(server, told, timeout_s=1.0, ttl_s=1000)
    layout = kv.small_layout(layers=8, head_dim=64)
    chunks = kv.chunks(layout, 60, seed=2)
    server.command("CONFIG", "SET", "maxmemory-policy", policy)
    server.command("CONFIG", "SET", "maxmemory", "10mb")
    for chunk in chunks:
        put(tier, chunk, layout)
    found = tier.find(layout.namespace_id, [chunk.hash for chunk in chunks], 0)
    assert len(found) == len(chunks)
    fill(tier, random.Random(3), 20 << 20)
    read = tier.read_many([(each.key, each.length) for each in found])
    assert None in read, "nothing was evicted in between"
    assert all(data is None or bytes(data) == chunk.blob for data, chunk in zip(read, chunks, strict=True))
    assert not told.failures
    assert not told.damages
    tier.close()


@pytest.mark.slow
def test_eviction_during_reads_is_a_miss(server: RedisProcess, told: Told) -> None:
    """The same with everything at once, until a read has met an eviction a few times."""
    tier = redis_tier(server, told, timeout_s=5.0, ttl_s=1000)
    layout = kv.small_layout(layers=8, head_dim=64)
    chunks = kv.chunks(layout, 60, seed=2)
    server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    server.command("CONFIG", "SET", "maxmemory", "6mb")
    stop = threading.Event()

    def fill_on() -> None:
        rng = random.Random(3)
        while not stop.is_set():
            fill(tier, rng, 50_000)

    def lost() -> int:
        for chunk in chunks:
            put(tier, chunk, layout)
        found = tier.find(layout.namespace_id, [chunk.hash for chunk in chunks], 0)
        read = tier.read_many([(each.key, each.length) for each in found])
        assert all(data is None or bytes(data) == chunk.blob for data, chunk in zip(read, chunks, strict=False))
        return sum(data is None for data in read)

    filler = threading.Thread(target=fill_on)
    filler.start()
    try:
        total = 0
        end_s = time.monotonic() + 60
        while total < 3 and time.monotonic() < end_s:
            total += lost()
    finally:
        stop.set()
        filler.join()
    assert total >= 3, "nothing was evicted in between"
    assert not told.failures
    assert not told.damages
    tier.close()


# Refused


def test_a_wrong_password_is_counted_never_told_and_put_right(
    launch: Launch, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    server = launch(password="right-one")
    right = redis_tier(server, timeout_s=TIMEOUT_S)
    put(right, CHUNKS[0])
    server.url = server.url.replace("right-one", "wrong-one")
    wrong = redis_tier(server, told, timeout_s=TIMEOUT_S)
    for _ in range(2):
        assert_all_miss(wrong)
    assert told.kinds() == {"authentication", "open"}
    assert caplog.records, "it is logged"
    for text in (*told.problems, caplog.text):
        assert "wrong-one" not in text
    server.command("CONFIG", "SET", "requirepass", "wrong-one")
    wait_for(wrong, CHUNKS[0])
    for each in (right, wrong):
        each.close()


def test_a_password_beside_the_url(launch: Launch, told: Told) -> None:
    server = launch(password="p@ss/word")
    server.url = f"redis://{HOST}:{server.port}"
    tier = redis_tier(server, told, credentials=Credentials("p@ss/word"), timeout_s=TIMEOUT_S)
    put(tier, CHUNKS[0])
    assert whole(tier, CHUNKS[0]) == CHUNKS[0].blob
    nobody = redis_tier(server, told, timeout_s=TIMEOUT_S)
    assert whole(nobody, CHUNKS[0]) is None
    assert told.kinds() == {"authentication"}
    for each in (tier, nobody):
        each.close()


def test_a_user_who_may_only_read(server: RedisProcess, tier: RedisTier, told: Told) -> None:
    put(tier, CHUNKS[0])
    server.command("ACL", "SETUSER", "reader", "on", ">secret", "~kvstore:*", "+getrange", "+strlen")
    server.url = server.url.replace("redis://", "redis://reader:secret@")
    reader = redis_tier(server, told, timeout_s=TIMEOUT_S, ttl_s=100, read_only=True)
    assert whole(reader, CHUNKS[0]) == CHUNKS[0].blob
    assert len(reader.find(LAYOUT.namespace_id, [CHUNKS[0].hash], 0)) == 1
    writer = redis_tier(server, told, timeout_s=TIMEOUT_S)
    with pytest.raises(TierFailed):
        put(writer, CHUNKS[1])
    assert told.failures == {("put", "refused"): 1}
    for each in (reader, writer):
        each.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return TlsFiles(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return TlsFiles(tmp_path_factory.mktemp("other-tls"))


def test_tls(launch: Launch, told: Told, certificates: TlsFiles, others: TlsFiles) -> None:
    server = launch(tls=certificates, password="secret")
    ours = Credentials(None, certificates.ca, certificates.certificate, certificates.key)
    tier = redis_tier(server, told, credentials=ours, timeout_s=1.0)
    put(tier, CHUNKS[0])
    key = ObjectKey(LAYOUT.namespace_id, bytes(32), 0)
    large = random.Random(4).randbytes(8 << 20)
    tier.put(key, bytes(32), large)
    data = tier.read(key, len(large))
    assert data is not None
    assert bytes(data) == large
    assert not told.failures
    refused = {
        "another authority": Credentials(None, others.ca, certificates.certificate, certificates.key),
        "the system's authorities": Credentials(None, None, certificates.certificate, certificates.key),
        "no certificate of ours": Credentials(None, certificates.ca),
        "a certificate of another authority": Credentials(None, certificates.ca, others.certificate, others.key),
    }
    for what, credentials in refused.items():
        stranger = redis_tier(server, told, credentials=credentials, timeout_s=TIMEOUT_S)
        assert bounded(lambda stranger=stranger: whole(stranger, CHUNKS[0])) is None, what  # type: ignore[misc]
        stranger.close()
    url = server.url
    for wrong in (url.replace(HOST, "localhost"), url.replace("rediss", "redis")):
        server.url = wrong  # a name that is not in its certificate; no TLS
        stranger = redis_tier(server, told, credentials=ours, timeout_s=TIMEOUT_S)
        assert bounded(lambda stranger=stranger: whole(stranger, CHUNKS[0])) is None, wrong  # type: ignore[misc]
        stranger.close()
    assert told.failures == {("read", "connection"): 6}
    server.pause()
    silent = redis_tier(server, told, credentials=ours, timeout_s=TIMEOUT_S)
    assert bounded(lambda: whole(silent, CHUNKS[0])) is None
    server.resume()
    server.url = url
    assert whole(tier, CHUNKS[0]) == CHUNKS[0].blob
    for each in (tier, silent):
        each.close()


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0" * 100, b"$5\r\nshort", b"*-7\r\n:x\r\n", b"", None],
    ids=["http", "zeros", "half-a-reply", "nonsense", "closes", "silent"],
)  # fmt: skip
def test_something_that_is_no_redis(told: Told, answer: bytes | None) -> None:
    """It takes connections, says `answer` to whatever comes, and closes unless it is silent."""
    with socket.create_server((HOST, 0)) as listener:
        connections = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connections.append(connection)
                if answer is not None:
                    connection.recv(1 << 16)
                    connection.sendall(answer)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()

        class Address:
            url = f"redis://{HOST}:{listener.getsockname()[1]}"

        tier = redis_tier(Address(), told, timeout_s=TIMEOUT_S)
        for _ in range(2):
            assert_all_miss(tier)
        assert told.kinds() <= {"connection", "timeout", "open"}
        assert tier.state == "open"
        tier.close()
        listener.shutdown(socket.SHUT_RDWR)
    for connection in connections:
        connection.close()
