"""What an evaluation is told. Apart from the rest, which needs torch: a command line must not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

QUALITIES = ("lossless", "high", "medium", "low")


@dataclass(frozen=True)
class Settings:
    """`profiles`: files; the codec without one always runs. `turns` 0, and False elsewhere, leave that part out."""

    model: Path
    texts: tuple[Path, ...]
    qualities: tuple[str, ...] = QUALITIES
    profiles: tuple[Path, ...] = ()
    steps: tuple[float, ...] = (1.0,)
    chunk_tokens: tuple[int, ...] = (256,)
    baselines: bool = True
    documents: int = 8
    prefix_tokens: int = 1536
    tail: int = 64
    turns: int = 6
    tasks: bool = True
    seed: int = 0
    threads: int = 1
    dtype: str = "auto"
    model_id: str | None = None
    revision: str | None = None
