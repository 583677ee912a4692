"""The steps of a calibration, in order; each result is in the work folder as soon as it is there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from kvstore import __version__
from kvstore.calibrate import texts, transform, weights
from kvstore.calibrate.capture import WindowKV, captured
from kvstore.calibrate.model import LoadedModel, load
from kvstore.calibrate.options import (
    LOSS_TOKENS,
    PROBE_TOKENS,
    PROBE_WINDOWS,
    TAIL_TOKENS,
    WINDOW_TOKENS,
    CalibrationFailed,
    Options,
)  # fmt: skip
from kvstore.calibrate.probe import probe
from kvstore.calibrate.work import Arrays, WorkFolder, work_folder
from kvstore_codec import Profile, ProfileKind, learn_statistics
from kvstore_codec.api import SINK_POSITIONS
from kvstore_codec.segments import SegmentGroup

#: called with a stage's name, steps done, and steps in all
Progress = Callable[[str, int, int], None]
T = TypeVar("T")

QUALITIES = ("low", "medium", "high")
#: the base step is that of "low"; "medium" divides it by this
LOW_TO_MEDIUM = 3.0
#: KL grows as step² within some percent (over the whole range of use), so that few measurements reach the target
#: within its statistical error
KL_SLOPE = 2.0
ROUNDS_MAX = 6
CLOSE_ENOUGH = 0.05


@dataclass(frozen=True, eq=False)
class Calibrated:
    """`kl` in nats a token and `bits_per_element`, by quality, on held-out text; `seconds` by stage, of this run."""

    profile: Profile
    kl: dict[str, float]
    bits_per_element: dict[str, float]
    seconds: dict[str, float]


def run(options: Options, progress: Progress) -> Calibrated:
    """Calibrates, saves the profile to `options.out` and removes the work folder.

    The profile's bytes follow from model, texts and options alone (on one machine, with the same versions of torch and
    numpy), however often the run was interrupted. Raises CalibrationFailed, OSError (the profile cannot be written)."""
    torch.set_num_threads(options.threads)
    documents = texts.read_texts(options.texts)
    progress("loading the model", 0, 1)
    loaded = load(options)
    progress("loading the model", 1, 1)
    _check_tokens(options, loaded)
    calibration = max(options.capture_windows, options.weight_windows)
    windows = texts.windows(
        loaded.tokenizer, documents, count=calibration + PROBE_WINDOWS, length=WINDOW_TOKENS + LOSS_TOKENS,
        seed=options.seed,
    )  # fmt: skip
    source = {
        "model": loaded.layout.model, "revision": loaded.layout.revision, "dtype": loaded.layout.dtype,
        "texts": texts.digest_of(documents), **options.described(),
    }  # fmt: skip
    versions = {"kvstore": __version__, "torch": torch.__version__, "numpy": np.__version__, "threads": options.threads}
    with work_folder(options.work_folder, source | versions) as work:
        found = _Calibration(options, loaded, work, windows, calibration, progress).found(source)
        found.profile.save(options.out)
    return found


def _check_tokens(options: Options, loaded: LoadedModel) -> None:
    """The covariance of fewer tokens than channels calls components empty that other text needs."""
    if options.kind is not ProfileKind.TRANSFORM:
        return
    groups = transform.layer_groups(loaded.layout, options.layers_per_group, split_kv=options.split_kv)
    channels = max(transform.channels_of(group, loaded.layout) for group in groups)
    if options.capture_windows * (WINDOW_TOKENS - SINK_POSITIONS) < channels:
        raise CalibrationFailed(
            f"{options.tokens} tokens are too few for groups of {channels} channels: "
            "give --tokens several times as many, or lower --layers-per-group"
        )


@dataclass(eq=False)
class _Calibration:
    """`windows`: those to learn from, `calibration` of them, then the held-out ones."""

    options: Options
    loaded: LoadedModel
    work: WorkFolder
    windows: list[list[int]]
    calibration: int
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    def found(self, source: dict[str, Any]) -> Calibrated:
        captures = [
            captured(self.loaded, self.work, index, window)
            for index, window in self._steps("capturing KV", list(enumerate(self.windows)))
        ]
        at_step, start = self._profiles(captures)
        best = at_step(self._step(captures, at_step, start))
        final = self._probed("measuring the profile", captures, best, QUALITIES)
        measured = {
            name: {quality: float(f"{value:.4g}") for quality, value in zip(QUALITIES, values, strict=True)}
            for name, values in (("kl", final["kl"]), ("bits_per_element", final["bits"]))
        }
        probed = {
            "windows": PROBE_WINDOWS, "prefix_tokens": WINDOW_TOKENS, "exact_tail_tokens": TAIL_TOKENS,
            "scored_tokens": PROBE_TOKENS,
        }  # fmt: skip
        profile = replace(best, metadata=source | measured | {"probe": probed})
        return Calibrated(profile, measured["kl"], measured["bits_per_element"], self.seconds)

    def _step(self, captures: Sequence[WindowKV], at_step: Callable[[float], Profile], step: float) -> float:
        """The measured step whose KL at "medium" is nearest to the target: a few secant steps in log KL over log step,
        the first with the slope of theory."""
        measured: list[tuple[float, float]] = []  # (step, log of KL over target)
        slope = KL_SLOPE
        for number in range(1, ROUNDS_MAX + 1):
            kl = self._probed(f"finding the step, round {number}", captures, at_step(step), ("medium",))["kl"][0]
            if not (math.isfinite(kl) and kl > 0):
                raise CalibrationFailed(f"coding this model's KV costs {kl:g} nats a token: it cannot be calibrated")
            excess = math.log(kl / self.options.target_kl)
            if measured:
                last_step, last_excess = measured[-1]
                slope = (excess - last_excess) / math.log(step / last_step)
                slope = min(max(slope, KL_SLOPE / 2), KL_SLOPE * 2)
            measured.append((step, excess))
            if abs(excess) <= CLOSE_ENOUGH:
                break
            step *= math.exp(-excess / slope)
        return min(measured, key=lambda point: abs(point[1]))[0]

    def _profiles(self, captures: Sequence[WindowKV]) -> tuple[Callable[[float], Profile], float]:
        """The profile as a function of the base step, and a step to start from."""
        layout, kind = self.loaded.layout, self.options.kind
        learned_from = captures[: self.options.capture_windows]
        if kind is ProfileKind.STATISTICS:
            chunks = [(window.kv(), 0) for window in learned_from]
            return lambda step: learn_statistics(chunks, layout, step=step), 1.0
        scales = weights.channel_scales(self._weights(captures), layout)
        wanted = transform.layer_groups(layout, self.options.layers_per_group, split_kv=self.options.split_kv)
        with_basis = kind is ProfileKind.TRANSFORM

        def measured(index: int, group: SegmentGroup) -> Arrays:
            return self.work.arrays(
                f"group-{index:04d}",
                lambda: transform.measure_group(group, learned_from, scales, with_basis=with_basis),
            )

        steps = self._steps("computing transforms", list(enumerate(wanted)))
        groups = [(group, measured(index, group)) for index, group in steps]
        start = LOW_TO_MEDIUM * transform.predicted_step(groups, self.options.target_kl)
        return lambda step: transform.fold(layout, kind, groups, step), start

    def _weights(self, captures: Sequence[WindowKV]) -> list[Arrays]:
        name = self.options.weights
        measure = {"gradients": weights.by_gradients, "noise": weights.by_noise}[name]

        def measured(index: int) -> Arrays:
            seed = int(np.random.SeedSequence([self.options.seed, index]).generate_state(1)[0])
            return self.work.arrays(
                f"{name}-{index:04d}", lambda: measure(self.loaded, captures[index], self.windows[index], seed)
            )

        return [measured(index) for index in self._steps(f"weighing by {name}", range(self.options.weight_windows))]

    def _probed(
        self, stage: str, captures: Sequence[WindowKV], profile: Profile, qualities: Sequence[str]
    ) -> dict[str, Any]:
        """ "kl" and "bits" by quality, means over the held-out windows."""
        name = f"probe-{profile.profile_id.hex()[:16]}-{'-'.join(qualities)}"

        def measured(index: int) -> Arrays:
            return self.work.arrays(
                f"{name}-{index:04d}",
                lambda: probe(self.loaded, captures[index], self.windows[index], profile, qualities),
            )

        held_out = range(self.calibration, len(self.windows))
        windows = [measured(index) for index in self._steps(stage, held_out)]
        return {key: np.mean([window[key] for window in windows], axis=0) for key in ("kl", "bits")}

    def _steps(self, stage: str, items: Sequence[T]) -> Iterator[T]:
        """`items`, with progress before and after each; the stage's seconds are added up."""
        for done, item in enumerate(items):
            self.progress(stage, done, len(items))
            began = time.monotonic()
            yield item
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - began
        self.progress(stage, len(items), len(items))
