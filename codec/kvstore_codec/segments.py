"""Which planes share a segment, and what codes one.

A segment decodes alone, so it should be small; its entropy coder's states cost 128 bytes a stream, so it should
not be tiny. K and V of a layer get one segment each where a plane is large enough, else layers are joined. The
rule binds the encoder only: a reader takes the grouping from the object's segment table.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvstore_codec.arrays import Plane
from kvstore_codec.container import KV
from kvstore_codec.layout import KVLayout, LayerKind
from kvstore_codec.rope import Rotation

#: elements that keep the cost of one stream's states around 0.01 bit an element
SEGMENT_ELEMENTS_MIN = 3 << 15
#: channels of layers that are joined: a decoder's memory grows with them
SEGMENT_CHANNELS_MAX = 1 << 12


_BOTH = KV.K | KV.V
#: for each kv, of a layer's two planes the first, and the step to the next
_SIDES = {KV.K: (0, 2), KV.V: (1, 2), _BOTH: (0, 1)}


class SegmentGroup(NamedTuple):
    """Planes `kv` of layers [layer_first, layer_first + layer_count)."""

    kv: KV
    layer_first: int
    layer_count: int

    @property
    def layers(self) -> range:
        return range(self.layer_first, self.layer_first + self.layer_count)

    @property
    def plane_indices(self) -> range:
        """Positions in the list K₀, V₀, K₁, V₁, …, in coding order."""
        first, step = _SIDES[self.kv]
        return range(2 * self.layer_first + first, 2 * (self.layer_first + self.layer_count), step)


@functools.lru_cache(256)
def segment_groups(layout: KVLayout, tokens: int) -> tuple[SegmentGroup, ...]:
    """The encoder's grouping for a chunk of `tokens` tokens, in payload order. Recurrent state, which is always exact,
    never shares a segment with anything else."""
    groups: list[SegmentGroup] = []
    for state, run in itertools.groupby(range(layout.num_layers), lambda layer: is_state(layout, layer)):
        layers = list(run)
        groups += _groups(layout, tokens, layers[0], len(layers), state)
    return tuple(groups)


def is_state(layout: KVLayout, layer: int) -> bool:
    return layout.layers[layer].kind is LayerKind.STATE


def _groups(layout: KVLayout, tokens: int, first: int, layers: int, state: bool) -> list[SegmentGroup]:
    chosen = layout.layers[first : first + layers]
    smallest = min(min(layer.k_channels, layer.v_channels) for layer in chosen) * tokens
    if smallest >= SEGMENT_ELEMENTS_MIN:
        return [SegmentGroup(kv, layer, 1) for layer in range(first, first + layers) for kv in (KV.K, KV.V)]
    channels = sum(layer.k_channels + layer.v_channels for layer in chosen)
    wanted = max(1, channels * tokens // SEGMENT_ELEMENTS_MIN, -(-channels // SEGMENT_CHANNELS_MAX))
    count = min(layers, wanted)
    edges = [first + index * layers // count for index in range(count + 1)]
    return [SegmentGroup(_BOTH, edge, end - edge) for edge, end in itertools.pairwise(edges)]


class CodedPlane(NamedTuple):
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


class GroupProfile(Protocol):
    """What a coder reads of a `profile.ProfileGroup`; see there for shapes and meaning."""

    @property
    def mean(self) -> npt.NDArray[np.float32]: ...
    @property
    def weight(self) -> npt.NDArray[np.float32]: ...
    @property
    def basis(self) -> npt.NDArray[np.float16] | None: ...
    @property
    def scale_ids(self) -> npt.NDArray[np.uint8]: ...
    @property
    def components(self) -> int: ...


class LossySegment(NamedTuple):
    """One segment as a coder sees it.

    `drains`: ascending indices of its drain tokens (encoders only); None: the encoder finds them, in planes that are K
    and V of whole layers. `profile`: where means, units and scales come from,
    None: they travel in the segment. `step_quarters`: the base step is 2^(step_quarters/4) units of the profile
    (encoders only).
    """

    planes: Sequence[CodedPlane]
    drains: npt.NDArray[np.uint16] | None
    profile: GroupProfile | None = None
    step_quarters: int = 0


NO_DRAINS: npt.NDArray[np.uint16] = np.zeros(0, np.uint16)


class SegmentCoder(Protocol):
    """What the NumPy reference and the C++ core both provide, bit for bit alike. Segments are independent: a coder may
    work on `threads` of them at a time."""

    def drain_tokens(
        self, groups: Sequence[Sequence[tuple[Plane, Plane]]], sinks: int, dtype: str, threads: int
    ) -> list[npt.NDArray[np.uint16]]:
        """For each group of layers' (K, V): ascending indices of the tokens whose K or V norm is far below a layer's
        median; none where they are more than half."""

    def encode_lossy(
        self, segments: Sequence[LossySegment], sinks: int, dtype: str, levels: int, threads: int
    ) -> list[list[bytes]]:
        """For each segment the payloads of quality layers 0…levels−1. Raises ValuesError for values not finite."""

    def decode_lossy(
        self,
        segments: Sequence[LossySegment],
        payloads: Sequence[Sequence[memoryview]],
        sinks: int,
        dtype: str,
        threads: int,
    ) -> None:
        """Writes each segment's planes from its payloads of quality layers 0…n−1. Raises DamagedObject."""

    def encode_lossless(self, segments: Sequence[Sequence[Plane]], dtype: str, threads: int) -> list[bytes]: ...

    def decode_lossless(
        self, segments: Sequence[Sequence[Plane]], payloads: Sequence[memoryview], dtype: str, threads: int
    ) -> None:
        """Raises DamagedObject."""
