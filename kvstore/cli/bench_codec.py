"""`kvstore bench codec`: the codec's speed and size on real KV, against memcpy and other coders of the same symbols."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import kvstore_codec as codec
from kvstore.cli import bench_rivals, bench_rounds, bench_transform, render
from kvstore.cli.bench_rivals import Material
from kvstore.cli.bench_rounds import Bits, Contestant, Result
from kvstore.cli.bench_transform import Transform
from kvstore.cli.outcome import CommandFailed, ExitCode
from kvstore_codec.native import NativeCoder
from kvstore_codec.profile import model_id_of

QUALITIES = tuple(quality.label for quality in codec.Quality)
THREADS = (1, 2)


@dataclass(frozen=True)
class Options:
    """`threads`: the codec runs with each of these numbers, in the same rounds. `rope_theta` None: keys are coded as
    they are cached. `isa` None: the best that the CPU has. `profile`: a file; its qualities run beside the others."""

    chunk_tokens: int = 256
    qualities: Sequence[str] = QUALITIES
    threads: Sequence[int] = THREADS
    rounds: int = 7
    rope_theta: float | None = None
    isa: str | None = None
    profile: Path | None = None


@dataclass(frozen=True)
class Report:
    """`load_average`: of the last minute before the rounds; high, unless from a run before, means noisy figures."""

    shape: tuple[int, ...]
    elements: int
    raw_bytes: int
    options: Options
    isa: str
    cpu: str
    load_average: float
    results: tuple[Result, ...]
    transform: Transform | None


def bench_codec(kv_path: Path | None, options: Options, json: bool) -> None:
    """Raises CommandFailed: wrong input (USAGE), or a decode that differs from what was encoded (PROBLEM)."""
    from kvstore.cli.bench_tables import report_tables

    if kv_path is None:
        raise CommandFailed(
            "name a file of real KV with --kv; in the repository, `python -m bench.kv` makes one", ExitCode.USAGE
        )
    report = measure(load_kv(kv_path), options)
    if json:
        render.print_json({"kv": str(kv_path), **report_json(report)})
        return
    for table in report_tables(report, kv_path.name):
        render.print_table(table)


def load_kv(path: Path) -> Bits:
    """[layers, 2, tokens, kv_heads, head_dim] uint16. Raises CommandFailed naming what is wrong with the file."""
    try:
        with path.open("rb") as file:
            kv: Any = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise CommandFailed(f"{path}: {error.strerror}", ExitCode.USAGE) from None
    except (ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise CommandFailed(f"{path} is not a .npy file of numbers: {reason}", ExitCode.USAGE) from None
    if kv.dtype != np.uint16 or kv.ndim != 5 or kv.shape[1] != 2 or kv.size == 0:
        raise CommandFailed(
            f"{path} holds {kv.dtype} {list(kv.shape)}: it must be uint16 [layers, 2, tokens, kv_heads, head_dim], "
            "the bits of bfloat16", ExitCode.USAGE,
        )  # fmt: skip
    return np.ascontiguousarray(kv)


def measure(kv: Bits, options: Options) -> Report:
    """Runs all rounds. Raises CommandFailed as `bench_codec` does."""
    coder = _coder(options.isa)
    try:
        material = Material.cut(kv, options.chunk_tokens, options.rope_theta)
        profile = None if options.profile is None else load_profile(options.profile, material.layout)
        rivals = contestants(material, options, coder, profile)
        load_average = os.getloadavg()[0]
        results = bench_rounds.run(rivals, options.rounds)
        transform = None
        if profile is not None:
            transform = bench_transform.measure(material, profile, coder, options.rounds)
    except codec.CodecError as error:
        raise CommandFailed(str(error), ExitCode.USAGE) from None
    return Report(
        shape=kv.shape, elements=kv.size, raw_bytes=kv.nbytes, options=options, isa=coder.isa, cpu=cpu(),
        load_average=load_average, results=results, transform=transform,
    )  # fmt: skip


def contestants(
    material: Material, options: Options, coder: NativeCoder, profile: codec.Profile | None
) -> list[Contestant]:
    """In the order of the tables: each quality is followed by the coders of its symbols. Raises CodecError."""
    qualities = list(dict.fromkeys(map(codec.Quality.parse, options.qualities)))
    threads = list(dict.fromkeys(options.threads))
    ours = bench_rivals.codecs(material, qualities, threads, coder)
    others = bench_rivals.symbol_coders(material, qualities)
    if profile is not None:
        lossy = [quality for quality in qualities if not quality.exact]
        ours += bench_rivals.codecs(material, lossy, threads, coder, profile)
        others += bench_rivals.symbol_coders(material, lossy, profile)
    ordered = [bench_rivals.memcpy(material)]
    for of in dict.fromkeys(one.of for one in ours):
        ordered += [one for one in (*ours, *others) if one.of == of]
    return ordered


def load_profile(path: Path, layout: codec.KVLayout) -> codec.Profile:
    """Made to name the bench's layout: a file of KV does not say which model it is of. Raises CommandFailed."""
    try:
        profile = replace(codec.Profile.load(path), model_id=model_id_of(layout))
        profile.require_fit(layout)
    except OSError as error:
        raise CommandFailed(f"{path}: {error.strerror}", ExitCode.USAGE) from None
    except codec.CodecError as error:
        raise CommandFailed(f"{path}: {error}", ExitCode.USAGE) from None
    return profile


def report_json(report: Report) -> dict[str, Any]:
    figures = asdict(report)
    if report.options.profile is not None:
        figures["options"]["profile"] = str(report.options.profile)
    return figures


def cpu() -> str:
    """The processor's name and how many of it, as Linux tells them."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else "unknown"


def _coder(isa: str | None) -> NativeCoder:
    try:
        return NativeCoder(isa)
    except ValueError as error:
        raise CommandFailed(str(error), ExitCode.USAGE) from None
