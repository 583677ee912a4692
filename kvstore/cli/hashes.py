"""From the hex prefixes that people type to the full hashes that the protocol takes."""

from __future__ import annotations

import string

from kvstore.cli.outcome import CommandFailed, ExitCode
from kvstore.cli.remote import Remote

HASH_HEX_DIGITS = 64


def hex_prefix(text: str) -> str:
    """`text` in lower case; raises CommandFailed if it cannot start a 32-byte hash."""
    if len(text) > HASH_HEX_DIGITS or not set(text) <= set(string.hexdigits):
        raise CommandFailed(f"{text!r} is not a hash: use up to {HASH_HEX_DIGITS} hex digits", ExitCode.USAGE)
    return text.lower()


def chunk_hashes(remote: Remote, prefixes: list[str], namespace_id: bytes = b"") -> list[bytes]:
    """One stored chunk hash for each prefix; raises CommandFailed if there is none or more than one."""
    return [_only(remote, hex_prefix(prefix), namespace_id) for prefix in prefixes]


def namespace_id(remote: Remote, prefix: str) -> bytes:
    """The stored namespace whose id starts so; b"" (all) for an empty prefix."""
    digits = hex_prefix(prefix)
    if not digits:
        return b""
    if len(digits) == HASH_HEX_DIGITS:
        return bytes.fromhex(digits)
    found = {entry.namespace_id for entry in remote.objects() if entry.namespace_id.hex().startswith(digits)}
    return _single(found, f"namespace {digits}")


def _only(remote: Remote, digits: str, namespace: bytes) -> bytes:
    if not digits:
        raise CommandFailed("an empty hash matches everything: give some digits", ExitCode.USAGE)
    if len(digits) == HASH_HEX_DIGITS:
        return bytes.fromhex(digits)
    found = {entry.chunk_hash for entry in remote.objects(namespace_id=namespace, hash_prefix=digits)}
    return _single(found, f"chunk {digits}")


def _single(found: set[bytes], what: str) -> bytes:
    if not found:
        raise CommandFailed(f"{what}…: nothing stored has this prefix")
    if len(found) > 1:
        raise CommandFailed(f"{what}…: {len(found)} match, give more digits", ExitCode.USAGE)
    return found.pop()
