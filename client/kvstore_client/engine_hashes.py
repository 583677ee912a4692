"""A prompt's chunks under the names that an engine has for them, for callers that are not told tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EngineHashes:
    """In place of a prompt's tokens: one hash a chunk, from the prompt's first chunk on, each of everything up to its
    chunk's end; 16 bytes or more.

    The engine's hash must cover all that decides the KV and is not in the layout: tokens, adapter, salt, content. It is
    wrapped under the namespace and the tenant's key, never trusted alone, and names other objects than tokens do.
    """

    hashes: Sequence[bytes]
    chunk_tokens: int

    def __len__(self) -> int:
        """Tokens, as of a list of them."""
        return len(self.hashes) * self.chunk_tokens
