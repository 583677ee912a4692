"""The Redis tier and what lets it in: passwords, users, certificates; and a port where no Redis listens."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable

import pytest
from redis_process import HOST, RedisProcess, TlsFiles
from redis_tiers import TIMEOUT_S, Told, bounded, redis_tier
from redis_trouble import CHUNKS, assert_all_miss, wait_for
from tier_objects import LAYOUT, put, whole

from kvstore.errors import TierFailed
from kvstore.index.entry import ObjectKey
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_connection import Credentials

Launch = Callable[..., RedisProcess]


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
