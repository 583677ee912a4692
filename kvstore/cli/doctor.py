"""`kvstore admin doctor`: what a node needs, checked one by one; a line each, with the fix."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from kvstore import __version__
from kvstore.cli import render
from kvstore.cli.doctor_codec import check_codec
from kvstore.cli.doctor_disk import check_disk
from kvstore.cli.doctor_finding import Finding, Level, Subject, ok
from kvstore.cli.doctor_machine import check_clock, check_cpu, check_files, check_memory
from kvstore.cli.doctor_network import check_listen, check_node
from kvstore.cli.doctor_redis import check_redis
from kvstore.cli.doctor_tls import check_tls
from kvstore.cli.doctor_upstream import check_upstream
from kvstore.cli.outcome import CommandFailed, ExitCode
from kvstore.config import load_config
from kvstore_client.tls import TLS

_STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}


def check_version(subject: Subject) -> Iterator[Finding]:
    yield ok(f"kvstore {__version__}, Python {platform.python_version()}, {platform.system()} {platform.release()}")


CHECKS: dict[str, Callable[[Subject], Iterable[Finding]]] = {
    "version": check_version,
    "cpu": check_cpu,
    "codec": check_codec,
    "memory": check_memory,
    "files": check_files,
    "disk": check_disk,
    "redis": check_redis,
    "upstream": check_upstream,
    "tls": check_tls,
    "listen": check_listen,
    "node": check_node,
    "clock": check_clock,
}


def doctor(
    config_path: Path | None, target: str | None, only: list[str], as_json: bool, deadline_s: float,
    tls: TLS | None = None,
) -> None:  # fmt: skip
    """Ends with exit code 1 if a check fails. Raises ConfigError, CommandFailed for a check that there is not."""
    unknown = [name for name in only if name not in CHECKS]
    if unknown:
        raise CommandFailed(f"--only {unknown[0]}: must be one of {', '.join(CHECKS)}", ExitCode.USAGE)
    config = load_config(config_path, {}, os.environ)
    subject = Subject(config, target, deadline_s, tls)
    # Without a target there need be no node; `listen` tells whether the one that is configured so runs.
    chosen = [name for name in CHECKS if (name in only if only else name != "node" or target is not None)]
    found = ((name, finding) for name in chosen for finding in CHECKS[name](subject))
    failed = _print_json(found) if as_json else _print_lines(found)
    if failed:
        raise typer.Exit(ExitCode.PROBLEM)


def _print_json(found: Iterable[tuple[str, Finding]]) -> bool:
    findings = [
        {"check": name, "level": finding.level.value, "found": finding.found, "fix": finding.fix}
        for name, finding in found
    ]
    failed = any(finding["level"] == Level.FAIL.value for finding in findings)
    render.print_json({"ok": not failed, "findings": findings})
    return failed


def _print_lines(found: Iterable[tuple[str, Finding]]) -> bool:
    console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
    failed = False
    for name, finding in found:
        line = Text(f"{finding.level.value:<4}", style=_STYLES[finding.level])
        line.append(f"  {name:<8}  ", style="bold")
        line.append(" ".join(finding.found.split()), style="default")
        if finding.fix:
            line.append(f": {finding.fix}", style="default")
        console.print(line)
        failed |= finding.level is Level.FAIL
    return failed
