"""The golden cases: which layouts, dtypes, qualities and arguments are pinned under tests/vectors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from kv_strategies import bits, random_kv

import kvstore_codec as codec

VECTORS = Path(__file__).parent.parent / "vectors"
OBJECTS = VECTORS / "objects" / "v2"
PROFILES = VECTORS / "profiles"


@dataclass(frozen=True)
class Case:
    name: str
    layout: codec.KVLayout
    tokens: int
    quality: str
    first_position: int = 0
    part: int = 0
    provenance: str = "raw"
    #: the pinned profile that it is coded with
    profile: str | None = None
    step: float = 1.0

    def arguments(self) -> dict[str, Any]:
        return {
            "quality": self.quality, "first_position": self.first_position, "part": self.part,
            "provenance": self.provenance, "chunk_hash": bytes(range(32)), "profile": self.read_profile(),
            "step": self.step,
        }  # fmt: skip

    def read_profile(self) -> codec.Profile | None:
        return None if self.profile is None else codec.Profile.load(PROFILES / f"{self.profile}.kvp")


def _llama(dtype: str = "bfloat16", **changes: Any) -> codec.KVLayout:
    arguments: dict[str, Any] = {
        "model": "golden", "revision": "sha256:0", "num_layers": 2, "kv_heads": 2, "head_dim": 16, "dtype": dtype,
        "chunk_tokens": 32, "rope": codec.RoPE(10000.0),
    }  # fmt: skip
    return codec.KVLayout.uniform(**{**arguments, **changes})


MIXED = codec.KVLayout(
    model="golden", revision="sha256:1", dtype="bfloat16", chunk_tokens=32,
    layers=(
        codec.LayerSpec(2, 16, 8, rope=codec.RoPE(500000.0, scaling=codec.RopeScaling("llama3", 8, 1, 4, 8192))),
        codec.LayerSpec(2, 12, 12, codec.LayerKind.SLIDING, 512, codec.RoPE(10000.0, 8, interleaved=True)),
        codec.LayerSpec(1, 24, 0, codec.LayerKind.MLA),
        codec.LayerSpec(1, 6, 6, codec.LayerKind.STATE),
    ),
)  # fmt: skip
#: one large enough that K and V have segments, and segments have streams, of their own
WIDE = _llama(num_layers=1, kv_heads=8, head_dim=128, chunk_tokens=256)

CASES = [
    *(Case(f"{quality}-{dtype}", _llama(dtype), 32, quality)
      for dtype in ("bfloat16", "float16", "float32") for quality in ("raw", "lossless", "high")),
    *(Case(f"lossless-{dtype}", _llama(dtype), 32, "lossless") for dtype in ("float8_e4m3fn", "float8_e5m2", "int8")),
    Case("medium-later-position", _llama(), 32, "medium", first_position=4096, provenance="high"),
    Case("low-tail", _llama(), 9, "low", first_position=2),
    Case("high-only-sinks", _llama(), 3, "high"),
    Case("high-mixed-layers", MIXED, 32, "high", first_position=64),
    Case("lossless-mixed-layers", MIXED, 32, "lossless"),
    Case("high-part", _llama(partition=codec.Partition(2, 2)), 32, "high", first_position=32, part=3),
    Case("low-wide", WIDE, 112, "low", first_position=256),
    Case("lossless-wide", WIDE, 112, "lossless", first_position=256),
    Case("medium-step", _llama(), 32, "medium", first_position=64, step=0.5),
    *(Case(f"high-transform-{dtype}", _llama(dtype), 32, "high", profile=f"transform-{dtype}")
      for dtype in ("bfloat16", "float16", "float32")),
    Case("low-transform-step", _llama(), 32, "low", first_position=64, profile="transform-bfloat16", step=0.6),
    Case("high-diagonal-k-and-v-apart", _llama(), 32, "high", first_position=64, profile="diagonal"),
    Case("medium-statistics", _llama(), 16, "medium", first_position=2, profile="statistics"),
]  # fmt: skip


def make_input(case: Case) -> Any:
    kv = random_kv(case.layout.part_layout(case.part), case.tokens, seed=len(case.name))
    if case.name == "high-bfloat16":
        kv[0, 1, 8, 1, 5] = np.float32(3000.0)  # an outlier that must be escaped
    return kv


def read_input(case: Case) -> Any:
    kv = codec.empty(case.layout.part_layout(case.part), case.tokens)
    data = (OBJECTS / case.name / "input.bin").read_bytes()
    at = 0
    for array in [a for pair in kv for a in pair] if isinstance(kv, list) else [kv]:
        array.view(np.uint8)[...] = np.frombuffer(data, np.uint8, array.nbytes, at).reshape(array.view(np.uint8).shape)
        at += array.nbytes
    assert at == len(data)
    return kv


def qualities(blob: bytes) -> list[str]:
    """What the object can be read at."""
    return list(codec.inspect(blob).bits_per_element)


def digest_of(kv: Any) -> str:
    from hashlib import blake2b

    return blake2b(bits(kv), digest_size=32).hexdigest()


def identity() -> list[dict[str, Any]]:
    """Layouts with their ids and the hashes of a fixed prompt, in every form of the chain."""
    tokens = [*list(range(70)), 2**32 - 1]
    extras = codec.Extras(lora="adapter", salt="alice", multimodal=(codec.MultimodalItem(40, 8, "sha256:ab"),))
    engine = [bytes([index]) * 32 for index in range(2)]
    entries = []
    for layout in (_llama(), _llama("float16"), _llama(partition=codec.Partition(2, 1)), MIXED):
        plain = codec.chunk_refs(layout, tokens, tail=True)
        other = codec.chunk_refs(layout, tokens, extras=extras, tenant_key=b"k" * 32)
        wrapped = codec.wrap_engine_hashes(layout, engine)
        entries.append({
            "canonical": layout.canonical_bytes.decode(),
            "namespace_id": layout.namespace_id.hex(),
            "chunks": [ref.hash.hex() for ref in plain],
            "root": plain[0].parent.hex(),
            "chunks_with_extras_and_key": [ref.hash.hex() for ref in other],
            "engine": [ref.hash.hex() for ref in wrapped],
        })  # fmt: skip
    return entries
