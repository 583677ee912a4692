"""The `kvstore` command as scripts run it: exit codes, one-line errors, JSON that parses."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from node_process import KVSTORE, NodeProcess, clean_environment

OK, PROBLEM, USAGE, UNREACHABLE = 0, 1, 2, 3


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [KVSTORE, *arguments], capture_output=True, text=True, timeout=60, check=False,
        env=clean_environment(**{"COLUMNS": "200", **variables}),
    )  # fmt: skip


def admin(node: NodeProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run("admin", *arguments, "--target", node.address)


def admin_json(node: NodeProcess, *arguments: str, code: int = OK) -> Any:
    done = admin(node, *arguments, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def error_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line on stderr."""
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("kvstore: ")
    return lines[0]
