"""`kvstore bench codec`: the codec's speed and size on real KV, against memcpy, zstd and lz4 on the same bytes.

Machines are noisy, so contestants take turns: each round runs every one once, in rotating order; rates are medians
over rounds, and a ratio is the median of the ratios within each round. Every decode of every round is compared with
what was encoded: a codec that gives wrong bytes has no speed.
"""

from __future__ import annotations

import importlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from rich.table import Table

import kvstore_codec as codec
from kvstore.cli import render
from kvstore.cli.outcome import CommandFailed, ExitCode

BF16 = np.dtype(ml_dtypes.bfloat16)
QUALITIES = tuple(quality.label for quality in codec.Quality)
MEMCPY, ZSTD, LZ4 = "memcpy", "zstd-1", "lz4"
POISON = 0xA5A5
#: A lossy decode off by more than this, in units of the values' rms, has not decoded: "low" loses about 0.2.
ERROR_MAX = 0.5

Bits = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Options:
    """`rope_theta` None: keys are coded as they are cached."""

    chunk_tokens: int = 256
    qualities: Sequence[str] = QUALITIES
    threads: int = 1
    rounds: int = 7
    rope_theta: float | None = None


@dataclass(frozen=True)
class Contestant:
    """`encode(i)` makes chunk i's bytes; `decode(encoded, i)` gives its bits back. Both are what is timed."""

    name: str
    exact: bool
    encode: Callable[[int], Any]
    decode: Callable[[Any, int], Bits]


@dataclass(frozen=True)
class Timing:
    """Seconds for all of the KV, by round; ratios are of rates (2.0: twice as fast as the other)."""

    seconds: tuple[float, ...]
    elements_per_second: float
    bytes_per_second: float
    to_memcpy: float
    to_zstd: float


@dataclass(frozen=True)
class Result:
    """`error`: rms of the difference over rms of the values; 0 where exact."""

    name: str
    encoded_bytes: int
    bits_per_element: float
    ratio: float
    error: float
    encode: Timing
    decode: Timing


@dataclass(frozen=True)
class Report:
    """`load_average`: of the last minute before the rounds; high, unless from a run before, means noisy figures."""

    shape: tuple[int, ...]
    elements: int
    raw_bytes: int
    options: Options
    cpu: str
    load_average: float
    results: tuple[Result, ...]


def bench_codec(kv_path: Path | None, options: Options, json: bool) -> None:
    """Raises CommandFailed: wrong input (USAGE), or a decode that differs from what was encoded (PROBLEM)."""
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
    tokens = kv.shape[2]
    starts = range(0, tokens, options.chunk_tokens)
    chunks = [np.ascontiguousarray(kv[:, :, start : start + options.chunk_tokens]) for start in starts]
    try:
        rivals = [*yardsticks(chunks), *qualities(chunks, starts, options)]
        return run(chunks, rivals, options)
    except codec.CodecError as error:
        raise CommandFailed(str(error), ExitCode.USAGE) from None


def yardsticks(chunks: Sequence[Bits]) -> list[Contestant]:
    """One thread each, one call a chunk, on the same bytes as the codec."""
    copies, outs = _like(chunks), _like(chunks)
    views = [chunk.data.cast("B") for chunk in chunks]

    def copy(target: Bits, source: Bits) -> Bits:
        np.copyto(target, source)
        return target

    def bits(buffer: bytes, index: int) -> Bits:
        return np.frombuffer(buffer, np.uint16).reshape(chunks[index].shape)

    zstd = _package("zstandard")
    if zstd is None:
        raise CommandFailed("zstd is what is compared with: pip install 'llm-kvstore[bench]'", ExitCode.USAGE)
    compressor, decompressor = zstd.ZstdCompressor(level=1), zstd.ZstdDecompressor()
    found = [
        Contestant(MEMCPY, True, lambda i: copy(copies[i], chunks[i]), lambda encoded, i: copy(outs[i], encoded)),
        Contestant(
            ZSTD,
            True,
            lambda i: compressor.compress(views[i]),
            lambda encoded, i: bits(decompressor.decompress(encoded), i),
        ),
    ]
    lz4 = _package("lz4.block")
    if lz4 is not None:
        found.append(
            Contestant(LZ4, True, lambda i: lz4.compress(views[i]), lambda encoded, i: bits(lz4.decompress(encoded), i))
        )
    return found


