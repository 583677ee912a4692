"""The admin commands: one or a few calls to a node, and what came back as a table or as JSON."""

from __future__ import annotations

import itertools
import sys

import typer
from rich.console import Console
from rich.progress import Progress

from kvstore.cli import hashes as naming
from kvstore.cli import render
from kvstore.cli.outcome import CommandFailed, ExitCode
from kvstore.cli.remote import Target, connect
from kvstore.cli.sizes import byte_size
from kvstore_proto.v1 import admin_pb2
from kvstore_proto.v1 import store_pb2 as pb


def stat(target: Target, deadline_s: float, as_json: bool) -> None:
    with connect(target, deadline_s) as remote:
        answer = remote.store.Stat(pb.StatRequest(), timeout=deadline_s)
    if as_json:
        render.print_json(render.stat_json(answer))
        return
    for table in render.stat_tables(answer):
        render.print_table(table)


def list_objects(target: Target, deadline_s: float, as_json: bool, prefix: str, namespace: str, limit: int) -> None:
    digits = naming.hex_prefix(prefix)
    with connect(target, deadline_s) as remote:
        namespace_id = naming.namespace_id(remote, namespace)
        found = remote.objects(namespace_id=namespace_id, hash_prefix=digits)
        entries = list(itertools.islice(found, limit + 1))
    more, entries = len(entries) > limit, entries[:limit]
    if as_json:
        render.print_json({"objects": [render.object_json(entry) for entry in entries], "more": more})
        return
    render.print_table(render.objects_table(entries))
    if more:
        print(f"kvstore: there are more than {limit}: raise --limit to see them", file=sys.stderr)


def show(target: Target, deadline_s: float, as_json: bool, prefix: str) -> None:
    digits = naming.hex_prefix(prefix)
    if not digits:
        raise CommandFailed("an empty hash matches everything: give some digits", ExitCode.USAGE)
    with connect(target, deadline_s) as remote:
        entries = list(remote.objects(hash_prefix=digits))
    if as_json:
        render.print_json({"objects": [render.object_json(entry) for entry in entries]})
    if not entries:
        raise CommandFailed(f"chunk {digits}: nothing stored has this hash")
    if not as_json:
        for entry in entries:
            render.print_table(render.object_table(entry))


def verify(target: Target, deadline_s: float, as_json: bool, prefixes: list[str], namespace: str) -> None:
    damaged: list[dict[str, str]] = []
    progress = pb.VerifyResponse()
    console = Console(stderr=True)
    with (
        connect(target, deadline_s) as remote,
        Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        namespace_id = naming.namespace_id(remote, namespace)
        chosen = naming.chunk_hashes(remote, prefixes, namespace_id)
        request = pb.VerifyRequest(namespace_id=namespace_id, chunk_hashes=b"".join(chosen))
        task = bar.add_task("verifying", total=None)
        for progress in remote.store.Verify(request, timeout=deadline_s):
            if progress.damaged_hash:
                damaged.append({"chunk_hash": progress.damaged_hash.hex(), "problem": progress.problem})
            bar.update(task, completed=progress.checked, total=progress.total)
    if as_json:
        render.print_json({"checked": progress.checked, "total": progress.total, "damaged": damaged})
    else:
        for problem in damaged:
            print(f"{problem['chunk_hash']}: {problem['problem']}")
        print(f"{progress.checked} objects checked, {len(damaged)} damaged (and dropped)")
    if damaged or progress.checked < len(chosen):
        raise typer.Exit(ExitCode.PROBLEM)


def evict(
    target: Target, deadline_s: float, as_json: bool, prefixes: list[str], tier: str, size: str, everything: bool
) -> None:
    if sum((bool(prefixes), bool(size), everything)) != 1:
        raise CommandFailed("evict takes hashes, --bytes or --all: exactly one of them", ExitCode.USAGE)
    wanted_bytes = byte_size("--bytes", size, least=1) if size else 0
    with connect(target, deadline_s) as remote:
        chosen = naming.chunk_hashes(remote, prefixes)
        request = admin_pb2.EvictRequest(tier=tier, bytes=wanted_bytes, chunk_hashes=b"".join(chosen))
        answer = remote.admin.Evict(request, timeout=deadline_s)
    if as_json:
        render.print_json({"objects": answer.objects, "bytes": answer.bytes})
    else:
        print(f"{answer.objects} objects evicted, {render.size(answer.bytes)} freed")
    if answer.bytes < wanted_bytes or (chosen and not answer.objects):
        raise typer.Exit(ExitCode.PROBLEM)
