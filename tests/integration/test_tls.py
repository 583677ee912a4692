"""TLS between clients, a sidecar and nodes, as processes: what is verified, by whom, and that nothing falls back."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import command
import pytest
from certificates import Authority, Certificate
from command import OK, PROBLEM, UNREACHABLE, USAGE, error_line
from kv_objects import small_layout
from kv_strategies import bits, random_kv
from node_process import NodeProcess
from polling import wait_until
from prometheus_client import CollectorRegistry

from kvstore.cli.app import run
from kvstore.service.bulk.listener import HELLO_S_MAX
from kvstore_client import TLS, Client, DeadlineExceeded, Unavailable
from kvstore_client.deadline import Deadline
from kvstore_client.transports.bulk_connection import BulkConnection
from kvstore_client.transports.bulk_path import Transport

LAYOUT = small_layout("tls")
TOKENS = list(range(4 * LAYOUT.chunk_tokens))
KV = random_kv(LAYOUT, len(TOKENS), 1)
DEADLINE_S = 20.0
BOTH: tuple[Transport, ...] = ("grpc", "tcp")
SMALL = ("--host-capacity", "16MiB", "--metrics-listen", "127.0.0.1:0")


@dataclass(frozen=True)
class Site:
    """`open` lets every client in that trusts it, `closed` those with a certificate; `plain` knows no TLS. The bulk
    path of `open` is at another address than its certificate is for."""

    authority: Authority
    stranger: Authority
    server: Certificate
    client: Certificate
    foreign: Certificate  # of the stranger
    open: NodeProcess
    closed: NodeProcess
    plain: NodeProcess


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("tls")
    authority, stranger = Authority(folder / "ours"), Authority(folder / "theirs")
    server, client, foreign = authority.certificate("node"), authority.certificate("me"), stranger.certificate("node")
    in_use = Certificate(folder / "in-use.pem", folder / "in-use.key")
    install(server, in_use)
    with contextlib.ExitStack() as stack:

        def start(*flags: str | Path) -> NodeProcess:
            node = NodeProcess(folder, *SMALL, *map(str, flags))
            stack.callback(node.kill)
            return node

        with ThreadPoolExecutor() as at_once:
            opened = at_once.submit(
                start, "--tls-cert", in_use.cert, "--tls-key", in_use.key, "--bulk-listen", "127.0.0.2:0"
            )  # fmt: skip
            closed = at_once.submit(
                start, "--tls-cert", server.cert, "--tls-key", server.key, "--tls-client-ca", authority.ca
            )  # fmt: skip
            plain = at_once.submit(start)
        yield Site(
            authority, stranger, in_use, client, foreign, opened.result(), closed.result(), plain.result()
        )  # fmt: skip


def install(certificate: Certificate, place: Certificate) -> None:
    """As tools that renew certificates do: each file at once."""
    for source, target in ((certificate.key, place.key), (certificate.cert, place.cert)):
        shutil.copy(source, target.with_suffix(".new"))
        target.with_suffix(".new").replace(target)


def connect(node: NodeProcess, tls: TLS | None, transport: Transport = "grpc", *, strict: bool = True) -> Client:
    return Client(
        node.address, tls=tls, transport=transport, strict=strict, deadline=DEADLINE_S, registry=CollectorRegistry()
    )


def round_trip(client: Client) -> bool:
    """Whether what is put comes back; leaves nothing behind."""
    cache = client.namespace(LAYOUT)
    try:
        cache.put(TOKENS, KV, quality="raw")
        got, tokens = cache.get(TOKENS)
        return tokens == len(TOKENS) and bits(got) == bits(KV)
    finally:
        cache.delete()


def count(node: NodeProcess, sample: str) -> float:
    found = re.search(rf"^{re.escape(sample)} (\S+)", node.metrics(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def bulk_address(node: NodeProcess) -> tuple[str, int]:
    """Where it listens for bulk connections over TCP, from the kernel."""
    own = {node.address.rpartition(":")[2], node.ready["metrics"].split("/")[2].rpartition(":")[2]}
    done = subprocess.run(
        [sys.executable, "-c", LISTENING, str(node.process.pid)], capture_output=True, text=True, check=True
    )
    (found,) = [line.split() for line in done.stdout.splitlines() if line.split()[1] not in own]
    return found[0], int(found[1])


LISTENING = """
import psutil, sys
for each in psutil.Process(int(sys.argv[1])).net_connections("tcp"):
    if each.status == "LISTEN": print(*each.laddr)
