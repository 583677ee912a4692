"""How much memory a decode takes beside its input and output: run as a script, in a process that does nothing else.

Its argument is a JSON object of `Case`'s fields; it prints the bytes by which the process's peak resident size grew.
The peak is the kernel's (VmHWM), set back to the current size before each measurement (`clear_refs`, proc(5)).
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import kvstore_codec as codec
from kvstore_codec.container import KV
from kvstore_codec.profile import ProfileGroup, model_id_of, scale_ids_of

PEAK_RESET = Path("/proc/self/clear_refs")
FIRST_POSITION = 2048
WARM_UP_TOKENS = 16
#: what the gauge is tried on
KNOWN_BYTES = 3 << 20


@dataclass(frozen=True)
class Case:
    """`folder` holds the objects `chunk` and `warm-up`. `profile_layers`: layers a group of its profile, 0: none."""

    layers: int
    tokens: int
    kv_heads: int
    head_dim: int
    threads: int
    profile_layers: int
    folder: str

    @property
    def layout(self) -> codec.KVLayout:
        return codec.KVLayout.uniform(
            model="memory", revision="1", num_layers=self.layers, kv_heads=self.kv_heads, head_dim=self.head_dim,
            dtype="bfloat16", chunk_tokens=self.tokens, rope=codec.RoPE(theta=100_000.0),
        )  # fmt: skip

    @property
    def profile(self) -> codec.Profile | None:
        """A square basis, which takes the memory of any; that it is the identity makes it quick to make."""
        if not self.profile_layers:
            return None
        channels = 2 * self.profile_layers * self.kv_heads * self.head_dim
        basis, ones = np.eye(channels, dtype=np.float16), np.ones(channels, np.float32)
        scale_ids = scale_ids_of(np.ones(channels))
        groups = [
            ProfileGroup(KV.K | KV.V, first, self.profile_layers, 0 * ones, ones, basis, scale_ids)
            for first in range(0, self.layers, self.profile_layers)
        ]
        return codec.Profile(codec.ProfileKind.TRANSFORM, model_id_of(self.layout), tuple(groups), {})

    def values(self) -> npt.NDArray[Any]:
        """Channels of their own mean and scale, as keys and values have."""
        rng = np.random.default_rng(9)
        channels = (self.layers, 2, 1, self.kv_heads, self.head_dim)
        values = rng.standard_normal((self.layers, 2, self.tokens, self.kv_heads, self.head_dim), np.float32)
        values *= rng.lognormal(0, 0.5, channels).astype(np.float32)
        values += rng.standard_normal(channels, np.float32)
        return values.astype(codec.empty(self.layout, 1).dtype)


def growth(work: Callable[[], object]) -> int:
    """Bytes. Memory that was freed is first handed back, so that it cannot be used again unseen."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    PEAK_RESET.write_text("5")
    before = _peak()
    work()
    return _peak() - before


def _peak() -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    layout, profile, threads = case.layout, case.profile, case.threads
    chunk, warm_up = ((Path(case.folder) / name).read_bytes() for name in ("chunk", "warm-up"))
    codec.decode(warm_up, layout, profile=profile, threads=threads)
    out = codec.empty(layout, case.tokens)
    out.view(np.uint8).fill(1)

    def decode() -> None:
        codec.decode(chunk, layout, out=out, profile=profile, threads=threads)

    figures = {
        "known": growth(lambda: np.ones(KNOWN_BYTES, np.uint8)),
        "first": growth(decode),
        "again": min(growth(decode) for _ in range(3)),  # what else the kernel counts now and then is not the decode's
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
