"""`kvstore admin pin` and `unpin`: what an operator wants kept, for a while or for good."""

from __future__ import annotations

import re

import typer

from kvstore.cli import hashes as naming
from kvstore.cli import render
from kvstore.cli.outcome import CommandFailed, ExitCode
from kvstore.cli.remote import Target, connect
from kvstore_proto.v1 import admin_pb2

SECONDS_MAX = (1 << 32) - 1  # as the protocol counts them
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


def pin(target: Target, deadline_s: float, as_json: bool, prefixes: list[str], duration: str, hard: bool) -> None:
    """`duration` such as "1h" (with `hard`: ""). Raises CommandFailed, also where nothing stored has a hash."""
    if hard and duration:
        raise CommandFailed("--for and --hard exclude each other: a hard pin has no end", ExitCode.USAGE)
    seconds = 0 if hard else seconds_of(duration or "1h")
    with connect(target, deadline_s) as remote:
        chosen = naming.chunk_hashes(remote, prefixes)
        answer = remote.admin.Pin(
            admin_pb2.PinRequest(chunk_hashes=b"".join(chosen), seconds=seconds), timeout=deadline_s
        )  # fmt: skip
    if as_json:
        render.print_json({"objects": answer.objects, "refused": answer.refused, "seconds": seconds})
    elif answer.objects:
        print(f"{answer.objects} objects pinned, {'until they are unpinned' if hard else f'for {seconds} s'}")
    if answer.refused:
        share = "hard_pin_share" if hard else "soft_pin_share"
        raise CommandFailed(f"{answer.refused} objects not pinned: beyond {share}; unpin others, or raise it")
    if not answer.objects:
        raise CommandFailed("nothing stored has these hashes")


def unpin(target: Target, deadline_s: float, as_json: bool, prefixes: list[str], everything: bool) -> None:
    """Raises CommandFailed."""
    if bool(prefixes) == everything:
        raise CommandFailed("unpin takes hashes or --all: one of them", ExitCode.USAGE)
    with connect(target, deadline_s) as remote:
        chosen = naming.chunk_hashes(remote, prefixes)
        answer = remote.admin.Unpin(admin_pb2.UnpinRequest(chunk_hashes=b"".join(chosen)), timeout=deadline_s)
    if as_json:
        render.print_json({"objects": answer.objects})
    else:
        print(f"{answer.objects} objects unpinned")
    if chosen and not answer.objects:
        raise typer.Exit(ExitCode.PROBLEM)


def seconds_of(duration: str) -> int:
    """Whole seconds of "90s", "30m", "1.5h" or "7d". Raises CommandFailed."""
    match = _DURATION.fullmatch(duration)
    seconds = int(float(match[1]) * _SECONDS[match[2]]) if match else 0
    if not 0 < seconds <= SECONDS_MAX:
        raise CommandFailed(f"--for {duration!r}: must be a time such as 90s, 30m, 1.5h or 7d", ExitCode.USAGE)
    return seconds
