"""The pictures of docs/codec.md, drawn from real KV: channels and their law, bits by layer, norms of tokens."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

import kvstore_codec as codec
from bench.kv import KV_PATH, ROPE_THETA, real_kv
from kvstore.cli import bench_codec
from kvstore.cli.bench_rivals import Material
from kvstore.cli.bench_rounds import BF16
from kvstore.cli.bench_symbols import symbols_by_quality
from kvstore.cli.outcome import CommandFailed
from kvstore_codec import tables
from kvstore_codec.api import SINK_POSITIONS
from kvstore_codec.arrays import planes as planes_of
from kvstore_codec.arrays import read
from kvstore_codec.container import KV
from kvstore_codec.profile_statistics import drain_tokens
from kvstore_codec.reference.lossy import DRAIN_K_NORM, DRAIN_V_NORM
from kvstore_codec.reference.numerics import to_float32

PROFILE_PATH = KV_PATH.parents[1] / "profiles/smollm2-kv5.kvp"
#: so long that SmolLM2's K and V of a layer have a segment each: a segment's length is then one plane's
CHUNK_TOKENS = 512
WIDTH_INCHES, DPI = 9.0, 95
#: of the median: leaves room for the legend
NORM_SHOWN_MIN = 0.05
KEYS, VALUES, PROFILED = "tab:blue", "tab:orange", "tab:green"

Floats = npt.NDArray[np.float64]


def coefficients(material: Material, profile: codec.Profile) -> Figure:
    """How much channels and a profile's components differ; the values of one scale index beside its table."""
    figure = Figure(figsize=(WIDTH_INCHES, 3.7), layout="constrained")
    spread, law = figure.subplots(1, 2)
    chunks = [(chunk.view(BF16), start) for chunk, start in zip(material.chunks, material.starts, strict=True)]
    channels = codec.learn_statistics(
        chunks, material.layout
    )  # the step, means and scales of objects without a profile
    lowest = -tables.SCALE_ID_OFFSET
    edges = _sigma(np.arange(lowest, tables.SCALES + 1) - 0.5)
    for one, label, colour in (
        (channels, "channels, no profile", KEYS),
        (profile, "components of the profile", PROFILED),
    ):
        ids = np.concatenate([group.scale_ids for group in one.groups]).astype(int)
        absent = sum(group.channels - group.components for group in one.groups)
        indices = np.concatenate([ids - tables.SCALE_ID_OFFSET, np.full(absent, lowest)])
        coded = (indices >= tables.SCALE_CODED_MIN).mean()
        share = np.full(indices.size, 100 / indices.size)
        spread.hist(
            _sigma(indices), edges, weights=share, color=colour, alpha=0.55, label=f"{label}: {coded:.0%} coded"
        )
    spread.axvline(float(_sigma(tables.SCALE_CODED_MIN - 0.5)), color="black", linewidth=1, linestyle="--")
    spread.set_xscale("log", base=2)
    spread.set(
        xlabel="σ in units of low's step (coded at low: right of the dashes)", ylabel="% of components",
        title="how far components spread",
    )  # fmt: skip
    spread.set_ylim(0, 1.3 * spread.get_ylim()[1])
    spread.legend(fontsize="small")
    _law(material, law)
    return figure


def _sigma(index: npt.ArrayLike) -> Floats:
    """σ/step that a scale index stands for."""
    return np.asarray(2.0 ** ((np.asarray(index, float) - 16) / 4))


def _law(material: Material, axes: Axes) -> None:
    """The values coded at low by the table most used of those whose σ is above the step."""
    low = codec.Quality.LOW
    found = [
        symbols_by_quality(chunk.view(BF16), material.layout, [low], start, None)[low]
        for chunk, start in zip(material.chunks, material.starts, strict=True)
    ]
    data = np.concatenate([symbols.data for symbols in found])
    models = np.concatenate([symbols.models for symbols in found])
    index = 16 + int(np.bincount(models, minlength=tables.SCALES)[16:].argmax())
    symbols = data[models == index]
    counts = np.bincount(symbols, minlength=tables.SYMBOLS)
    law = tables.VALUES.freq[index] / tables.SLOTS
    shown = np.flatnonzero(law[: tables.ESCAPE] > 0)
    values = shown - tables.VALUE_MAX
    axes.bar(values, 100 * counts[shown] / symbols.size, color=KEYS, alpha=0.55, label=f"{symbols.size:,} values of KV")
    axes.plot(values, 100 * law[shown], color="black", marker=".", linewidth=1, label=f"table {index}")
    observed = counts[law > 0] / symbols.size
    cost = -float(observed @ np.log2(law[law > 0]))
    own = -float(observed[observed > 0] @ np.log2(observed[observed > 0]))
    axes.set(
        yscale="log", xlabel="quantised value", ylabel="% of symbols",
        title=f"σ = {_sigma(index):.3g} steps: {cost:.3f} b, own entropy {own:.3f} b",
    )  # fmt: skip
    axes.legend(fontsize="small", loc="lower center")