def qualities(chunks: Sequence[Bits], starts: Sequence[int], options: Options) -> list[Contestant]:
    """The codec by its public calls, decoding into arrays that exist already. Raises LayoutError."""
    layers, _, _, kv_heads, head_dim = chunks[0].shape
    layout = codec.KVLayout.uniform(
        model="bench", revision="bench", num_layers=layers, kv_heads=kv_heads, head_dim=head_dim, dtype="bfloat16",
        chunk_tokens=options.chunk_tokens, rope=codec.RoPE(options.rope_theta) if options.rope_theta else None,
    )  # fmt: skip
    outs = _like(chunks)
    sources, targets = [[chunk.view(BF16) for chunk in some] for some in (chunks, outs)]

    def contestant(quality: codec.Quality) -> Contestant:
        def encode(index: int) -> bytes:
            return codec.encode(
                sources[index], layout, quality=quality, first_position=starts[index], threads=options.threads
            )

        def decode(encoded: bytes, index: int) -> Bits:
            codec.decode(encoded, layout, out=targets[index], threads=options.threads)
            return outs[index]

        return Contestant(quality.label, quality.exact, encode, decode)

    return [contestant(quality) for quality in dict.fromkeys(map(codec.Quality.parse, options.qualities))]


def run(chunks: Sequence[Bits], rivals: Sequence[Contestant], options: Options) -> Report:
    """`rivals` must hold memcpy and zstd-1. Raises CommandFailed when one does not give back what it was given."""
    load_average = os.getloadavg()[0]
    runs = {rival.name: _Run(rival) for rival in rivals}
    for rival in rivals:  # warm up
        _Run(rival).turn(chunks)
    for number in range(options.rounds):
        shift = number % len(rivals)
        for rival in [*rivals[shift:], *rivals[:shift]]:
            runs[rival.name].turn(chunks)
    elements = sum(chunk.size for chunk in chunks)
    layers, planes, _, kv_heads, head_dim = chunks[0].shape
    return Report(
        shape=(layers, planes, sum(chunk.shape[2] for chunk in chunks), kv_heads, head_dim),
        elements=elements, raw_bytes=elements * BF16.itemsize, options=options, cpu=cpu(),
        load_average=load_average,
        results=tuple(_result(done, runs[MEMCPY], runs[ZSTD], elements) for done in runs.values()),
    )  # fmt: skip


class _Run:
    """One contestant's seconds, sizes and errors so far."""

    def __init__(self, rival: Contestant) -> None:
        self.rival = rival
        self.encode_s: list[float] = []
        self.decode_s: list[float] = []
        self.encoded_bytes = 0
        self.error = 0.0

    def turn(self, chunks: Sequence[Bits]) -> None:
        indices = range(len(chunks))
        start = time.perf_counter()
        encoded = [self.rival.encode(index) for index in indices]
        self.encode_s.append(time.perf_counter() - start)
        start = time.perf_counter()
        decoded = [self.rival.decode(encoded[index], index) for index in indices]
        self.decode_s.append(time.perf_counter() - start)
        self.encoded_bytes = sum(memoryview(one).nbytes for one in encoded)
        self.error = self._checked(chunks, decoded)

    def _checked(self, chunks: Sequence[Bits], decoded: Sequence[Bits]) -> float:
        name = self.rival.name
        if self.rival.exact:
            for index, (chunk, back) in enumerate(zip(chunks, decoded, strict=True)):
                if not np.array_equal(chunk, back):
                    raise CommandFailed(f"{name}: chunk {index} decodes to other values than were encoded")
            error = 0.0
        else:
            error = _relative_error(chunks, decoded)
            if not error < ERROR_MAX:
                raise CommandFailed(f"{name}: decoded values are off by {error:.2f} of their rms")
        for back in decoded:  # so that the next round cannot pass on this round's values
            if back.flags.writeable:
                back.fill(POISON)
        return error


