"""The node's answers as protocol messages."""

from __future__ import annotations