def bits_by_layer(material: Material, profile: codec.Profile) -> Figure:
    """Bits an element at medium: K and V of each layer without a profile, groups of layers with it."""
    figure = Figure(figsize=(WIDTH_INCHES, 3.7), layout="constrained")
    axes = figure.subplots()
    plain = _bits_by_group(material, None)
    for side, label, colour, shift in ((KV.K, "K", KEYS, -0.2), (KV.V, "V", VALUES, 0.2)):
        layers = sorted((first, bits) for (kv, first, count), bits in plain.items() if kv == side and count == 1)
        positions = [first + shift for first, _ in layers]
        axes.bar(positions, [bits for _, bits in layers], 0.4, color=colour, label=f"{label}, no profile")
    label = "K and V, with the profile"
    for (_, first, count), bits in sorted(_bits_by_group(material, profile).items()):
        axes.hlines(bits, first - 0.45, first + count - 0.55, color=PROFILED, linewidth=3, label=label)
        axes.text(first + (count - 1) / 2, bits + 0.08, f"{bits:.2f}", ha="center", fontsize="small", bbox=_halo())
        label = ""
    axes.set(xlabel="layer", ylabel="bits an element, medium", title="where the bits go")
    axes.set_xlim(-0.75, material.layout.num_layers - 0.25)
    axes.set_ylim(0, 1.2 * max(plain.values()))
    axes.legend(fontsize="small", ncols=3, loc="upper center")
    return figure


def _halo() -> dict[str, object]:
    return {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}


def _bits_by_group(material: Material, profile: codec.Profile | None) -> dict[tuple[KV, int, int], float]:
    """Of each segment's planes (kv, first layer, layer count), over all chunks."""
    bits: dict[tuple[KV, int, int], float] = {}
    tokens = sum(chunk.shape[2] for chunk in material.chunks)
    for chunk, start in zip(material.chunks, material.starts, strict=True):
        blob = codec.encode(
            chunk.view(BF16), material.layout, quality="medium", first_position=start, profile=profile
        )  # fmt: skip
        for segment in codec.inspect(blob).segments:
            layers = material.layout.layers[segment.layer_first : segment.layer_first + segment.layer_count]
            channels = sum(
                layer.k_channels * (KV.K in segment.kv) + layer.v_channels * (KV.V in segment.kv) for layer in layers
            )
            share = 8 * segment.length / (channels * tokens)
            bits[segment.planes] = bits.get(segment.planes, 0.0) + share
    return bits


def tokens(material: Material) -> Figure:
    """Norms of K and V by token in the layer with most drain tokens, with the codec's limits."""
    layout, chunk = material.layout, material.chunks[0]
    planes = planes_of(chunk.view(BF16), layout)
    pairs = list(zip(planes[0::2], planes[1::2], strict=True))
    drains = [drain_tokens(k, v, SINK_POSITIONS, layout.dtype) for k, v in pairs]
    layer = max(range(layout.num_layers), key=lambda index: len(drains[index]))
    figure = Figure(figsize=(WIDTH_INCHES, 3.7), layout="constrained")
    for axes, plane, name, limit, colour in zip(
        figure.subplots(1, 2, sharey=True), pairs[layer], "KV", (DRAIN_K_NORM, DRAIN_V_NORM), (KEYS, VALUES),
        strict=True,
    ):  # fmt: skip
        values = to_float32(read(plane), layout.dtype).reshape(plane.shape[0], -1)
        norms = np.linalg.norm(values.astype(np.float64), axis=1)
        norms /= np.median(norms[SINK_POSITIONS:])
        positions = np.arange(norms.size)
        sinks = positions < SINK_POSITIONS
        drained = np.isin(positions, drains[layer])
        for mask, label, style in (
            (~sinks & ~drained, "plain tokens", {"color": colour, "s": 7, "alpha": 0.6}),
            (drained, f"{drained.sum()} drain tokens", {"color": "black", "s": 26, "marker": "v"}),
            (sinks, f"{sinks.sum()} sinks", {"color": "tab:red", "s": 26, "marker": "s"}),
        ):
            axes.scatter(positions[mask], norms[mask], label=label, linewidths=0, **style)
        axes.axhline(limit, color="grey", linestyle="--", linewidth=1, label=f"limit: {limit:g}")
        axes.set(yscale="log", xlabel="token", title=f"{name} of layer {layer}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize="small", loc="lower center", ncols=2)
    figure.axes[0].set_ylim(bottom=NORM_SHOWN_MIN)
    figure.axes[0].set_ylabel("norm ÷ median norm")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.codec_pictures", description=__doc__)
    parser.add_argument("--kv", type=Path, default=KV_PATH, help="made if missing (default: %(default)s)")
    parser.add_argument("--profile", type=Path, default=PROFILE_PATH, help="of SmolLM2 (make profiles)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the .png files")
    parsed = parser.parse_args()
    try:
        material = Material.cut(bench_codec.load_kv(real_kv(parsed.kv)), CHUNK_TOKENS, ROPE_THETA)
        profile = bench_codec.load_profile(parsed.profile, material.layout)
    except CommandFailed as error:
        raise SystemExit(f"bench: {error}") from None
    parsed.out.mkdir(parents=True, exist_ok=True)
    for name, figure in (
        ("coefficients", coefficients(material, profile)),
        ("bits-by-layer", bits_by_layer(material, profile)),
        ("tokens", tokens(material)),
    ):
        path = parsed.out / f"{name}.png"
        figure.savefig(path, dpi=DPI)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
