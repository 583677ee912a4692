"""Who competes in `kvstore bench codec`: the codec by its public calls, memcpy, and others on the same symbols."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import kvstore_codec as codec
from kvstore.cli.bench_rounds import BF16, CONSTRICTION, KVSTORE, LZ4, MEMCPY, POISON, ZSTD, Bits, Contestant
from kvstore.cli.bench_symbols import DIGIT_MODELS, SymbolBytes, Symbols, symbols_by_quality
from kvstore.cli.outcome import CommandFailed, ExitCode
from kvstore_codec import tables
from kvstore_codec.segments import SegmentCoder

#: constriction's Python interface is slow to decode: it codes the first chunks that hold so many elements
SAMPLE_ELEMENTS = 3_000_000


@dataclass(frozen=True)
class Material:
    """What all contestants code: chunks of one sequence, each at its position, and how the codec is to see them."""

    chunks: Sequence[Bits]
    starts: Sequence[int]
    layout: codec.KVLayout

    @classmethod
    def cut(cls, kv: Bits, chunk_tokens: int, rope_theta: float | None) -> Material:
        """`kv`: [layers, 2, tokens, kv_heads, head_dim]. Raises LayoutError."""
        layers, _, tokens, kv_heads, head_dim = kv.shape
        starts = range(0, tokens, chunk_tokens)
        layout = codec.KVLayout.uniform(
            model="bench", revision="bench", num_layers=layers, kv_heads=kv_heads, head_dim=head_dim, dtype="bfloat16",
            chunk_tokens=chunk_tokens, rope=codec.RoPE(rope_theta) if rope_theta else None,
        )  # fmt: skip
        chunks = [np.ascontiguousarray(kv[:, :, start : start + chunk_tokens]) for start in starts]
        return cls(chunks, starts, layout)

    @property
    def elements(self) -> list[int]:
        return [chunk.size for chunk in self.chunks]

    @property
    def sample(self) -> int:
        """Chunks that together have about SAMPLE_ELEMENTS, one at least."""
        return max(1, int(np.searchsorted(np.cumsum(self.elements), SAMPLE_ELEMENTS, side="right")))


def memcpy(material: Material) -> Contestant:
    chunks = material.chunks
    copies, outs = like(chunks), like(chunks)

    def copy(target: Bits, source: Bits) -> Bits:
        np.copyto(target, source)
        return target

    return Contestant(
        MEMCPY, "", True, chunks, material.elements,
        lambda i: copy(copies[i], chunks[i]), lambda encoded, i: copy(outs[i], encoded),
    )  # fmt: skip


def codecs(
    material: Material, qualities: Sequence[codec.Quality], threads: Sequence[int], coder: SegmentCoder,
    profile: codec.Profile | None = None,
) -> list[Contestant]:  # fmt: skip
    """The codec at each of `qualities`, decoding into arrays that exist already."""
    outs = like(material.chunks)
    sources, targets = [[chunk.view(BF16) for chunk in some] for some in (material.chunks, outs)]

    def contestant(quality: codec.Quality, threads: int) -> Contestant:
        def encode(index: int) -> bytes:
            return codec.encode(
                sources[index], material.layout, quality=quality, first_position=material.starts[index],
                profile=profile, threads=threads, coder=coder,
            )  # fmt: skip

        def decode(encoded: bytes, index: int) -> Bits:
            codec.decode(encoded, material.layout, out=targets[index], profile=profile, threads=threads, coder=coder)
            return outs[index]

        of = symbols_name(quality, profile)
        return Contestant(
            KVSTORE, of, quality.exact, material.chunks, material.elements, encode, decode, threads=threads
        )

    return [
        contestant(quality, count)
        for quality in qualities
        for count in (threads if quality is not codec.Quality.RAW else threads[:1])  # raw is one copy, by one thread
    ]


def symbols_name(quality: codec.Quality, profile: codec.Profile | None) -> str:
    return quality.label if profile is None or quality.exact else f"{quality.label}, profile"


def symbol_coders(
    material: Material, qualities: Sequence[codec.Quality], profile: codec.Profile | None = None
) -> list[Contestant]:
    """zstd, lz4 and constriction, each on one thread, one call a chunk, on the symbols of each quality.

    Raises CommandFailed where zstandard is not installed; the other two are left out if they are not.
    """
    zstd, lz4, constriction = map(_package, ("zstandard", "lz4.block", "constriction"))
    if zstd is None:
        raise CommandFailed("zstd is what is compared with: pip install 'llm-kvstore[bench]'", ExitCode.USAGE)
    by_chunk = [
        symbols_by_quality(chunk.view(BF16), material.layout, qualities, start, profile)
        for chunk, start in zip(material.chunks, material.starts, strict=True)
    ]
    found: list[Contestant] = []
    for quality in by_chunk[0]:
        symbols = [some[quality] for some in by_chunk]
        data = [one.data for one in symbols]
        if not all(len(one) for one in data):
            continue  # constant channels are not coded
        of, elements = symbols_name(quality, profile), material.elements
        found.append(_zstd(zstd, of, data, elements))
        if lz4 is not None:
            found.append(_lz4(lz4, of, data, elements))
        if constriction is not None:
            sample = material.sample
            found.append(_constriction(constriction, of, symbols[:sample], elements[:sample], quality.exact))
    return found


def _zstd(zstd: Any, of: str, data: Sequence[SymbolBytes], elements: Sequence[int]) -> Contestant:
    compressor, decompressor = zstd.ZstdCompressor(level=1), zstd.ZstdDecompressor()
    outs = [np.full_like(one, POISON) for one in data]

    def decode(encoded: bytes, index: int) -> SymbolBytes:
        with decompressor.stream_reader(encoded) as reader:  # into memory that exists, as the codec does: it is faster
            reader.readinto(outs[index])
        return outs[index]

    return Contestant(ZSTD, of, True, data, elements, lambda i: compressor.compress(data[i]), decode)


def _lz4(lz4: Any, of: str, data: Sequence[SymbolBytes], elements: Sequence[int]) -> Contestant:
    return Contestant(
        LZ4, of, True, data, elements,
        lambda i: lz4.compress(data[i]), lambda encoded, i: lz4.decompress(encoded),
        as_given=lambda decoded: np.frombuffer(decoded, np.uint8),
    )  # fmt: skip


def _constriction(
    constriction: Any, of: str, symbols: Sequence[Symbols], elements: Sequence[int], exponents: bool
) -> Contestant:
    """ANS with the codec's own tables (of exponents: with each plane's histogram), one call for all symbols of a table,
    on the int32 arrays that it asks for."""
    queues = [_by_model(constriction, one, exponents) for one in symbols]
    given = [np.concatenate([some for _, some in queue]) for queue in queues]

    def encode(index: int) -> npt.NDArray[np.uint32]:
        stack = constriction.stream.stack.AnsCoder()
        for model, some in reversed(queues[index]):
            stack.encode_reverse(some, model)
        words: npt.NDArray[np.uint32] = stack.get_compressed()
        return words

    def decode(encoded: npt.NDArray[np.uint32], index: int) -> list[npt.NDArray[np.int32]]:
        stack = constriction.stream.stack.AnsCoder(encoded)
        return [stack.decode(model, len(some)) for model, some in queues[index]]

    return Contestant(CONSTRICTION, of, True, given, elements, encode, decode, as_given=np.concatenate)


def _by_model(constriction: Any, symbols: Symbols, exponents: bool) -> list[tuple[Any, npt.NDArray[np.int32]]]:
    queue = []
    for number in np.unique(symbols.models):
        some = symbols.data[symbols.models == number].astype(np.int32)
        if exponents:
            weights = np.bincount(some, minlength=2)
        elif number < DIGIT_MODELS:
            weights = tables.VALUES.freq[number]
        else:
            weights = tables.DIGITS.freq[number - DIGIT_MODELS]
        model = constriction.stream.model.Categorical(weights.astype(np.float32), perfect=False)
        queue.append((model, some))
    return queue


def like(chunks: Sequence[Bits]) -> list[Bits]:
    """New memory of the same shapes, touched."""
    outs = [np.empty_like(chunk) for chunk in chunks]
    for out in outs:
        out.view(np.uint8).fill(POISON)
    return outs


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None
