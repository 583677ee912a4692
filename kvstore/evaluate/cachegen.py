"""CacheGen (Liu et al., SIGCOMM 2024, arXiv:2310.07240), as LMCache ships it and as the paper describes it.

Payloads are ideal entropies: what an arithmetic coder with these tables would need, less its rounding. Tables,
lengths and maxima are counted where they travel. Shapes as in `baselines`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvstore.evaluate.baselines import Coded

#: LMCache's `cachegen_basics.py` (at 54641ca): the first 10 layers' keys and the first 2 layers' values are finer.
KEY_FINE_LAYERS, VALUE_FINE_LAYERS = 10, 2
CDF_BITS, LENGTH_BITS, MAXIMUM_BITS = 16, 32, 16
#: An arithmetic coder ends in whole bytes and must say which interval it is in: about a byte a stream.
STREAM_END_BITS = 8

ANCHOR_TOKENS = 10
SYMBOLS = 255  # −127 … 127
_PRIOR_WEIGHT = 8.0  # observations that a channel's table takes from its layer's; a paper's worth of text needs none


@dataclass(frozen=True)
class CacheGenShipped:
    """LMCache's `CacheGenSerializer` (`cachegen_encoder.py` at 54641ca), with its bins for 7B and 8B models.

    Per token and layer the maximum over all channels; q = round(x · M / max) with M = bins/2 − 1; in every chunk an
    int16 CDF of fine_bins + 1 entries and an int32 length for each (layer, K|V, channel), whose symbols over the
    chunk's tokens are one stream.
    """

    fine_bins: int = 32
    coarse_bins: int = 16
    chunk_tokens: int | None = 256
    name: str = "CacheGen shipped"

    def code(self, kv: torch.Tensor) -> Coded:
        assert self.chunk_tokens is not None
        layers, _, tokens, heads, dim = kv.shape
        fine_layers = torch.tensor([KEY_FINE_LAYERS, VALUE_FINE_LAYERS])
        is_fine = torch.arange(layers)[:, None] < fine_layers
        levels = torch.where(is_fine, self.fine_bins // 2 - 1, self.coarse_bins // 2 - 1)[:, :, None, None].float()
        x = kv.flatten(3)
        maxima = x.abs().amax(-1, keepdim=True).bfloat16().float().clamp_min(1e-9)
        symbols = (x * (levels / maxima) + levels).round()
        payload = sum(
            entropy_bits(chunk.transpose(2, 3).long(), self.fine_bins + 1)
            for chunk in symbols.split(self.chunk_tokens, 2)
        )
        streams = layers * 2 * heads * dim * math.ceil(tokens / self.chunk_tokens) / kv.numel()
        bits = {
            "payload": payload / kv.numel(), "tables": CDF_BITS * (self.fine_bins + 1) * streams,
            "lengths": (LENGTH_BITS + STREAM_END_BITS) * streams, "maxima": MAXIMUM_BITS / (heads * dim),
        }  # fmt: skip
        return Coded(((symbols - levels) / levels * maxima).reshape(kv.shape), bits)


@dataclass(frozen=True)
class Statistics:
    """Learned offline from other documents. `[layers, 2, channels]`: `anchor_max`; `[layers, 2]`: `delta_rms`;
    counts `[layers, 2, channels, SYMBOLS]` of anchors' and of deltas' symbols."""

    anchor_max: torch.Tensor
    delta_rms: torch.Tensor
    anchors: torch.Tensor
    deltas: torch.Tensor


@dataclass(frozen=True)
class CacheGenPaper:
    """The paper's encoder, sections 5.2 and 5.3: the first of every 10 tokens is an anchor, coded to 8 bits; the
    others are coded as differences from it with a step of 0.5, 1 and 1.5 (first, middle and last third of the
    layers), here in units of `factor` times the rms of the layer's differences; symbols are arithmetic-coded with
    one table for each (layer, K|V, channel), learned offline and not sent.
    """

    statistics: Statistics
    factor: float
    chunk_tokens: int | None = ANCHOR_TOKENS

    @property
    def name(self) -> str:
        return f"CacheGen paper {self.factor:g}"

    def code(self, kv: torch.Tensor) -> Coded:
        anchors, deltas, restored = _anchored(kv, self.statistics.anchor_max, self.statistics.delta_rms, self.factor)
        payload = _table_bits(anchors, self.statistics.anchors) + _table_bits(deltas, self.statistics.deltas)
        return Coded(restored, {"payload": payload / kv.numel()})


def learn(others: Sequence[torch.Tensor], factor: float) -> Statistics:
    """What CacheGenPaper knows before it meets a document, from the caches of other ones."""
    maxima, energies, counts = [], [], 0
    for kv in others:
        x = kv.float().flatten(3)
        first, rest = _split(x)
        maxima.append(x.abs().amax(2))
        energies.append((rest - first).square().sum((2, 3, 4), dtype=torch.float64))
        counts += rest[0, 0].numel()
    anchor_max = torch.stack(maxima).amax(0).clamp_min(1e-4)
    delta_rms = (torch.stack(energies).sum(0) / counts).sqrt().float().clamp_min(1e-6)
    histograms = [torch.zeros(()), torch.zeros(())]
    for kv in others:
        for index, symbols in enumerate(_anchored(kv.float(), anchor_max, delta_rms, factor)[:2]):
            histograms[index] = histograms[index] + histogram(symbols + SYMBOLS // 2, SYMBOLS)
    return Statistics(anchor_max, delta_rms, *histograms)


def _anchored(
    kv: torch.Tensor, anchor_max: torch.Tensor, delta_rms: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Symbols of anchors and of deltas, int64 `[layers, 2, channels, count]`, and the restored cache."""
    layers, _, tokens = kv.shape[:3]
    first, rest = _split(kv.flatten(3))
    anchor_step = (anchor_max / (SYMBOLS // 2))[:, :, None, None]
    thirds = torch.tensor([0.5, 1.0, 1.5])[torch.arange(layers) * 3 // layers]
    delta_step = (thirds[:, None] * factor * delta_rms)[:, :, None, None, None]
    anchors = _symbols(first / anchor_step)
    anchor = anchors * anchor_step
    deltas = _symbols((rest - anchor) / delta_step)
    restored = torch.cat([anchor, anchor + deltas * delta_step], 3).flatten(2, 3)[:, :, :tokens]
    present = deltas.flatten(2, 3)[:, :, : tokens - anchors.shape[2]]  # what fills up the last group comes last
    return anchors.flatten(2, 3).transpose(2, 3).long(), present.transpose(2, 3).long(), restored.reshape(kv.shape)


def _split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[layers, 2, groups, 1, channels]` and `[layers, 2, groups, 9, channels]`; the last group is filled up with its
    last token, whose copies are dropped again."""
    missing = -x.shape[2] % ANCHOR_TOKENS
    grouped = torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1)], 2).unflatten(2, (-1, ANCHOR_TOKENS))
    return grouped[:, :, :, :1], grouped[:, :, :, 1:]


def _symbols(x: torch.Tensor) -> torch.Tensor:
    return x.round().clamp(-(SYMBOLS // 2), SYMBOLS // 2)


def histogram(symbols: torch.Tensor, count: int) -> torch.Tensor:
    """float32 `[..., count]`: how often each of `count` symbols is in each row of int64 `[..., n]`."""
    rows = symbols.flatten(0, -2)
    offsets = torch.arange(len(rows))[:, None] * count
    counted = torch.bincount((rows + offsets).flatten(), minlength=len(rows) * count)
    return counted.float().reshape(*symbols.shape[:-1], count)


def entropy_bits(symbols: torch.Tensor, count: int) -> float:
    """Bits for int64 `[..., n]` if every row is coded with its own exact table."""
    found = histogram(symbols, count)
    share = found / found.sum(-1, keepdim=True)
    return -float((found * share.clamp_min(1e-30).log2()).sum(dtype=torch.float64))


def _table_bits(symbols: torch.Tensor, counts: torch.Tensor) -> float:
    """Bits for int64 `[layers, 2, channels, n]` with tables from `counts`, none of whose symbols is impossible."""
    layer = counts.sum(2, keepdim=True) + 1 / SYMBOLS
    prior = layer / layer.sum(-1, keepdim=True)
    share = (counts + _PRIOR_WEIGHT * prior) / (counts.sum(-1, keepdim=True) + _PRIOR_WEIGHT)
    return -float((histogram(symbols + SYMBOLS // 2, SYMBOLS) * share.log2()).sum(dtype=torch.float64))
