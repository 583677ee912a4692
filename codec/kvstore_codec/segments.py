"""Which planes share a segment.

A segment decodes alone, so it should be small; its entropy coder's states cost 128 bytes a stream, so it should
not be tiny. K and V of a layer get one segment each where a plane is large enough, else layers are joined. The
rule binds the encoder only: a reader takes the grouping from the object's segment table.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore_codec.container import KV
from kvstore_codec.layout import KVLayout

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
    return [SegmentGroup(KV.K | KV.V, first, last - first) for first, last in zip(edges, edges[1:], strict=False)]
