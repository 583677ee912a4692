"""What is compared: a row stores a document's exact cache and restores it, and knows the bits that this took.

A codec row makes real objects, chunk by chunk at their own positions, and counts all their bytes; a baseline counts
its own formula's bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

import kvstore_codec as codec
from kvstore.evaluate import cachegen
from kvstore.evaluate.baselines import Baseline, fixed_length
from kvstore.evaluate.errors import CannotEvaluate

#: Steps of CacheGen as published, in units of each layer's rms difference: the paper's own and two finer ones.
PAPER_FACTORS = (1.0, 0.5, 0.25)


@dataclass(frozen=True)
class Restored:
    """`kv`: shaped and typed as what was stored."""

    kv: torch.Tensor
    bits_per_element: float


@dataclass(frozen=True)
class RowName:
    """`chunk_tokens`: tokens that share an object or its side information (None: tokens are independent)."""

    codec: str
    chunk_tokens: int | None
    profile: str | None = None
    step: float = 1.0

    def __str__(self) -> str:
        parts = [self.codec]
        parts += [f"×{self.step:g}"] if self.step != 1 else []
        parts += [f"{self.chunk_tokens} tokens"] if self.chunk_tokens else []
        parts += [self.profile] if self.profile else []
        return ", ".join(parts)


class Row(Protocol):
    @property
    def name(self) -> RowName: ...

    def restore(self, exact: Sequence[torch.Tensor], index: int) -> Restored:
        """Stores and restores `exact[index]`; the other documents may have been learned from. Shapes:
        `[layers, 2, tokens, kv_heads, head_dim]`."""


@dataclass(frozen=True)
class ProfileChoice:
    """A calibrated profile under the name it is shown by; `profile` None: the codec without calibration."""

    name: str | None = None
    profile: Any = None


@dataclass(frozen=True)
class CodecRow:
    """`layout.chunk_tokens` is the row's. `step` scales the quantiser's base step; 1 is the quality's own."""

    layout: codec.KVLayout
    quality: codec.Quality
    choice: ProfileChoice = ProfileChoice()
    step: float = 1.0
    threads: int = 1

    @property
    def name(self) -> RowName:
        return RowName(self.quality.label, self.layout.chunk_tokens, self.choice.name, self.step)

    def restore(self, exact: Sequence[torch.Tensor], index: int) -> Restored:
        return self.restored(exact[index], self.encode(exact[index]))

    def encode(self, kv: torch.Tensor, first_position: int = 0) -> list[bytes]:
        """Objects of the whole chunks of `kv`, whose first token is at `first_position`."""
        size = self.layout.chunk_tokens
        try:
            return [
                codec.encode(
                    kv[:, :, at : at + size], self.layout, quality=self.quality, first_position=first_position + at,
                    threads=self.threads, **self._encoding(),
                )
                for at in range(0, kv.shape[2], size)
            ]  # fmt: skip
        except codec.CodecError as error:
            raise CannotEvaluate(f"{self.name}: {error}") from None

    def decode(self, blobs: Sequence[bytes | memoryview], like: torch.Tensor) -> torch.Tensor:
        kv = torch.empty_like(like)
        size = self.layout.chunk_tokens
        for index, blob in enumerate(blobs):
            out = kv[:, :, index * size : (index + 1) * size]
            codec.decode(blob, self.layout, out=out, threads=self.threads, **self._profile())
        return kv

    def restored(self, kv: torch.Tensor, blobs: Sequence[bytes | memoryview]) -> Restored:
        return Restored(self.decode(blobs, kv), 8 * sum(map(len, blobs)) / kv.numel())

    def _profile(self) -> dict[str, Any]:
        return {} if self.choice.profile is None else {"profile": self.choice.profile}

    def _encoding(self) -> dict[str, Any]:
        return self._profile() | ({} if self.step == 1 else {"step": self.step})


@dataclass(frozen=True)
class BaselineRow:
    baseline: Baseline

    @property
    def name(self) -> RowName:
        return RowName(self.baseline.name, self.baseline.chunk_tokens)

    def restore(self, exact: Sequence[torch.Tensor], index: int) -> Restored:
        coded = self.baseline.code(exact[index].float())
        return Restored(coded.kv.to(exact[index].dtype), coded.bits_per_element)


@dataclass(frozen=True)
class LearnedRow:
    """CacheGen as published: what it learns offline comes from all the other documents."""

    factor: float

    @property
    def name(self) -> RowName:
        return RowName(f"CacheGen paper {self.factor:g}", cachegen.ANCHOR_TOKENS)

    def restore(self, exact: Sequence[torch.Tensor], index: int) -> Restored:
        others = [kv for other, kv in enumerate(exact) if other != index]
        return BaselineRow(cachegen.CacheGenPaper(cachegen.learn(others, self.factor), self.factor)).restore(
            exact, index
        )


def codec_rows(
    layout: codec.KVLayout, *, qualities: Sequence[str], chunk_tokens: Sequence[int], profiles: Sequence[ProfileChoice],
    steps: Sequence[float], threads: int,
) -> list[CodecRow]:  # fmt: skip
    """Every combination that is one: an exact quality has neither profile nor step. Raises CannotEvaluate."""
    try:
        parsed = [codec.Quality.parse(quality) for quality in dict.fromkeys(qualities)]
        layouts = [dataclasses.replace(layout, chunk_tokens=size) for size in dict.fromkeys(chunk_tokens)]
    except codec.LayoutError as error:
        raise CannotEvaluate(str(error)) from None
    rows = []
    for sized in layouts:
        for quality in parsed:
            if quality.exact:
                rows.append(CodecRow(sized, quality, threads=threads))
                continue
            rows += [
                CodecRow(sized, quality, choice, step, threads) for choice in profiles for step in dict.fromkeys(steps)
            ]
    return rows


def baseline_rows(documents: int) -> list[Row]:
    """CacheGen as published learns from other documents, so it needs two of them."""
    rows: list[Row] = [BaselineRow(baseline) for baseline in [*fixed_length(), cachegen.CacheGenShipped()]]
    return rows + [LearnedRow(factor) for factor in PAPER_FACTORS if documents > 1]
