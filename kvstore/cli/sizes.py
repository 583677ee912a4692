"""Sizes that people type on the command line."""

from __future__ import annotations

from pydantic import ByteSize, TypeAdapter, ValidationError

from kvstore.cli.outcome import CommandFailed, ExitCode

_SIZE = TypeAdapter(ByteSize)


def byte_size(option: str, text: str, *, least: int = 0) -> int:
    """Bytes of "1000000" or "1GiB"; raises CommandFailed, naming the option, for what is no size or below `least`."""
    try:
        value = int(_SIZE.validate_python(text))
    except ValidationError:
        value = -1
    if not least <= value < 1 << 63:
        raise CommandFailed(f'{option} {text!r}: must be bytes, such as 1000000 or "1GiB"', ExitCode.USAGE)
    return value
