"""What makes an evaluation impossible: always the input's fault, always one line that names the fix."""

from __future__ import annotations


class CannotEvaluate(Exception):
    """`str()` is one line."""
