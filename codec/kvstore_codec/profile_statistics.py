"""Statistics profiles: an object's own side information, learned once from a namespace's first chunks.

Without a profile every object carries step, means and scale ids of its planes, which small pages pay dearly for. They
hardly differ between chunks of one model, so those of a few chunks serve all. No model is run and no loss is measured:
the step follows from each plane's rms, by the same rule as in objects without a profile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_codec import arrays
from kvstore_codec.api import SINK_POSITIONS, STEP_FACTOR_K, STEP_FACTOR_V
from kvstore_codec.arrays import KVArray, Plane
from kvstore_codec.errors import LayoutError, ProfileError, ValuesError
from kvstore_codec.layout import KVLayout
from kvstore_codec.native import NATIVE
from kvstore_codec.profile import Profile, ProfileGroup, ProfileKind, model_id_of, plane_channels, scale_ids_of
from kvstore_codec.reference.numerics import rotate, sum_columns, sum_rows, to_float32
from kvstore_codec.rope import rotation_for
from kvstore_codec.segments import SegmentGroup, segment_groups

#: the page size whose grouping of layers a profile follows: it is small pages that a profile helps most
_PAGE_TOKENS = 16
#: the codec's own limit on values
_MAGNITUDE_MAX = 2.0**60
#: beyond what any cache needs, and within what the weights of a profile may be
_STEP_MIN, _STEP_MAX = 2.0**-39, 2.0**39
_LOSSY_DTYPES = ("bfloat16", "float16", "float32")

Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _PlaneMoments:
    """Of one plane's tokens that are neither sinks nor drain tokens: how many, mean and variance per channel."""

    tokens: int
    mean: Float64s
    variance: Float64s


def learn_statistics(kv_chunks: Sequence[tuple[KVArray, int]], layout: KVLayout, *, step: float = 1.0) -> Profile:
    """A statistics profile of `layout`'s model from chunks [(kv, first_position), …].

    `kv`: any number of tokens in the forms that `encode` takes, keys after RoPE, all parts together; the first token
    is at `first_position`. Sinks (positions under 4) and drain tokens (K norm under 0.5 or V norm under 0.25 of the
    layer's median) do not count. weight = 1/(step · factor · rms of the plane's mean-removed values), so that the
    base step is 1; `step` 2 makes every quality twice as coarse. The result depends on the values and their order
    alone: sums are float64 in a fixed order.

    Raises LayoutError (shape, dtype), ValuesError (NaN or infinities), ProfileError (no token that counts).
    """
    if layout.dtype not in _LOSSY_DTYPES:
        raise LayoutError(f"statistics are learned of {', '.join(_LOSSY_DTYPES)}", dtype=layout.dtype)
    if not (0 < step < np.inf):
        raise LayoutError("step must be positive and finite", step=step)
    if any(first_position < 0 for _, first_position in kv_chunks):
        raise LayoutError("first_position must not be negative")
    chunks = [(arrays.planes(kv, layout), first_position) for kv, first_position in kv_chunks]
    layers = [_layer_moments(chunks, layout, layer) for layer in range(layout.num_layers)]
    moments = [plane for layer in layers for plane in layer]
    groups = tuple(_group(group, moments, step) for group in segment_groups(layout, _PAGE_TOKENS))
    metadata = {"tokens": sum(planes[0].shape[0] for planes, _ in chunks), "chunks": len(chunks)}
    return Profile(ProfileKind.STATISTICS, model_id_of(layout), groups, metadata)


def drain_tokens(k: Plane, v: Plane, sinks: int, dtype: str) -> npt.NDArray[np.uint16]:
    """Indices of a layer's drain tokens, by the codec's own rule."""
    return NATIVE.drain_tokens([[(k, v)]], sinks, dtype, 1)[0]


def _layer_moments(
    chunks: Sequence[tuple[list[Plane], int]], layout: KVLayout, layer: int
) -> tuple[_PlaneMoments, _PlaneMoments]:
    """Of the layer's K (un-rotated) and V."""
    counted = 0
    sums = [np.zeros((2, plane_channels(layout, 2 * layer + side))) for side in range(2)]
    for planes, first_position in chunks:
        k, v = planes[2 * layer], planes[2 * layer + 1]
        tokens = k.shape[0]
        sinks = max(0, min(tokens, SINK_POSITIONS - first_position))
        counts = np.ones(tokens, bool)
        counts[:sinks] = False
        counts[drain_tokens(k, v, sinks, layout.dtype)] = False
        counted += int(counts.sum())
        rotations = (rotation_for(layout.layers[layer], first_position, tokens), None)
        for side, (plane, rotation) in enumerate(zip((k, v), rotations, strict=True)):
            values = to_float32(arrays.read(plane), layout.dtype)
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
                flat = rotate(values, rotation, inverse=True).reshape(tokens, -1)[counts].astype(np.float64)
                sums[side] += np.stack([sum_columns(flat), sum_columns(flat * flat)])
    if not counted:
        raise ProfileError("no token to learn from: give more, at later positions", tokens=counted)
    return _moments(sums[0], counted), _moments(sums[1], counted)


def _moments(sums: Float64s, tokens: int) -> _PlaneMoments:
    mean, square = sums / tokens
    if not (square < _MAGNITUDE_MAX * _MAGNITUDE_MAX).all():
        raise ValuesError("kv holds NaN, infinite or huge values: learn from other chunks")
    return _PlaneMoments(tokens, mean, np.maximum(square - mean * mean, 0.0))


def _group(group: SegmentGroup, moments: Sequence[_PlaneMoments], step: float) -> ProfileGroup:
    factors = (step * STEP_FACTOR_K, step * STEP_FACTOR_V)
    planes = [(moments[index], _weight(moments[index], factors[index % 2])) for index in group.plane_indices]
    variances = [plane.variance * weight * weight for plane, weight in planes]
    return ProfileGroup(
        group.kv, group.layer_first, group.layer_count,
        mean=_joined([plane.mean for plane, _ in planes]).astype(np.float32),
        weight=_joined([np.full(plane.mean.shape, weight) for plane, weight in planes]).astype(np.float32),
        basis=None, scale_ids=scale_ids_of(_joined(variances)),
    )  # fmt: skip


def _weight(plane: _PlaneMoments, step_factor: float) -> float:
    """1/step. A plane that never changes tells nothing; it gets weight 1."""
    channels = plane.variance.size
    mean_square = float(sum_rows(plane.variance)) / channels if channels else 0.0
    step = float(step_factor * np.sqrt(mean_square))
    return 1.0 / min(max(step, _STEP_MIN), _STEP_MAX) if step else 1.0


def _joined(pieces: Sequence[npt.NDArray[Any]]) -> Float64s:
    return np.concatenate(pieces) if pieces else np.zeros(0)
