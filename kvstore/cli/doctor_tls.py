"""Checks of the certificates that a node is configured with."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry

from kvstore.cli.doctor_finding import Finding, Subject, fail, ok
from kvstore.errors import ConfigError
from kvstore.service.tls import open_tls


def check_tls(subject: Subject) -> Iterator[Finding]:
    config = subject.config
    try:
        tls = open_tls(config, CollectorRegistry())
    except ConfigError as error:
        yield fail("a node would not start", str(error))
        return
    if tls is None:
        yield ok("no tls_cert: what passes is not encrypted")
    else:
        whom = "everybody" if config.tls_client_ca is None else f"clients of {config.tls_client_ca}"
        yield ok(f"{config.tls_cert} and its key fit each other, for {whom}")
