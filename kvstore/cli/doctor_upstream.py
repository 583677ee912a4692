"""Checks of the nodes that a node asks for what it lacks."""

from __future__ import annotations

from collections.abc import Iterator

from kvstore import __version__
from kvstore.cli.doctor_finding import Finding, Subject, fail, ok, warn
from kvstore.cli.doctor_network import ask
from kvstore.cli.outcome import CommandFailed
from kvstore.cli.remote import Target
from kvstore.engine.upstream_open import upstream_tls

SLOW_PART = 0.25  # of upstream_timeout_ms


def check_upstream(subject: Subject) -> Iterator[Finding]:
    config = subject.config
    if not config.upstream_seeds:
        yield ok("no upstream: misses end here")
    for seed in config.upstream_seeds:
        try:
            _, stat, answer_s = ask(Target(seed, upstream_tls(config)), subject.deadline_s)
        except CommandFailed as error:
            yield fail(str(error), "start it, or correct upstream: until then what is not here is a miss")
            continue
        answer_ms = answer_s * 1000
        found = f"{seed}: node {stat.node_id}, kvstore {stat.version}, answers in {answer_ms:.1f} ms"
        if stat.node_id == config.node_name:
            yield warn(found, "it has this node's name: set node_id, or is it this node?")
        elif stat.version != __version__:
            yield warn(found, "install the same version on both sides")
        elif answer_ms > SLOW_PART * config.upstream_timeout_ms:
            yield warn(found, "raise upstream_timeout_ms, or use a nearer node: lookups would often be misses")
        else:
            yield ok(found)
