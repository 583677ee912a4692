"""A writer in a process of its own, to be killed: writes some layers of `KV`, says so, and waits for the end of stdin.

python live_writer.py ADDRESS LAYERS
"""

from __future__ import annotations

import sys

from kv_objects import small_layout
from kv_strategies import random_kv

from kvstore_client import Client

LAYOUT = small_layout("live", layers=6)
TOKENS = list(range(3 * LAYOUT.chunk_tokens))
KV = random_kv(LAYOUT, len(TOKENS), seed=7)


def main(address: str, layers: int) -> None:
    with Client(address, deadline=30.0, strict=True) as client, client.namespace(LAYOUT).writer(TOKENS) as writer:
        for layer in range(layers):
            writer.write(layer, KV[layer, 0], KV[layer, 1])
        print("written", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