"""


@pytest.mark.parametrize("transport", BOTH)
def test_what_is_put_comes_back(site: Site, transport: Transport) -> None:
    """The bulk path of `open` is elsewhere, and its certificate is still that of the address the client was given."""
    for node, tls in ((site.open, site.authority.trusted()), (site.closed, site.authority.trusted(site.client))):
        gets = 'kvstore_rpc_seconds_count{method="BulkGet",status="OK"}'
        before = count(node, gets)
        with connect(node, tls, transport) as client:
            assert round_trip(client)
        assert count(node, gets) == before + (transport == "tcp")


def test_the_name_may_be_another_than_the_targets(site: Site) -> None:
    elsewhere = f"localhost:{site.open.address.rpartition(':')[2]}"
    for name, reached in ((None, False), ("127.0.0.1", True)):
        with Client(
            elsewhere, tls=site.authority.trusted(server_name=name), transport="tcp", deadline=DEADLINE_S,
            registry=CollectorRegistry(),
        ) as client:  # fmt: skip
            assert round_trip(client) == reached


HOSTILE: dict[str, tuple[Callable[[Site], NodeProcess], Callable[[Site], TLS | None], str]] = {
    "no TLS": (lambda site: site.open, lambda site: None, "does it want TLS"),
    "a plain node": (lambda site: site.plain, lambda site: site.authority.trusted(), "does not speak TLS"),
    "wrong CA": (lambda site: site.open, lambda site: site.stranger.trusted(), "not signed by the CA"),
    "wrong name": (
        lambda site: site.open,
        lambda site: site.authority.trusted(server_name="other.example"),
        "for another name",
    ),
    "no certificate": (lambda site: site.closed, lambda site: site.authority.trusted(), "a client's certificate"),
    "a stranger's certificate": (
        lambda site: site.closed,
        lambda site: site.authority.trusted(site.foreign),
        "a client's certificate",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_who_cannot_be_verified_is_a_miss_with_its_cause(
    site: Site, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    node, tls, cause = (each(site) if callable(each) else each for each in HOSTILE[case])
    assert isinstance(node, NodeProcess)
    assert tls is None or isinstance(tls, TLS)
    began_s = time.monotonic()
    with connect(node, tls, "tcp", strict=False) as client, caplog.at_level(logging.WARNING):
        cache = client.namespace(LAYOUT)
        assert cache.get(TOKENS).n == 0
        assert cache.get(TOKENS).n == 0
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("get:")]
    assert len(lines) == 1, caplog.text
    assert str(cause) in lines[0]
    with connect(node, tls, "tcp") as client, pytest.raises(Unavailable, match=str(cause)):
        client.namespace(LAYOUT).get(TOKENS)
    assert time.monotonic() - began_s < DEADLINE_S, "nothing waited for its deadline"


class Impostor:
    """Listens where a node told its clients to go. `tls`: its certificate; None: it answers nothing."""

    def __init__(self, certificate: Certificate | None) -> None:
        self._certificate = certificate
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.received = b""
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            accepted, _ = self._listener.accept()
            with accepted:
                accepted.settimeout(DEADLINE_S)
                if self._certificate is None:
                    self.received = accepted.recv(1 << 16)
                    accepted.recv(1)  # until the other side is gone
                    return
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(self._certificate.cert, self._certificate.key)
                with context.wrap_socket(accepted, server_side=True) as spoken:
                    self.received = spoken.recv(1 << 16)

    def close(self) -> None:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        self._listener.close()


def bulk_connection(seed: str, address: str, tls: TLS, deadline_s: float = DEADLINE_S) -> BulkConnection:
    return BulkConnection(seed, address, bytes(16), Deadline(deadline_s), tls.load())


@pytest.mark.parametrize(("of", "cause"), [("another host", "mismatch"), ("a stranger", "CERTIFICATE_VERIFY_FAILED")])
def test_no_ticket_goes_to_an_address_that_is_not_the_nodes(site: Site, of: str, cause: str) -> None:
    """The same authority signed the first one's certificate, and for the address that is connected to."""
    seed = "127.0.0.9:7070" if of == "another host" else "127.0.0.1:7070"
    impostor = Impostor(site.server if of == "another host" else site.foreign)
    with contextlib.closing(impostor), pytest.raises(Unavailable, match=cause):
        bulk_connection(seed, impostor.address, site.authority.trusted())
    assert impostor.received == b""


