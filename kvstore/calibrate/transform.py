"""The transform of each group of layers, and the profile that it folds into at a given step.

    Karhunen–Loève transform of the weighted channels: U, λ of the covariance of a·(x − mean), descending.

In weighted coordinates a unit of error costs the same loss in every component, so one step serves all of them, and
with an entropy coder equal steps are the best allocation of bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvstore.calibrate.capture import WindowKV
from kvstore.calibrate.options import TAIL_TOKENS, WINDOW_TOKENS
from kvstore.calibrate.work import Arrays
from kvstore_codec import KVLayout, Profile, ProfileGroup, ProfileKind, model_id_of
from kvstore_codec.container import KV
from kvstore_codec.profile import plane_channels, scale_ids_of
from kvstore_codec.segments import SegmentGroup

Float64s = npt.NDArray[np.float64]


def layer_groups(layout: KVLayout, layers_per_group: int, *, split_kv: bool) -> list[SegmentGroup]:
    """Consecutive layers, `layers_per_group` together (fewer in the last group), K and V in one group or two."""
    sides = (KV.K, KV.V) if split_kv else (KV.K | KV.V,)
    return [
        SegmentGroup(kv, first, min(layers_per_group, layout.num_layers - first))
        for first in range(0, layout.num_layers, layers_per_group)
        for kv in sides
    ]


def channels_of(group: SegmentGroup, layout: KVLayout) -> int:
    return sum(plane_channels(layout, plane) for plane in group.plane_indices)


def measure_group(
    group: SegmentGroup, windows: Iterable[WindowKV], scales: Sequence[Float64s], *, with_basis: bool
) -> Arrays:
    """ "mean", "scale" (a) and "variance" float64 [channels], and "basis" float16 [channels, channels] if wanted.

    `scales`: a of every plane. Variances are those of the basis's components, or else of the weighted channels."""
    scale = np.concatenate([scales[plane] for plane in group.plane_indices])
    count, total = 0, torch.zeros(scale.size, dtype=torch.float64)
    square = torch.zeros((scale.size,) * (2 if with_basis else 1), dtype=torch.float64)
    for window in windows:
        weighted = torch.from_numpy(window.channels(group)).double() * torch.from_numpy(scale)
        count += weighted.shape[0]
        total += weighted.sum(0)
        square += weighted.T @ weighted if with_basis else (weighted * weighted).sum(0)
    mean = total / count
    result = {"mean": mean.numpy() / scale, "scale": scale}
    if not with_basis:
        return result | {"variance": np.maximum((square / count - mean * mean).numpy(), 0.0)}
    eigenvalues, vectors = torch.linalg.eigh(square / count - torch.outer(mean, mean))
    rows = vectors.T.flip(0).numpy()
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)
    basis = (rows * np.sign(largest)).astype(np.float16)  # an eigenvector's sign is free: one of them, always the same
    return result | {"variance": np.maximum(eigenvalues.flip(0).numpy(), 0.0), "basis": basis}


def fold(layout: KVLayout, kind: ProfileKind, groups: Sequence[tuple[SegmentGroup, Arrays]], step: float) -> Profile:
    """The profile whose base step is `step` in weighted coordinates; components that no quality codes are dropped."""
    return Profile(kind, model_id_of(layout), tuple(_folded(group, of, step) for group, of in groups), {})


def _folded(group: SegmentGroup, measured: Arrays, step: float) -> ProfileGroup:
    ids = scale_ids_of(measured["variance"] / (step * step))
    basis = None
    if "basis" in measured:
        coded = int(np.count_nonzero(ids))  # variances descend, and id 0 is not coded
        ids, basis = ids[:coded], np.array(measured["basis"][:coded])
    return ProfileGroup(
        group.kv, group.layer_first, group.layer_count, measured["mean"].astype(np.float32),
        (measured["scale"] / step).astype(np.float32), basis, ids,
    )  # fmt: skip


def predicted_step(groups: Sequence[tuple[SegmentGroup, Arrays]], kl: float) -> float:
    """The step at which quantisation should cost `kl` nats a token: ½ Σ over cached tokens and components of
    min(λ, step²/12). A start for measuring, good within a factor of a few."""
    variances = np.concatenate([measured["variance"] for _, measured in groups])
    allowed = 2 * kl / (WINDOW_TOKENS - TAIL_TOKENS)
    low, high = -60.0, 60.0  # log₂ of the step
    while high - low > 1e-3:
        middle = (low + high) / 2
        if float(np.minimum(variances, 4.0**middle / 12).sum()) > allowed:
            high = middle
        else:
            low = middle
    return float(2.0**low)
