"""What a calibration is asked to do, and the error that ends one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore_codec import ProfileKind

#: tokens of a window's prefix, whose KV is captured and differentiated
WINDOW_TOKENS = 1024
#: tokens after the prefix whose loss is differentiated, or changed by noise
LOSS_TOKENS = 192
#: tokens at the prefix's end that an engine recomputes rather than loads
TAIL_TOKENS = 64
#: held-out windows on which the loss of a profile is measured, and tokens scored in each
PROBE_WINDOWS = 8
PROBE_TOKENS = 128
LOSSY_DTYPES = ("bfloat16", "float16", "float32")
KINDS = {"transform": ProfileKind.TRANSFORM, "diagonal": ProfileKind.DIAGONAL, "statistics": ProfileKind.STATISTICS}


class CalibrationFailed(Exception):
    """The calibration cannot be done; `str()` is one line that names the fix."""


@dataclass(frozen=True)
class Options:
    """`tokens`: of captured KV, rounded up to whole windows. `passes`: windows with a backward pass (with
    `gradients` off, an eighth as many windows with noise). `target_kl`: nats a token at quality "medium"."""

    model: Path
    texts: tuple[Path, ...]
    out: Path
    layers_per_group: int = 1
    split_kv: bool = False
    gradients: bool = True
    kind: ProfileKind = ProfileKind.TRANSFORM
    target_kl: float = 1e-3
    tokens: int = 28_000
    passes: int = 24
    seed: int = 0
    threads: int = 1
    work: Path | None = None
    dtype: str = "auto"
    model_id: str | None = None
    revision: str | None = None

    @property
    def work_folder(self) -> Path:
        return self.work or self.out.with_name(f"{self.out.name}.work")

    @property
    def capture_windows(self) -> int:
        return -(-self.tokens // WINDOW_TOKENS)

    @property
    def weights(self) -> str:
        """Where the channels' weights come from."""
        if self.kind is ProfileKind.STATISTICS:
            return "rms"
        return "gradients" if self.gradients else "noise"

    @property
    def weight_windows(self) -> int:
        """Windows that measure how the loss depends on the KV: noise costs a forward pass for every plane."""
        return {"rms": 0, "gradients": self.passes, "noise": -(-self.passes // 8)}[self.weights]

    def described(self) -> dict[str, Any]:
        """What decides the profile besides model and texts, as JSON."""
        return {
            "kind": self.kind.name.lower(), "weights": self.weights, "tokens": self.capture_windows * WINDOW_TOKENS,
            "passes": self.weight_windows, "seed": self.seed, "target_kl": self.target_kl,
            "layers_per_group": None if self.kind is ProfileKind.STATISTICS else self.layers_per_group,
            "split_kv": self.split_kv,
        }  # fmt: skip
