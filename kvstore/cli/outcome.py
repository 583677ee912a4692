"""How a command ends: the exit codes that scripts rely on, and the error that carries one."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    OK = 0
    PROBLEM = 1  # the operation ran and found something wrong, or nothing at all where something was asked for
    USAGE = 2
    UNREACHABLE = 3
    INTERRUPTED = 130


class CommandFailed(Exception):
    """Ends the command with `exit_code`; `str()` is the one line shown."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.PROBLEM) -> None:
        super().__init__(message)
        self.exit_code = exit_code
