"""Which of several nodes holds a prefix: rendezvous hashing (Thaler and Ravishankar, 1996).

Every node gets a score from the key and its own name; the best score wins. The order depends on nothing but the
set of names and the key, so every client ranks alike without talking to anyone, and a node that comes or goes
moves only the keys that it wins or held. Names are compared as given: one node must have one spelling.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def rank(nodes: Iterable[str], key: bytes) -> list[str]:
    """The distinct `nodes`, best for `key` first."""
    return sorted(set(nodes), key=lambda node: (_score(node, key), node), reverse=True)


def _score(node: str, key: bytes) -> bytes:
    name = node.encode("utf-8")
    # The length separates name and key: no two pairs of them hash the same bytes.
    message = len(name).to_bytes(4, "little") + name + key
    return hashlib.blake2b(message, digest_size=8, person=b"kvstore.place").digest()
