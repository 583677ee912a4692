"""The Redis tier on a Cluster whose masters die, hang, fail over and hand their slots to one another."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import kv_objects as kv
import pytest
from polling import wait_until
from redis_process import HOST, RedisCluster, RedisProcess
from redis_tiers import RECOVERY_S_MAX, TIMEOUT_S, Told, bounded, redis_tier
from tier_objects import LAYOUT, key_of, put, whole

from kvstore.errors import TierFailed
from kvstore.index.entry import ObjectKey
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_format import value_key
from kvstore_client.circuit import FAILURES_MAX

CHUNKS = kv.chunks(LAYOUT, 60, seed=1, quality="low")
KEYS = [(key_of(chunk), len(chunk.blob)) for chunk in CHUNKS]
NAMES = [value_key("kvstore", key) for key, _ in KEYS]
BLOBS = [chunk.blob for chunk in CHUNKS]


@pytest.fixture
def tier(cluster: RedisCluster, told: Told) -> Iterator[RedisTier]:
    """Holds CHUNKS."""
    found = redis_tier(cluster, told, timeout_s=TIMEOUT_S)
    for chunk in CHUNKS:
        put(found, chunk)
    yield found
    found.close()


def read_all(tier: RedisTier) -> list[bytes | None]:
    return [None if data is None else bytes(data) for data in bounded(lambda: tier.read_many(KEYS))]


def wait_for_all(tier: RedisTier) -> None:
    wait_until(lambda: read_all(tier) == BLOBS, "everything reads again", deadline_s=RECOVERY_S_MAX)


def errors_of(master: RedisProcess, kind: str) -> int:
    """How often a master has answered so."""
    for line in master.command("INFO", "errorstats").decode().splitlines():
        if line.startswith(f"errorstat_{kind}:"):
            return int(line.split("count=")[1])
    return 0


@pytest.mark.parametrize("how", ["killed", "paused"])
def test_one_master_gone_takes_its_third_and_no_more(
    cluster: RedisCluster, tier: RedisTier, told: Told, how: str
) -> None:
    victim = cluster.masters[1]
    lost = [cluster.master_of(name) is victim for name in NAMES]
    assert 5 < sum(lost) < 40
    if how == "killed":
        victim.stop(signal.SIGKILL)
    else:
        victim.pause()
    expected = [None if gone else blob for gone, blob in zip(lost, BLOBS, strict=True)]
    end_s = time.monotonic() + 4
    calls = slow = 0
    while time.monotonic() < end_s:
        start_s = time.monotonic()
        assert read_all(tier) == expected
        calls += 1
        slow += time.monotonic() - start_s > TIMEOUT_S / 2
        threading.Event().wait(0.01)
    assert calls > 50
    assert slow <= FAILURES_MAX + 4, "it costs a timeout a pause, not one a call"
    assert sorted(tier.states.values()) == ["closed", "closed", "open"]
    assert tier.state == "closed"
    found = bounded(lambda: tier.find(LAYOUT.namespace_id, [chunk.hash for chunk in CHUNKS], 0))
    assert len(found) == lost.index(True)
    with pytest.raises(TierFailed):
        bounded(lambda: put(tier, CHUNKS[lost.index(True)]))
    bounded(lambda: put(tier, CHUNKS[lost.index(False)]))
    if how == "paused":
        victim.resume()
        wait_for_all(tier)
    else:
        victim.start()
        wait_until(lambda: _puts(tier), "every master takes puts again", deadline_s=RECOVERY_S_MAX)
        wait_for_all(tier)
    assert not told.damages


def _puts(tier: RedisTier) -> bool:
    try:
        for chunk in CHUNKS:
            bounded(lambda chunk=chunk: put(tier, chunk))  # type: ignore[misc]
    except TierFailed:
        return False
    return True


def test_all_masters_paused_and_back(cluster: RedisCluster, tier: RedisTier) -> None:
    for master in cluster.masters:
        master.pause()
    for _ in range(6):
        assert read_all(tier) == [None] * len(CHUNKS)
        assert not bounded(tier.probe)
    assert tier.state == "open"
    for master in cluster.masters:
        master.resume()
    wait_for_all(tier)


def test_the_first_node_named_is_down_when_the_node_starts(cluster: RedisCluster, tier: RedisTier) -> None:
    cluster.masters[0].stop(signal.SIGKILL)
    late = redis_tier(cluster, timeout_s=TIMEOUT_S)
    expected = [
        None if cluster.master_index(name) == 0 else blob for name, blob in zip(NAMES, BLOBS, strict=True)
    ]  # fmt: skip
    wait_until(lambda: read_all(late) == expected, "the others tell where everything is")
    late.close()


def test_nobody_is_there_when_the_node_starts(cluster: RedisCluster, tier: RedisTier, told: Told) -> None:
    for master in cluster.masters:
        master.pause()
    late = redis_tier(cluster, told, timeout_s=TIMEOUT_S)
    for _ in range(6):
        assert read_all(late) == [None] * len(CHUNKS)
        assert bounded(lambda: late.find(LAYOUT.namespace_id, [CHUNKS[0].hash], 0)) == []
        with pytest.raises(TierFailed):
            bounded(lambda: put(late, CHUNKS[0]))
        with pytest.raises(TierFailed):
            bounded(lambda: late.purge(LAYOUT.namespace_id))
        assert not bounded(late.probe)
    assert told.kinds() == {"timeout", "open"}
    for master in cluster.masters:
        master.resume()
    wait_for_all(late)
    late.close()


def test_a_slot_on_its_way_to_another_master(cluster: RedisCluster, tier: RedisTier, told: Told) -> None:
    """ASK while it moves, for what has moved and for what is new; MOVED after, once."""
    source = cluster.master_of(NAMES[0])
    target = next(master for master in cluster.masters if master is not source)
    slot = source.command("CLUSTER", "KEYSLOT", NAMES[0])
    ids = {master: master.command("CLUSTER", "MYID") for master in cluster.masters}
    target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
    source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
    assert read_all(tier) == BLOBS, "still at the source"
    source.command("MIGRATE", HOST, target.port, "", 0, 5000, "KEYS", NAMES[0])
    assert read_all(tier) == BLOBS
    assert errors_of(source, "ASK") > 0
    assert len(tier.find(LAYOUT.namespace_id, [chunk.hash for chunk in CHUNKS], 0)) == len(CHUNKS)
    assert tier.truncate(KEYS[0][0], 300)
    assert tier.delete(KEYS[0][0])
    put(tier, CHUNKS[0])
    assert target.command("CLUSTER", "COUNTKEYSINSLOT", slot) == 1, "what is new is put where the slot goes"
    assert errors_of(source, "MOVED") == 0
    for master in (target, source, *cluster.masters):
        master.command("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
    assert read_all(tier) == BLOBS
    moved = errors_of(source, "MOVED")
    assert moved > 0
    for _ in range(5):
        assert read_all(tier) == BLOBS
    assert errors_of(source, "MOVED") == moved, "the new map is known"
    assert not told.failures
    assert not told.damages


def test_a_replica_takes_over(tmp_path: Path, cluster: RedisCluster, tier: RedisTier) -> None:
    victim = cluster.masters[2]
    replica = RedisProcess(
        tmp_path / "replica", "--cluster-enabled", "yes", "--cluster-node-timeout", "1000"
    )  # fmt: skip
    try:
        master_id = victim.command("CLUSTER", "MYID")
        replica.command("CLUSTER", "MEET", HOST, victim.port)
        wait_until(lambda: master_id in replica.command("CLUSTER", "NODES"), "the replica knows its master")
        replica.command("CLUSTER", "REPLICATE", master_id)
        wait_until(
            lambda: b"master_link_status:up" in replica.command("INFO", "replication"), "the replica is in step",
            deadline_s=20,
        )  # fmt: skip
        victim.stop(signal.SIGKILL)
        wait_for_all(tier)
        assert f"{HOST}:{replica.port}" in tier.states
        assert f"{HOST}:{victim.port}" not in tier.states
        put(tier, CHUNKS[0])
    finally:
        replica.stop(signal.SIGKILL)


def test_a_cluster_that_nobody_said_is_one(cluster: RedisCluster, tier: RedisTier) -> None:
    told = Told()

    class First:
        url = cluster.masters[0].url

    alone = redis_tier(First(), told, timeout_s=TIMEOUT_S)
    read_all(alone)
    assert told.kinds() == {"cluster"}
    assert all("set redis_cluster = true" in problem for problem in told.problems)
    assert alone.state == "closed"
    alone.close()


def test_a_server_that_is_no_cluster(tmp_path: Path) -> None:
    server, told = RedisProcess(tmp_path / "redis"), Told()
    tier = redis_tier(server, told, timeout_s=TIMEOUT_S, cluster=True)
    assert bounded(lambda: whole(tier, CHUNKS[0])) is None
    assert any("cluster support disabled" in problem for problem in told.problems)
    tier.close()
    server.stop()


def test_purge_is_not_done_before_every_master_has_answered(cluster: RedisCluster, tier: RedisTier) -> None:
    other = ObjectKey(bytes(32), bytes(32), 0)
    tier.put(other, bytes(32), b"x")
    cluster.masters[1].pause()
    with pytest.raises(TierFailed):
        tier.purge(LAYOUT.namespace_id)
    cluster.masters[1].resume()

    def purged() -> bool:
        try:
            tier.purge(LAYOUT.namespace_id)
        except TierFailed:
            return False
        return True

    wait_until(purged, "purge goes through", deadline_s=RECOVERY_S_MAX)
    assert read_all(tier) == [None] * len(CHUNKS)
    assert tier.read(other, 1) is not None
