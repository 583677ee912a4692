"""The profiles that are pinned under tests/vectors/profiles, most of them made by exact arithmetic alone."""

from __future__ import annotations

import hashlib
from typing import Any

import golden
import numpy as np
import numpy.typing as npt
from kv_strategies import random_kv

import kvstore_codec as codec
from kvstore_codec.container import KV

BOTH = KV.K | KV.V
#: KV that the pinned statistics are learned from: 32 tokens of UNIFORM, plane after plane
LEARNED_FROM = golden.PROFILES / "statistics.bin"
LEARNED_TOKENS = 32
UNIFORM = {
    dtype: next(case.layout for case in golden.CASES if case.name == f"high-{dtype}")
    for dtype in ("bfloat16", "float16", "float32")
}


def group(kv: KV, layer_first: int, layer_count: int, channels: int, rows: int | None) -> codec.ProfileGroup:
    """Values of each field that differ from channel to channel; `rows` of a basis, or none."""
    index = np.arange(channels)
    basis: npt.NDArray[np.float16] | None = None
    if rows is not None:
        flip = np.where(np.add.outer(np.arange(rows), index) % 3 == 0, -0.5, 0.125)
        basis = (np.eye(rows, channels) + flip).astype(np.float16)
    return codec.ProfileGroup(
        kv, layer_first, layer_count,
        mean=((index - 3) / 8).astype(np.float32), weight=(1 + index / 16).astype(np.float32), basis=basis,
        scale_ids=(index[: channels if rows is None else rows] * 7 % 64).astype(np.uint8),
    )  # fmt: skip


def hadamard(kv: KV, channels: int, rows: int) -> codec.ProfileGroup:
    """A group over both layers whose basis is `rows` rows of a Hadamard matrix: orthonormal up to rounding."""
    signs = np.array([[(-1) ** int(row & column).bit_count() for column in range(channels)] for row in range(rows)])
    index = np.arange(channels)
    return codec.ProfileGroup(
        kv, 0, 2,
        mean=((index % 9 - 4) / 8).astype(np.float32), weight=((1 + index % 8) / 64).astype(np.float32),
        basis=(signs * np.float16(channels**-0.5)).astype(np.float16),
        scale_ids=np.sort(np.arange(rows) * 7 % 48 + 8)[::-1].astype(np.uint8),
    )  # fmt: skip


def learned_input() -> Any:
    """What LEARNED_FROM is written from; generators may change, the file stays."""
    return random_kv(UNIFORM["bfloat16"], LEARNED_TOKENS, seed=5)


def profiles() -> dict[str, codec.Profile]:
    """By name. "transform-*", "diagonal" and "statistics" are of layouts that golden objects have."""
    transforms = {
        f"transform-{dtype}": codec.Profile(
            codec.ProfileKind.TRANSFORM, codec.model_id_of(layout), (hadamard(BOTH, 128, 100),),
            {"model": "golden", "kl": {"medium": 0.001}, "tokens": 28000, "name": "Ångström"},
        )
        for dtype, layout in UNIFORM.items()
    }  # fmt: skip
    layout = UNIFORM["bfloat16"]
    learned = codec.empty(layout, LEARNED_TOKENS)
    learned[...] = np.frombuffer(LEARNED_FROM.read_bytes(), learned.dtype).reshape(learned.shape)
    return transforms | {
        "diagonal": codec.Profile(
            codec.ProfileKind.DIAGONAL, codec.model_id_of(layout),
            (group(KV.K, 0, 2, 64, None), group(KV.V, 0, 2, 64, None)), {},
        ),
        "diagonal-mixed-layers": codec.Profile(
            codec.ProfileKind.DIAGONAL, codec.model_id_of(golden.MIXED),
            (group(KV.K, 0, 4, 86, None), group(KV.V, 0, 2, 40, None), group(KV.V, 2, 1, 0, None),
             group(KV.V, 3, 1, 6, None)), {},
        ),
        "statistics": codec.learn_statistics([(learned, 0)], layout),
    }  # fmt: skip


def digest_of(basis: npt.NDArray[np.float16]) -> str:
    return hashlib.blake2b(basis.astype("<f2").tobytes(), digest_size=32).hexdigest()


def described(profile: codec.Profile) -> dict[str, Any]:
    """What the bytes of a profile mean, to be compared with what they meant when they were pinned."""
    return {
        "profile_id": profile.profile_id.hex(),
        "kind": int(profile.kind),
        "model_id": profile.model_id.hex(),
        "metadata": profile.metadata,
        "groups": [
            {
                "kv": int(group.kv), "layer_first": group.layer_first, "layer_count": group.layer_count,
                "mean": group.mean.tolist(), "weight": group.weight.tolist(), "scale_ids": group.scale_ids.tolist(),
                "basis_blake2b_256": None if group.basis is None else digest_of(group.basis),
            }
            for group in profile.groups
        ],
    }  # fmt: skip
