"""The codec's self-test: whether this build, on this CPU, writes and reads what the format says."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np

import kvstore_codec as codec
from kvstore.cli.doctor_finding import Finding, Subject, fail, ok
from kvstore_codec import _native
from kvstore_codec.native import NativeCoder
from kvstore_codec.reference.coder import ReferenceCoder
from kvstore_codec.segments import SegmentCoder

LAYOUT = codec.KVLayout.uniform(
    model="doctor", revision="1", num_layers=2, kv_heads=2, head_dim=64, dtype="bfloat16", chunk_tokens=64,
    rope=codec.RoPE(theta=10_000.0),
)  # fmt: skip
FIX = "install a wheel built for this platform: its codec would store or return wrong values here"


def check_codec(subject: Subject) -> Iterator[Finding]:
    """Every quality on every instruction set of this CPU, against the NumPy reference that defines the format."""
    coders: dict[str, SegmentCoder] = {name: NativeCoder(name) for _, name in _native.instruction_sets()}
    kv = _values()
    problems: list[str] = []
    losses: dict[codec.Quality, float] = {}
    for quality in codec.Quality:
        expected = codec.encode(kv, LAYOUT, quality=quality, coder=ReferenceCoder())
        restored = codec.decode(expected, LAYOUT, coder=ReferenceCoder())
        losses[quality] = float(np.linalg.norm((restored - kv).astype(np.float64)))
        for name, coder in coders.items():
            blob = codec.encode(kv, LAYOUT, quality=quality, coder=coder)
            if blob != expected:
                problems.append(f"{name} encodes {quality.label} differently from the reference")
            elif (codec.decode(blob, LAYOUT, coder=coder) != restored).any():
                problems.append(f"{name} decodes {quality.label} differently from the reference")
        if not _finds_damage(expected):
            problems.append(f"a damaged object of quality {quality.label} passes for whole")
    problems += [f"{quality.label} is not exact" for quality in codec.Quality if quality.exact and losses[quality]]
    lossy = [losses[quality] for quality in codec.Quality if not quality.exact]
    if lossy != sorted(lossy) or lossy[0] <= 0 or lossy[-1] >= np.linalg.norm(kv.astype(np.float64)):
        problems.append(f"losses are not in the order of the qualities: {lossy}")
    for problem in problems:
        yield fail(problem, FIX)
    if not problems:
        names = ", ".join(quality.label for quality in codec.Quality)
        yield ok(f"{names}: {', '.join(coders)} write and read the reference's bytes; damage is found")


def _values() -> codec.KVArray:
    values = np.random.default_rng(7).standard_normal((2, 2, LAYOUT.chunk_tokens, 2, 64))
    return np.asarray(values, ml_dtypes.bfloat16)


def _finds_damage(blob: bytes) -> bool:
    damaged = bytearray(blob)
    damaged[len(damaged) // 2] ^= 0x10
    try:
        codec.verify(damaged)
    except codec.ObjectError:
        return True
    return False
