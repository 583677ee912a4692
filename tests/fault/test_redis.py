"""The Redis tier on servers that stop, forget, hang and slow down.

Through all of it every call ends within `CALL_S_MAX`, what cannot be had is a miss, and once the fault is over the
tier is back by itself within `RECOVERY_S_MAX`.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from polling import wait_until
from redis_process import RedisProcess
from redis_tiers import RECOVERY_S_MAX, TIMEOUT_S, Told, bounded, redis_tier
from redis_trouble import CHUNKS, assert_all_miss, wait_for, wait_for_put
from relay import Relay
from tier_objects import LAYOUT, put, whole

from kvstore.errors import TierFailed
from kvstore.index.entry import ObjectKey
from kvstore.tiers.redis import RedisTier
from kvstore_client.circuit import FAILURES_MAX

Launch = Callable[..., RedisProcess]


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
