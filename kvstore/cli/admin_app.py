"""The commands of `kvstore admin`. Bodies import what they need, so that `--help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore.cli.node_options import node_options

if TYPE_CHECKING:
    from kvstore.cli.remote import Target
    from kvstore_client.tls import TLS

admin_app = typer.Typer(help="Look at and operate a running node.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Deadline = Annotated[float, typer.Option("--deadline", min=0.001, help="Seconds to wait for the node.")]
Hashes = Annotated[list[str] | None, typer.Argument(metavar="[HASH]...", help="Chunk hashes; prefixes do.")]
Namespace = Annotated[str, typer.Option("--namespace", help="Only this namespace id; a prefix does.")]
DEADLINE_S = 10.0
LONG_DEADLINE_S = 3600.0


@admin_app.command()
@node_options
def stat(*, node: Target, json: Json = False, deadline: Deadline = DEADLINE_S) -> None:
    """Show what a node holds and has done since it started."""
    from kvstore.cli import admin

    admin.stat(node, deadline, json)


@admin_app.command("ls")
@node_options
def list_objects(
    *,
    prefix: Annotated[str, typer.Argument(metavar="[HASH]", help="Only hashes that start so.")] = "",
    namespace: Namespace = "",
    limit: Annotated[int, typer.Option("--limit", min=1, help="Print at most so many.")] = 100,
    node: Target,
    json: Json = False,
    deadline: Deadline = DEADLINE_S,
) -> None:
    """List stored objects."""
    from kvstore.cli import admin

    admin.list_objects(node, deadline, json, prefix, namespace, limit)


@admin_app.command()
@node_options
def show(
    *,
    prefix: Annotated[str, typer.Argument(metavar="HASH", help="Chunk hash; a prefix does.")],
    node: Target,
    json: Json = False,
    deadline: Deadline = DEADLINE_S,
) -> None:
    """Show everything about the objects of a chunk; exit code 1 if there are none."""
    from kvstore.cli import admin

    admin.show(node, deadline, json, prefix)


@admin_app.command()
@node_options
def verify(
    *,
    hashes: Hashes = None,
    namespace: Namespace = "",
    node: Target,
    json: Json = False,
    deadline: Deadline = LONG_DEADLINE_S,
) -> None:
    """Re-read stored objects and check every checksum; exit code 1 if any was damaged (and so dropped)."""
    from kvstore.cli import admin

    admin.verify(node, deadline, json, hashes or [], namespace)


@admin_app.command()
@node_options
def evict(
    *,
    hashes: Hashes = None,
    tier: Annotated[str, typer.Option("--tier", help="host or disk (default: every tier).")] = "",
    size: Annotated[str, typer.Option("--bytes", help='Free at least this, such as "1GiB".')] = "",
    everything: Annotated[bool, typer.Option("--all", help="Evict all that may be evicted.")] = False,
    node: Target,
    json: Json = False,
    deadline: Deadline = DEADLINE_S,
) -> None:
    """Evict named chunks, or an amount of bytes in the node's own order. Leased objects stay."""
    from kvstore.cli import admin

    admin.evict(node, deadline, json, hashes or [], tier, size, everything)


@admin_app.command()
@node_options
def pin(
    *,
    hashes: Annotated[list[str], typer.Argument(metavar="HASH...", help="Chunk hashes; prefixes do.")],
    duration: Annotated[str, typer.Option("--for", help="How long: 90s, 30m, 1.5h, 7d (default: 1h).")] = "",
    hard: Annotated[bool, typer.Option("--hard", help="Until they are unpinned, beyond restarts.")] = False,
    node: Target,
    json: Json = False,
    deadline: Deadline = DEADLINE_S,
) -> None:
    """Keep chunks from being evicted; exit code 1 if any could not be pinned."""
    from kvstore.cli import pin as command

    command.pin(node, deadline, json, hashes, duration, hard)


@admin_app.command()
@node_options
def unpin(
    *,
    hashes: Hashes = None,
    everything: Annotated[bool, typer.Option("--all", help="Every pin, soft and hard.")] = False,
    node: Target,
    json: Json = False,
    deadline: Deadline = DEADLINE_S,
) -> None:
    """Let pinned chunks go as others do; exit code 1 if none of those named was pinned."""
    from kvstore.cli import pin as command

    command.unpin(node, deadline, json, hashes or [], everything)


@admin_app.command()
@node_options
def top(
    *,
    node: Target,
    interval: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print the rates of one interval and end.")] = False,
    metrics: Annotated[
        str | None, typer.Option("--metrics", help="URL of the node's metrics: shows latencies and queues, too.")
    ] = None,
    json: Json = False,
    deadline: Deadline = DEADLINE_S,
) -> None:
    """Watch a node live until ctrl-C; with --json, one object a line."""
    from kvstore.cli import top as command

    command.top(node, command.Options(interval, once, metrics, json, deadline))


@admin_app.command()
@node_options
def doctor(
    *,
    config: Annotated[
        Path | None, typer.Option("--config", envvar="KVSTORE_CONFIG", help="TOML file of the node to check for.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", envvar="KVSTORE_TARGET", help="A running node to look at, too.")
    ] = None,
    tls: TLS | None,
    only: Annotated[list[str] | None, typer.Option("--only", help="Only this check; may be repeated.")] = None,
    json: Json = False,
    deadline: Deadline = DEADLINE_S,
) -> None:
    """Check this machine and what a node on it needs; exit code 1 if a check fails. KVSTORE_* count as for serve."""
    from kvstore.cli import doctor as command

    command.doctor(config, target, only or [], json, deadline, tls)
