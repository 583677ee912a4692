"""The figures of `kvstore bench codec` as tables."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich.table import Table

from kvstore.cli import render
from kvstore.cli.bench_codec import Report
from kvstore.cli.bench_rounds import KVSTORE, ZSTD, Result, Timing
from kvstore.cli.bench_transform import Transform

NOTE = (
    "·: zstd-1, lz4 and constriction code the symbols of the quality above them, one byte a symbol (lossless: the "
    "exponents), on one thread. M el/s counts elements of the KV in every row, bits/el the bytes coded by that row. "
    f"×{ZSTD}: on the same symbols; by CPU: the same from CPU time."
)


def report_tables(report: Report, name: str) -> Iterable[Table]:
    """One table for encoding, with sizes, one for decoding, one for a profile's transform."""
    options = report.options
    layers, _, tokens, kv_heads, head_dim = report.shape
    title = (
        f"{name}: {tokens} tokens, {layers} layers, {kv_heads}×{head_dim}, {render.size(report.raw_bytes)}\n"
        f"{options.chunk_tokens} tokens a chunk, {report.isa}, median of {options.rounds} rounds\n"
        + (f"keys coded before RoPE (theta {options.rope_theta:g})" if options.rope_theta else "keys coded as they are")
        + (f", profile {options.profile}" if options.profile else "")
        + f"\n{report.cpu}, load {report.load_average:.1f} before"
    )
    rates = ("M el/s", "×memcpy", f"×{ZSTD}", "by CPU", "×1 thread")
    encode = Table("encode", "bits/el", "error", *rates, title=title, title_justify="left")
    decode = Table("decode", *rates, caption=NOTE, caption_justify="left")
    for result in report.results:
        label = result.name if result.coder == KVSTORE or not result.of else f"· {result.coder}"
        encode.add_row(label, f"{result.bits_per_element:.3f}", _error(result), *_cells(result.encode))
        decode.add_row(label, *_cells(result.decode))
    tables = [encode, decode]
    if report.transform is not None:
        tables.append(_transform_table(report.transform))
    for table in tables:
        for column in table.columns[1:]:
            column.justify = "right"
    return tables


def _transform_table(transform: Transform) -> Table:
    table = Table(
        "transform", "GFLOP/s", "sgemm's", "×sgemm",
        caption="inside encode and decode, one thread, CPU time; sgemm: NumPy's, same shapes", caption_justify="left",
    )  # fmt: skip
    for name, product in (("encode", transform.encode), ("decode", transform.decode)):
        speeds = (product.flops_per_second / 1e9, product.sgemm_flops_per_second / 1e9, product.to_sgemm)
        table.add_row(name, *map(three_digits, speeds))
    return table


def _error(result: Result) -> str:
    return f"{result.error:.4f}" if result.error else "0"


def _cells(timing: Timing) -> tuple[str, ...]:
    figures = (
        timing.elements_per_second / 1e6, timing.to_memcpy, timing.to_zstd, timing.to_zstd_by_cpu, timing.to_one_thread,
    )  # fmt: skip
    return tuple("–" if figure is None else three_digits(figure) for figure in figures)


def three_digits(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    decimals = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{decimals}f}"
