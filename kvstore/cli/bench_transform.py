"""How fast the codec's linear transform is, inside encoding and decoding, against the machine's own sgemm.

The transform cannot be timed from outside, but what remains without it can: the same segments are coded once with the
profile, once with the components themselves as channels and a profile of the same scales without a basis. Both
code the same symbols (the components pass through bfloat16 in the second, which changes last digits); the difference is
the two products, the weights and means, and turning rows into floats and back: more than sgemm has to do.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

import kvstore_codec as codec
from kvstore.cli.bench_rivals import Material, like
from kvstore.cli.bench_rounds import BF16, Bits, Spent
from kvstore.cli.outcome import CommandFailed, ExitCode
from kvstore_codec.profile import ProfileGroup
from kvstore_codec.reference.numerics import from_float32, rotate, to_float32
from kvstore_codec.rope import rotation_for
from kvstore_codec.segments import NO_DRAINS, CodedPlane, LossySegment, SegmentCoder

DTYPE = BF16.name
LEVELS = codec.Quality.HIGH.lossy_layers


@dataclass(frozen=True)
class Product:
    """2 · tokens · channels · components, a second, from CPU seconds of one thread. `to_sgemm`: median of the rounds'
    ratios."""

    flops_per_second: float
    sgemm_flops_per_second: float
    to_sgemm: float


@dataclass(frozen=True)
class Transform:
    """`bytes_with`, `bytes_without`: what the two kinds of segment take, which shows that they code the same."""

    tokens: int
    shapes: tuple[tuple[int, int], ...]
    bytes_with: int
    bytes_without: int
    encode: Product
    decode: Product


@dataclass(frozen=True)
class _Kind:
    """All segments of the sample, with the basis or without."""

    coder: SegmentCoder
    segments: list[LossySegment]

    def encode(self) -> list[list[bytes]]:
        return self.coder.encode_lossy(self.segments, 0, DTYPE, LEVELS, 1)

    def decode(self, payloads: Sequence[Sequence[memoryview]]) -> None:
        self.coder.decode_lossy(self.segments, payloads, 0, DTYPE, 1)


def measure(material: Material, profile: codec.Profile, coder: SegmentCoder, rounds: int) -> Transform | None:
    """None where `profile` has no basis. `profile` must fit the material. Raises CommandFailed where threadpoolctl,
    which holds sgemm to one thread, is not installed."""
    if any(group.basis is None for group in profile.groups):
        return None
    with_basis, without, products = _Kind(coder, []), _Kind(coder, []), []
    for chunk, start in zip(material.chunks[: material.sample], material.starts, strict=False):
        planes = _unrotated(chunk, material.layout, start)
        for group in profile.groups:
            assert group.basis is not None
            chosen = [planes[index] for index in group.planes.plane_indices]
            flat = np.concatenate([to_float32(plane, DTYPE).reshape(len(plane), -1) for plane in chosen], axis=1)
            weighted = ((flat - group.mean) * group.weight).astype(np.float32)
            weights = group.basis.astype(np.float32)
            components = weighted @ weights.T
            products.append((weighted, weights, components))
            with_basis.segments.append(_segment(chosen, group))
            without.segments.append(_segment(_as_channels(components, chosen), _without_basis(group)))
    payloads = [kind.encode() for kind in (with_basis, without)]
    views = [[[memoryview(layer) for layer in segment] for segment in some] for some in payloads]
    tasks: dict[str, tuple[Callable[[], Any], ...]] = {
        "encode": (with_basis.encode, without.encode, partial(_forward, products)),
        "decode": (
            partial(with_basis.decode, views[0]), partial(without.decode, views[1]), partial(_inverse, products),
        ),
    }  # fmt: skip
    flops = sum(2 * x.shape[0] * x.shape[1] * y.shape[1] for x, _, y in products)
    with _one_thread():
        encode, decode = (_product(tasks[name], flops, rounds) for name in ("encode", "decode"))
    bytes_with, bytes_without = (sum(len(layer) for segment in some for layer in segment) for some in payloads)
    return Transform(
        tokens=sum(chunk.shape[2] for chunk in material.chunks[: material.sample]),
        shapes=tuple((group.channels, group.components) for group in profile.groups),
        bytes_with=bytes_with, bytes_without=bytes_without, encode=encode, decode=decode,
    )  # fmt: skip


def _product(tasks: tuple[Callable[[], Any], ...], flops: int, rounds: int) -> Product:
    taken: list[list[float]] = []
    for number in range(-1, rounds):
        seconds = [0.0] * len(tasks)
        for place in range(len(tasks)):
            index = (place + number) % len(tasks)
            seconds[index] = Spent.on(tasks[index])[1].cpu
        if number >= 0:  # the first warms up
            taken.append(seconds)
    ours = [max(full - rest, 1e-9) for full, rest, _ in taken]
    sgemm = [one[2] for one in taken]
    ratios = [theirs / mine for theirs, mine in zip(sgemm, ours, strict=True)]
    return Product(flops / statistics.median(ours), flops / statistics.median(sgemm), statistics.median(ratios))


def _forward(products: Sequence[tuple[npt.NDArray[Any], ...]]) -> None:
    for weighted, weights, components in products:
        np.matmul(weighted, weights.T, out=components)


def _inverse(products: Sequence[tuple[npt.NDArray[Any], ...]]) -> None:
    for weighted, weights, components in products:
        np.matmul(components, weights, out=weighted)


def _unrotated(chunk: Bits, layout: codec.KVLayout, start: int) -> list[Bits]:
    """Planes of a chunk with their keys as before RoPE, so that rotating is in neither kind."""
    planes = []
    for number, layer in enumerate(layout.layers):
        k, v = chunk[number]
        rotation = rotation_for(layer, start, len(k))
        planes += [from_float32(rotate(to_float32(k, DTYPE), rotation, inverse=True), DTYPE), np.array(v)]
    return planes


def _as_channels(components: npt.NDArray[np.float32], planes: Sequence[Bits]) -> list[Bits]:
    """Components in the place of the channels, zeros behind them."""
    targets = like(planes)
    channels = sum(plane[0].size for plane in planes)
    wide = np.zeros((len(components), channels), np.float32)
    wide[:, : components.shape[1]] = components
    first = 0
    for target in targets:
        size = target[0].size
        target[...] = from_float32(np.ascontiguousarray(wide[:, first : first + size]), DTYPE).reshape(target.shape)
        first += size
    return targets


def _without_basis(group: ProfileGroup) -> ProfileGroup:
    scale_ids = np.zeros(group.channels, np.uint8)  # id 0 is not coded
    scale_ids[: group.components] = group.scale_ids
    return ProfileGroup(
        group.kv, group.layer_first, group.layer_count, np.zeros(group.channels, np.float32),
        np.ones(group.channels, np.float32), None, scale_ids,
    )  # fmt: skip


def _segment(planes: Sequence[Bits], group: ProfileGroup) -> LossySegment:
    return LossySegment([CodedPlane(plane, None, 1.0) for plane in planes], NO_DRAINS, group)


def _one_thread() -> Any:
    try:
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError:
        raise CommandFailed(
            "sgemm is held to one thread by threadpoolctl: pip install 'llm-kvstore[bench]'", ExitCode.USAGE
        ) from None
    return threadpool_limits(1)
