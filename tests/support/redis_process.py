"""Real redis-server processes for tests: one, with TLS or a password, or a Cluster of three masters."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import redis
from polling import wait_until
from redis.crc import key_slot

BINARY = "redis-server"
START_S_MAX = 20.0
HOST = "127.0.0.1"


def free_ports(count: int) -> list[int]:
    """Ports whose partner for the bus of a Cluster, 10,000 above, is a port, too."""
    with contextlib.ExitStack() as open_sockets:
        ports: list[int] = []
        while len(ports) < count:
            listener = open_sockets.enter_context(socket.socket())
            listener.bind((HOST, 0))
            port = listener.getsockname()[1]
            if port < 55_000:
                ports.append(port)
        return ports


class RedisProcess:
    """One server on a port of its own, which survives `stop` and `start`, as does its folder. It saves nothing unless
    `options` say so, and takes commands such as DEBUG from here."""

    def __init__(self, folder: Path, *options: str, tls: TlsFiles | None = None, password: str = "") -> None:
        if shutil.which(BINARY) is None:
            raise AssertionError("redis-server is not installed: run `make setup`, or apt-get install redis-server")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._options, self._tls, self._password = folder, options, tls, password
        (self.port,) = free_ports(1)
        secret = f":{quote(password, safe='')}@" if password else ""
        self.url = f"{'rediss' if tls else 'redis'}://{secret}{HOST}:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self._client: redis.Redis | None = None
        self.start()

    @property
    def client(self) -> redis.Redis:
        """A plain client, to look at what the tier did and to interfere."""
        if self._client is None:
            files = {} if self._tls is None else {"ssl_ca_certs": str(self._tls.ca), **self._tls.client_files}
            self._client = redis.Redis.from_url(self.url, socket_timeout=START_S_MAX, protocol=2, **files)
            self._client.response_callbacks.clear()  # replies as they are
        return self._client

    def command(self, *words: Any) -> Any:
        return self.client.execute_command(*words)  # type: ignore[no-untyped-call]

    def start(self, *, wait: bool = True) -> None:
        """Returns once it answers, or at once."""
        listen = ["--port", str(self.port)]
        if self._tls is not None:
            listen = ["--port", "0", "--tls-port", str(self.port), *self._tls.server_options]
        protected = ["--requirepass", self._password] if self._password else []
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    BINARY, "--bind", HOST, "--dir", str(self.folder), "--save", "", "--enable-debug-command", "yes",
                    *listen, *protected, *self._options,
                ],
                stdout=log, stderr=log,
            )  # fmt: skip
        if wait:
            self.wait()

    def wait(self) -> None:
        wait_until(self.answers, f"redis-server answers; see {self.folder / 'log'}", deadline_s=START_S_MAX)

    def answers(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise AssertionError(f"redis-server ended:\n{(self.folder / 'log').read_text(errors='replace')}")
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False

    def pause(self) -> None:
        """SIGSTOP: connections are taken by the kernel, nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Ends it, as by `shutdown` or, with SIGKILL, as by a crash."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.send_signal(signal.SIGCONT)
            self.process.wait(START_S_MAX)
            self.process = None
        if self._client is not None:
            self._client.close()
            self._client = None

    def _signal(self, what: signal.Signals) -> None:
        assert self.process is not None, "the server runs"
        self.process.send_signal(what)


class RedisCluster:
    """Three masters without replicas, each with a third of the slots."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.masters: list[RedisProcess] = []
        try:
            for number in range(3):
                self.masters.append(
                    RedisProcess(
                        folder / f"master-{number}", "--cluster-enabled", "yes", "--cluster-node-timeout", "1000",
                        "--cluster-require-full-coverage", "no", *options,
                    )
                )  # fmt: skip
            self._join()
        except BaseException:
            self.stop()
            raise
        self.url = ",".join(master.url for master in self.masters)

    def stop(self) -> None:
        for master in self.masters:
            master.stop(signal.SIGKILL)

    def master_of(self, key: bytes) -> RedisProcess:
        return self.masters[self.master_index(key)]

    @staticmethod
    def master_index(key: bytes) -> int:
        """Of the master that was given the key's slot."""
        return key_slot(key) * 3 // 16384

    def _join(self) -> None:
        bounds = [-(-number * 16384 // 3) for number in range(4)]
        for master, first, end in zip(self.masters, bounds, bounds[1:], strict=False):
            master.command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
            master.command("CLUSTER", "MEET", HOST, self.masters[0].port)
        for master in self.masters:
            wait_until(lambda master=master: _sees_all(master), "the Cluster is whole", deadline_s=START_S_MAX)  # type: ignore[misc]


def _sees_all(master: RedisProcess) -> bool:
    state = bytes(master.command("CLUSTER", "INFO"))
    return b"cluster_state:ok" in state and b"cluster_slots_ok:16384" in state


class TlsFiles:
    """A certificate authority of our own, a server's certificate for 127.0.0.1, and a client's."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.ca = folder / "ca.crt"
        _openssl("req", "-x509", "-keyout", folder / "ca.key", "-out", self.ca, *_new_key("/CN=kvstore test CA"))
        for name in ("server", "client"):
            request, extensions = folder / f"{name}.csr", folder / f"{name}.ext"
            extensions.write_text(f"subjectAltName=IP:{HOST}\n")
            _openssl("req", "-keyout", folder / f"{name}.key", "-out", request, *_new_key(f"/CN={name}"))
            _openssl(
                "x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", folder / "ca.key", "-CAcreateserial",
                "-extfile", extensions, "-days", "2", "-out", folder / f"{name}.crt",
            )  # fmt: skip
        self.certificate, self.key = folder / "client.crt", folder / "client.key"
        self.server_options = [
            "--tls-ca-cert-file", str(self.ca), "--tls-cert-file", str(folder / "server.crt"),
            "--tls-key-file", str(folder / "server.key"), "--tls-auth-clients", "yes",
        ]  # fmt: skip
        self.client_files = {"ssl_certfile": str(self.certificate), "ssl_keyfile": str(self.key)}


def _new_key(subject: str) -> tuple[str, ...]:
    return ("-newkey", "rsa:2048", "-nodes", "-subj", subject, "-days", "2")


def _openssl(command: str, *arguments: str | Path) -> None:
    done = subprocess.run(["openssl", command, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"openssl {command} failed: {done.stderr.strip()}")


@contextlib.contextmanager
def running(server: RedisProcess | RedisCluster) -> Iterator[None]:
    try:
        yield
    finally:
        server.stop()
