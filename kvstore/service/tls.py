"""A node's certificates, for gRPC and for the bulk path.

They are looked at in every handshake and read again when the files have changed, so that a renewed certificate needs no
restart; a set that cannot be used (half of it is written yet, say) leaves the last one that could.
"""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc
from prometheus_client import CollectorRegistry, Counter

from kvstore.errors import ConfigError
from kvstore.service.tls_config import TlsConfig
from kvstore_client.tls import no_password, why_unusable

log = logging.getLogger(__name__)

Stamp = tuple[int, int, int] | None  # inode, length, time of change in nanoseconds; None: there is no such file


@dataclass(frozen=True)
class _Loaded:
    context: ssl.SSLContext
    grpc: grpc.ServerCertificateConfiguration


def open_tls(config: TlsConfig, registry: CollectorRegistry) -> ServerTls | None:
    """None where no tls_cert is set. Raises ConfigError for files that cannot be used."""
    reloads = Counter(
        "kvstore_tls_reloads", "Certificates whose files changed, by what came of it.", ("outcome",), registry=registry
    )
    if config.tls_cert is None or config.tls_key is None:
        return None
    return ServerTls(config.tls_cert, config.tls_key, config.tls_client_ca, reloads)


class ServerTls:
    """May be used from any thread. Raises ConfigError where the files cannot be used."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None, reloads: Counter) -> None:
        self._cert, self._key, self._client_ca, self._reloads = cert, key, client_ca, reloads
        self._lock = threading.Lock()
        self._stamps = self._look()
        self._loaded = self._load()

    def context(self) -> ssl.SSLContext:
        """For the next connection."""
        return self._current().context

    def credentials(self) -> grpc.ServerCredentials:
        """For one address: gRPC asks in each handshake whether there are other certificates by now."""
        given = self._current()

        def newer() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            current = self._current()
            if current is given:
                return None
            given = current
            return given.grpc

        return grpc.dynamic_ssl_server_credentials(
            given.grpc,
            newer,  # type: ignore[arg-type]  # the stubs do not know that None is for "no other"
            self._client_ca is not None,
        )

    def _current(self) -> _Loaded:
        with self._lock:
            stamps = self._look()
            if stamps != self._stamps:
                self._stamps = stamps  # also where it fails: it is tried again when they have changed again
                self._renew()
            return self._loaded

    def _renew(self) -> None:
        try:
            self._loaded = self._load()
        except ConfigError as error:
            self._reloads.labels("failed").inc()
            log.warning("the certificate stays the one before: %s", error)
        else:
            self._reloads.labels("loaded").inc()
            log.info("the certificate was renewed from %s", self._cert)

    def _look(self) -> list[Stamp]:
        return [_stamp(path) for path in (self._cert, self._key, self._client_ca) if path is not None]

    def _load(self) -> _Loaded:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        what, fix = "tls_cert", "name PEM files of one certificate and its key"
        try:
            pair = self._cert.read_bytes()
            what = "tls_key"
            key = self._key.read_bytes()
            what = f"tls_cert {self._cert} with tls_key"
            context.load_cert_chain(self._cert, self._key, password=no_password)
            ca = None
            if self._client_ca is not None:
                what, fix = "tls_client_ca", "name a PEM file of the certificates that sign the clients'"
                context.load_verify_locations(self._client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
                ca = self._client_ca.read_bytes()
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            path = {"tls_cert": self._cert, "tls_client_ca": self._client_ca}.get(what, self._key)
            raise ConfigError([f"{what} {path} cannot be used: {why_unusable(error)}: {fix}"]) from None
        return _Loaded(context, grpc.ssl_server_certificate_configuration([(key, pair)], ca))


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
