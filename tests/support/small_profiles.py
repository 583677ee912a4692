"""Small profiles for tests of what carries them."""

from __future__ import annotations

import numpy as np

import kvstore_codec as codec
from kvstore_codec.container import KV
from kvstore_codec.profile import plane_channels


def transform_profile(layout: codec.KVLayout, seed: int = 0) -> codec.Profile:
    """One group of all layers: a random orthonormal basis, means and weights, and a scale id of each component."""
    rng = np.random.default_rng(seed)
    channels = sum(plane_channels(layout, plane) for plane in range(2 * layout.num_layers))
    basis = np.linalg.qr(rng.standard_normal((channels, channels)))[0].astype(np.float16)
    group = codec.ProfileGroup(
        KV.K | KV.V, 0, layout.num_layers,
        mean=rng.standard_normal(channels).astype(np.float32),
        weight=np.exp2(rng.uniform(-1, 1, channels)).astype(np.float32),
        basis=basis, scale_ids=rng.integers(20, 32, channels).astype(np.uint8),
    )  # fmt: skip
    return codec.Profile(codec.ProfileKind.TRANSFORM, codec.model_id_of(layout), (group,), {"seed": seed})