def test_a_peer_that_stops_in_the_handshake_costs_the_deadline_and_sees_no_plain_text(site: Site) -> None:
    impostor = Impostor(None)
    began_s = time.monotonic()
    with contextlib.closing(impostor), pytest.raises(Unavailable, match="timed out"):
        bulk_connection("127.0.0.1:7070", impostor.address, site.authority.trusted(), 0.3)
    assert time.monotonic() - began_s < DEADLINE_S / 2
    assert impostor.received[:2] == b"\x16\x03", "the hello of TLS"


@pytest.mark.parametrize("own", [True, False])
def test_unix_sockets_that_a_node_elsewhere_tells_are_of_this_user_only(site: Site, own: bool) -> None:
    if os.geteuid() != 0:
        pytest.skip("another user's socket needs root")
    name = f"kvstore-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        if not own:
            os.seteuid(65534)
        try:
            listener.listen()  # the kernel notes by whom
        finally:
            os.seteuid(0)
        with pytest.raises(DeadlineExceeded if own else Unavailable, match="in time" if own else "not of this user"):
            bulk_connection("127.0.0.1:7070", f"unix-abstract:{name}", site.authority.trusted(), 0.3)
        accepted, _ = listener.accept()
        with accepted:
            assert bool(accepted.recv(100)) == own, "a stranger is told nothing"


def test_garbage_and_silence_at_the_ports_end_in_time(site: Site) -> None:
    refused = 'kvstore_bulk_refused_total{reason="tls"}'
    before = count(site.open, refused)
    host, port = site.open.address.rsplit(":", 1)
    silent = socket.create_connection(bulk_address(site.open), timeout=DEADLINE_S)
    for address in ((host, int(port)), bulk_address(site.open)):
        for garbage in (b"KVB" + bytes(61), b"\x16\x03\x01\x02\x00\x01" + os.urandom(600), b"PRI * HTTP/2.0\r\n\r\n"):
            with socket.create_connection(address, timeout=DEADLINE_S) as connection:
                connection.sendall(garbage)
                with contextlib.suppress(ConnectionError):
                    assert not connection.recv(1 << 16).startswith(b"\x00")  # an alert, or the end
    began_s = time.monotonic()
    with silent:
        silent.sendall(b"\x16\x03\x01")  # a handshake that goes no further
        assert silent.recv(1) == b""
    assert time.monotonic() - began_s < HELLO_S_MAX + DEADLINE_S / 2
    wait_until(lambda: count(site.open, refused) == before + 4, "each was counted")
    wait_until(lambda: count(site.open, "kvstore_bulk_connections") == 0, "no thread is left")
    with connect(site.open, site.authority.trusted(), "tcp") as client:
        assert round_trip(client)


