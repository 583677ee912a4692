"""Which planes share a segment, and what codes one.

A segment decodes alone, so it should be small; its entropy coder's states cost 128 bytes a stream, so it should
not be tiny. K and V of a layer get one segment each where a plane is large enough, else layers are joined. The
rule binds the encoder only: a reader takes the grouping from the object's segment table.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore_codec.arrays import Plane
from kvstore_codec.container import KV
from kvstore_codec.layout import KVLayout
from kvstore_codec.rope import Rotation

#: elements that keep the cost of one stream's states around 0.01 bit an element
SEGMENT_ELEMENTS_MIN = 3 << 15


@dataclass(frozen=True)
class SegmentGroup:
    """Planes `kv` of layers [layer_first, layer_first + layer_count)."""

    kv: KV
    layer_first: int
    layer_count: int

    @property
    def plane_indices(self) -> list[int]:
        """Positions in the list K₀, V₀, K₁, V₁, …, in coding order."""
        layers = range(self.layer_first, self.layer_first + self.layer_count)
        return [2 * layer + side for layer in layers for side, plane in enumerate((KV.K, KV.V)) if plane in self.kv]


def segment_groups(layout: KVLayout, tokens: int) -> list[SegmentGroup]:
    """The encoder's grouping for a chunk of `tokens` tokens, in payload order."""
    smallest = min(min(layer.k_channels, layer.v_channels) for layer in layout.layers) * tokens
    if smallest >= SEGMENT_ELEMENTS_MIN:
        return [SegmentGroup(kv, layer, 1) for layer in range(layout.num_layers) for kv in (KV.K, KV.V)]
    count = max(1, min(layout.num_layers, layout.elements_per_token * tokens // SEGMENT_ELEMENTS_MIN))
    edges = [index * layout.num_layers // count for index in range(count + 1)]
    return [SegmentGroup(KV.K | KV.V, first, last - first) for first, last in itertools.pairwise(edges)]


@dataclass(frozen=True, eq=False)
class CodedPlane:
    """One plane as a coder sees it.

    `bits`: `[tokens, heads, dim]` unsigned view, read by encoders, written by decoders. `rotation`: un-rotate before
    coding (keys of a layer with RoPE). `step_factor`: base quantiser step in units of the plane's rms.
    """

    bits: Plane
    rotation: Rotation | None
    step_factor: float

    @property
    def channels(self) -> int:
        return int(self.bits.shape[1] * self.bits.shape[2])


class SegmentCoder(Protocol):
    """What the NumPy reference and the C++ core both provide, bit for bit alike."""

    def drain_tokens(self, k: Plane, v: Plane, sinks: int, dtype: str) -> npt.NDArray[np.uint16]:
        """Ascending indices of the tokens whose K or V norm is far below the layer's median."""

    def encode_lossy(
        self,
        planes: Sequence[CodedPlane],
        drains: npt.NDArray[np.uint16],
        sinks: int,
        dtype: str,
        levels: int,
    ) -> list[bytes]:
        """Payloads of quality layers 0…levels−1. Raises ValuesError for values that are not finite."""

    def decode_lossy(
        self, payloads: Sequence[memoryview], planes: Sequence[CodedPlane], sinks: int, dtype: str
    ) -> None:
        """Writes `planes` from the payloads of quality layers 0…n−1. Raises DamagedObject."""

    def encode_lossless(self, planes: Sequence[Plane], dtype: str) -> bytes: ...

    def decode_lossless(self, payload: memoryview, planes: Sequence[Plane], dtype: str) -> None:
        """Raises DamagedObject."""