def _result(done: _Run, memcpy: _Run, zstd: _Run, elements: int) -> Result:
    def timing(select: Callable[[_Run], list[float]]) -> Timing:
        seconds = select(done)
        median = statistics.median(seconds)
        to_memcpy, to_zstd = (
            statistics.median(theirs / ours for theirs, ours in zip(select(other), seconds, strict=True))
            for other in (memcpy, zstd)
        )
        return Timing(tuple(seconds), elements / median, elements * BF16.itemsize / median, to_memcpy, to_zstd)

    return Result(
        name=done.rival.name,
        encoded_bytes=done.encoded_bytes,
        bits_per_element=8 * done.encoded_bytes / elements,
        ratio=elements * BF16.itemsize / done.encoded_bytes,
        error=done.error,
        encode=timing(lambda one: one.encode_s),
        decode=timing(lambda one: one.decode_s),
    )


def report_json(report: Report) -> dict[str, Any]:
    return asdict(report)


def report_tables(report: Report, name: str) -> Iterable[Table]:
    """One table for encoding, with sizes, and one for decoding."""
    options = report.options
    layers, _, tokens, kv_heads, head_dim = report.shape
    title = (
        f"{name}: {tokens} tokens, {layers} layers, {kv_heads}×{head_dim}, {render.size(report.raw_bytes)}\n"
        f"{options.chunk_tokens} tokens a chunk, codec on {options.threads} "
        f"thread{'s' if options.threads > 1 else ''}, others on 1, median of {options.rounds} rounds\n"
        + (f"keys coded before RoPE (theta {options.rope_theta:g})" if options.rope_theta else "keys coded as they are")
        + f"\n{report.cpu}, load {report.load_average:.1f} before"
    )
    rates = ("M el/s", "GB/s", "×memcpy", f"×{ZSTD}")
    encode = Table("encode", "bits/el", "ratio", "error", *rates, title=title, title_justify="left")
    decode = Table("decode", *rates)
    for table in (encode, decode):
        for column in table.columns[1:]:
            column.justify = "right"
    for result in report.results:
        sizes = f"{result.bits_per_element:.3f}", f"{result.ratio:.2f}", f"{result.error:.4f}" if result.error else "0"
        encode.add_row(result.name, *sizes, *_cells(result.encode))
        decode.add_row(result.name, *_cells(result.decode))
    return encode, decode


def _cells(timing: Timing) -> tuple[str, ...]:
    return (
        three_digits(timing.elements_per_second / 1e6),
        three_digits(timing.bytes_per_second / 1e9),
        three_digits(timing.to_memcpy),
        three_digits(timing.to_zstd),
    )


def three_digits(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    decimals = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{decimals}f}"


def _relative_error(chunks: Sequence[Bits], decoded: Sequence[Bits]) -> float:
    wrong = total = 0.0
    for chunk, back in zip(chunks, decoded, strict=True):
        given = chunk.view(BF16).astype(np.float32)
        off = back.view(BF16).astype(np.float32) - given
        wrong += float(np.vdot(off, off))
        total += float(np.vdot(given, given))
    return math.sqrt(wrong / total) if total else float(wrong > 0)


def _like(chunks: Sequence[Bits]) -> list[Bits]:
    return [np.full_like(chunk, POISON) for chunk in chunks]


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def cpu() -> str:
    """The processor's name and how many of it, as Linux tells them."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else "unknown"
