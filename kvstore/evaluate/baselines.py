"""Quantisers with fixed-length codes that others use for KV caches, from their published formulas.

Every `code` takes the exact cache of one prefix, float32 `[layers, 2, tokens, kv_heads, head_dim]` with keys after
RoPE, and returns it quantised and restored, with every bit that would have to be stored: codes, scales, zero points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

FP8_MAX = 448.0
SCALE_BITS = 16  # scales and zero points are float16 in all of these
_SCALE_MIN = 1e-6  # of a constant group; smaller ones are no longer float16 with all their digits


@dataclass(frozen=True)
class Coded:
    """`kv`: as given, restored. `bits`: bits per element by what they are spent on."""

    kv: torch.Tensor
    bits: Mapping[str, float]

    @property
    def bits_per_element(self) -> float:
        return sum(self.bits.values())


class Baseline(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def chunk_tokens(self) -> int | None:
        """Tokens that share side information, None where tokens are independent of each other."""

    def code(self, kv: torch.Tensor) -> Coded: ...


@dataclass(frozen=True)
class Fp8:
    """float8 e4m3 with scale 1, as vLLM's `kv_cache_dtype="fp8"` without calibrated scales (Micikevicius et al.,
    "FP8 Formats for Deep Learning", arXiv:2209.05433); values beyond ±448 saturate."""

    name: str = "fp8 e4m3"
    chunk_tokens: int | None = None

    def code(self, kv: torch.Tensor) -> Coded:
        return Coded(kv.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float(), {"codes": 8.0})


@dataclass(frozen=True)
class Int8TokenHead:
    """Symmetric int8 with one float16 scale a token and head: absmax quantisation (Dettmers et al., "LLM.int8()",
    arXiv:2208.07339, vector-wise), as several engines apply to the cache."""

    name: str = "int8 token-head"
    chunk_tokens: int | None = None

    def code(self, kv: torch.Tensor) -> Coded:
        scale = _half((kv.abs().amax(-1, keepdim=True) / 127).clamp_min(_SCALE_MIN))
        restored = (kv / scale).round().clamp(-127, 127) * scale
        return Coded(restored, {"codes": 8.0, "scales": SCALE_BITS / kv.shape[-1]})


@dataclass(frozen=True)
class Int4Channel:
    """Asymmetric int4 with a float16 scale and zero a channel and chunk: the plain per-channel quantiser that
    KVQuant (Hooper et al., arXiv:2401.18079) and KIVI start from."""

    name: str = "int4 channel"
    chunk_tokens: int | None = 256

    def code(self, kv: torch.Tensor) -> Coded:
        assert self.chunk_tokens is not None
        return _coded([_grouped(kv[:, plane], 4, dim=1, size=self.chunk_tokens) for plane in (0, 1)], kv, 4)


@dataclass(frozen=True)
class Kivi:
    """KIVI (Liu et al., arXiv:2402.02750): asymmetric `bits`-bit groups of 32, keys along tokens within a channel,
    values along channels within a token. Its window of recent tokens in full precision is not kept: it stores no
    tail at all that is recomputed, and would only add bits to one that is not."""

    bits: int
    group: int = 32
    chunk_tokens: int | None = None

    @property
    def name(self) -> str:
        return f"KIVI-{self.bits}"

    def code(self, kv: torch.Tensor) -> Coded:
        keys = _grouped(kv[:, 0], self.bits, dim=1, size=self.group)
        values = _grouped(kv[:, 1].flatten(2), self.bits, dim=2, size=self.group)
        return _coded([keys, (values[0].reshape(kv[:, 1].shape), values[1])], kv, self.bits)


def fixed_length() -> list[Baseline]:
    return [Fp8(), Int8TokenHead(), Int4Channel(), Kivi(4), Kivi(2)]


def _grouped(x: torch.Tensor, bits: int, *, dim: int, size: int) -> tuple[torch.Tensor, int]:
    """`x` quantised in groups of `size` along `dim` (the last may be smaller), and how many groups there are.

    q = round((x − min) / s), s = (max − min) / (2^bits − 1), both stored as float16.
    """
    levels = (1 << bits) - 1
    parts, groups = [], 0
    for part in x.split(size, dim):
        low, high = part.amin(dim, keepdim=True), part.amax(dim, keepdim=True)
        zero = _half(low)
        scale = _half(((high - zero) / levels).clamp_min(_SCALE_MIN))
        parts.append(((part - zero) / scale).round().clamp(0, levels) * scale + zero)
        groups += low.numel()
    return torch.cat(parts, dim), groups


def _coded(planes: list[tuple[torch.Tensor, int]], kv: torch.Tensor, bits: int) -> Coded:
    groups = sum(count for _, count in planes)
    restored = torch.stack([plane for plane, _ in planes], 1)
    return Coded(restored, {"codes": float(bits), "scales": 2 * SCALE_BITS * groups / kv.numel()})


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()
