"""The KV of one window's prefix: as captured bits, as the codec's un-rotated channels, as a cache to go on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

from kvstore.calibrate.model import LoadedModel
from kvstore.calibrate.options import TAIL_TOKENS, WINDOW_TOKENS
from kvstore.calibrate.work import WorkFolder
from kvstore_client.integrations.transformers import kv_from_cache
from kvstore_codec import KVLayout, arrays
from kvstore_codec.api import SINK_POSITIONS
from kvstore_codec.arrays import Bits
from kvstore_codec.profile_statistics import drain_tokens
from kvstore_codec.reference.numerics import rotate, to_float32
from kvstore_codec.rope import rotation_for
from kvstore_codec.segments import SegmentGroup

Float32s = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class WindowKV:
    """Planes K₀, V₀, K₁, … of tokens at positions 0…n−1: bits of the layout's dtype, keys after RoPE."""

    layout: KVLayout
    planes: Sequence[Bits]

    @property
    def tokens(self) -> int:
        return int(self.planes[0].shape[0])

    def values(self, plane: int) -> Float32s:
        """[tokens, heads, dim] as cached."""
        return to_float32(np.array(self.planes[plane], order="C"), self.layout.dtype)

    def unrotated(self, plane: int, values: Float32s | None = None) -> Float32s:
        """[tokens, channels] as coded: RoPE undone. Of `values` (say gradients) instead of the plane's, if given."""
        rotation = None if plane % 2 else rotation_for(self.layout.layers[plane // 2], 0, self.tokens)
        chosen = self.values(plane) if values is None else values
        return rotate(chosen, rotation, inverse=True).reshape(self.tokens, -1)

    def channels(self, group: SegmentGroup) -> Float32s:
        """[tokens without sinks, channels] of the planes of a profile's group, as coded."""
        return np.concatenate([self.unrotated(plane)[SINK_POSITIONS:] for plane in group.plane_indices], axis=1)

    def steady_tokens(self, layer: int) -> npt.NDArray[np.bool_]:
        """[tokens]: neither sinks, nor drain tokens of the layer, nor in the tail that is recomputed."""
        steady = np.ones(self.tokens, bool)
        k, v = self.planes[2 * layer], self.planes[2 * layer + 1]
        steady[drain_tokens(k, v, SINK_POSITIONS, self.layout.dtype)] = False
        steady[:SINK_POSITIONS] = False
        steady[-TAIL_TOKENS:] = False
        return steady

    def float_pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(k, v) a layer, float32 [1, heads, tokens, dim]: new memory."""
        tensors = [
            torch.from_numpy(self.values(plane).transpose(1, 0, 2)[None].copy()) for plane in range(len(self.planes))
        ]
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def kv(self) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """(k, v) a layer, as `codec.encode` takes them."""
        dtype = arrays.empty(self.layout, 1)[0][0].dtype
        views = [np.asarray(plane).view(dtype) for plane in self.planes]
        return list(zip(views[::2], views[1::2], strict=True))


def cache_of(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """A cache that holds `pairs`; gradients flow back to them."""
    cache = DynamicCache()
    for index, (k, v) in enumerate(pairs):
        cache.update(k, v, index)
    return cache


def captured(loaded: LoadedModel, work: WorkFolder, index: int, tokens: list[int]) -> WindowKV:
    """The KV of window `index`'s prefix: its bits out of the work folder, computed where they are missing."""
    layout = loaded.layout

    def compute() -> dict[str, npt.NDArray[Any]]:
        kv = kv_from_cache(loaded.prefill(tokens[:WINDOW_TOKENS]), layout)
        return {"kv": np.concatenate([arrays.read(plane).reshape(-1) for plane in arrays.planes(kv, layout)])}

    bits = work.arrays(f"window-{index:04d}", compute)["kv"]
    planes, at = [], 0
    for layer in layout.layers:
        for dim in (layer.k_dim, layer.v_dim):
            shape = (WINDOW_TOKENS, layer.kv_heads, dim)
            planes.append(bits[at : at + int(np.prod(shape))].reshape(shape))
            at += planes[-1].size
    return WindowKV(layout, planes)