def test_a_renewed_certificate_is_served_without_a_restart(site: Site) -> None:
    """By both paths. Half of a pair leaves the one before."""
    ours, theirs = site.authority.trusted(), site.stranger.trusted()
    original = site.authority.certificate("next")
    try:
        install(site.foreign, site.server)
        for transport in BOTH:
            with connect(site.open, theirs, transport) as client:
                assert round_trip(client)
        with connect(site.open, ours) as client, pytest.raises(Unavailable):
            client.namespace(LAYOUT).get(TOKENS)
        shutil.copy(original.cert, site.server.cert)
        for transport in BOTH:
            with connect(site.open, theirs, transport) as client:
                assert round_trip(client)
        assert count(site.open, 'kvstore_tls_reloads_total{outcome="failed"}') >= 1
        assert "the key is not the certificate's" in site.open.log()
    finally:
        install(original, site.server)
    with connect(site.open, ours, "tcp") as client:
        assert round_trip(client)


def test_a_sidecar_and_its_upstream(site: Site, start_node: Callable[..., NodeProcess], tmp_path: Path) -> None:
    """The sidecar has a certificate of its own, too, though it listens where none is used: it says so."""
    sidecar = start_node(
        "--upstream", site.closed.address, "--upstream-write", "through", "--upstream-timeout-ms", "10000",
        "--upstream-tls-ca", str(site.authority.ca), "--upstream-tls-cert", str(site.client.cert),
        "--upstream-tls-key", str(site.client.key), "--tls-cert", str(site.server.cert),
        "--tls-key", str(site.server.key), *SMALL, listen=f"unix:{tmp_path}/side.sock", role="sidecar",
    )  # fmt: skip
    assert "only unix sockets are listened on" in sidecar.log()
    with (
        connect(site.closed, site.authority.trusted(site.client)) as direct,
        connect(sidecar, site.authority.trusted(), "auto") as client,
    ):
        client.namespace(LAYOUT).put(TOKENS, KV, quality="raw")
        assert direct.namespace(LAYOUT).get(TOKENS).n == len(TOKENS)
        assert client.namespace(LAYOUT).get(TOKENS).n == len(TOKENS)
        client.namespace(LAYOUT).delete()
        assert direct.namespace(LAYOUT).get(TOKENS).n == 0


def test_the_command_line(site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(*arguments: str | Path) -> tuple[int, str]:
        code = run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    trusts, own = ("--tls-ca", site.authority.ca), ("--tls-cert", site.client.cert, "--tls-key", site.client.key)
    at = ("admin", "stat", "--target", site.closed.address)
    assert ran(*at, *trusts, *own)[0] == OK
    for options, code, said in (
        ((), UNREACHABLE, "does it want TLS"),
        (own, USAGE, "need --tls-ca"),
        (("--tls-ca", "/nonexistent.pem"), USAGE, "cannot be used: No such file"),
    ):
        failed = ran(*at, *options)
        assert failed[0] == code
        assert said in failed[1]
    # As a process, for what gRPC would write beside it.
    mistaken = [str(each) for each in (*at, *trusts, *own, "--tls-name", "other.example")]
    assert "for another name" in error_line(command.run(*mistaken), UNREACHABLE)

    monkeypatch.setenv("KVSTORE_LISTEN", site.closed.address)
    monkeypatch.setenv("KVSTORE_TLS_CERT", str(site.client.cert))
    monkeypatch.setenv("KVSTORE_TLS_KEY", str(site.client.key))
    checks = ("admin", "doctor", "--only", "tls", "--only", "listen")
    assert "pass --tls-ca to ask it" in ran(*checks)[1]
    for name, path in (("CA", site.authority.ca), ("CERT", site.client.cert), ("KEY", site.client.key)):
        monkeypatch.setenv(f"KVSTORE_TARGET_TLS_{name}", str(path))
    code, said = ran(*checks)
    assert code == OK, said
    assert "runs there" in said
    assert "fit each other, for everybody" in said
    monkeypatch.setenv("KVSTORE_TLS_KEY", str(site.foreign.key))
    code, said = ran(*checks)
    assert code == PROBLEM
    assert "the key is not the certificate's" in said
