"""The only writer of seeds/: `make fuzz-seeds`. Names that begin with "valid" are inputs that must be taken.

Inputs of the native decoders are what the coders write; streams are made short, so that small inputs have several.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from coders import REFERENCE
from kv_strategies import random_kv

import kvstore_codec as codec
from kvstore_codec.reference import rans
from kvstore_codec.segments import SegmentCoder
from tests.fuzz import native_cases as native
from tests.fuzz.contexts import CONTEXTS
from tests.fuzz.native_cases import Case

SEEDS = Path(__file__).parent / "seeds"
#: (heads − 1, dim) of up to four planes: one lane, a block and a bit, whole blocks, planes without components
SHAPES = (b"\x00\x01\x01\x05\x00\x00\x02\x0c", b"\x01\x18\x01\x18\x00\x08\x00\x08", b"\x01\x40\x00\x40\x00\x00\x00\x21")
TOKENS = 20


def main() -> None:
    rng = np.random.default_rng(7)
    for target, seeds in {
        "lossy_decode": lossy_payloads(rng), "lossless_decode": lossless_payloads(rng),
        "lossy_round_trip": values(rng, 3), "lossless_round_trip": values(rng, 5),
        "container": containers(), "objects": objects(), "profile": profiles(), "layout": layouts(),
        "encode": arrays(rng),
    }.items():  # fmt: skip
        folder = SEEDS / target
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for name, data in seeds:
            (folder / name).write_bytes(data)


def lossy_payloads(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    for index, (profile, shapes, level) in enumerate(itertools.product(range(3), SHAPES, range(3))):
        case = Case(
            dtype=index, levels=level, tokens=(TOKENS, 39, 5)[index % 3], sinks=index, memory=index % 5,
            profile=profile, seed=3 * index + 120 * (index % 2), rotation=index, planes=1 + index % 3, shapes=shapes,
            quarters=index - 9, fill=(native.FINITE, native.SOME_QUIET, native.SAME_FOR_ALL)[index % 3],
            drains=index, rest=rng.bytes(300),
        )  # fmt: skip
        dtype = native.LOSSY_DTYPES[case.dtype % 3]
        with several_streams():
            coder: SegmentCoder = REFERENCE
            payloads = coder.encode_lossy(
                [case.segment(case.values(dtype))], case.sink_count, dtype, case.level_count, 1
            )[0]
        lengths = [len(payload) for payload in [*payloads[:-1], b"", b""][:2]]
        made = replace(case, length_0=lengths[0], length_1=lengths[1], rest=b"".join(payloads))
        yield f"valid-{dtype}-{('none', 'diagonal', 'basis')[profile]}-{index}", made.to_bytes()


def lossless_payloads(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    for index, (dtype, shapes) in enumerate(itertools.product(range(5), SHAPES[:2])):
        case = Case(
            dtype=dtype, tokens=(TOKENS, 39)[index % 2], memory=index % 5, planes=1 + index % 2, shapes=shapes,
            fill=index % 4, rest=rng.bytes(200),
        )  # fmt: skip
        name = native.LOSSLESS_DTYPES[dtype]
        with several_streams():
            payload = REFERENCE.encode_lossless([case.values(name)], name, 1)[0]
        yield f"valid-{name}-{index}", replace(case, rest=payload).to_bytes()


def several_streams() -> AbstractContextManager[None]:
    """Until it ends, the reference makes a stream of so few symbols."""
    return patch.multiple(rans, STREAM_SYMBOLS=256, STREAM_PAIR_SYMBOLS=64)


def values(rng: np.random.Generator, dtypes: int) -> Iterator[tuple[str, bytes]]:
    for index in range(4 * dtypes):
        case = Case(
            dtype=index, levels=index, tokens=(TOKENS, 70, 3)[index % 3], sinks=index, memory=index % 5,
            profile=index // 3, seed=9 * index, rotation=index // 2, planes=index, shapes=SHAPES[index % 3],
            quarters=3 * index - 16, fill=1 + index % 3, drains=index, rest=rng.bytes(16 << index % 4),
        )  # fmt: skip
        yield f"valid-{index}", case.to_bytes()


def encoded() -> Iterator[tuple[int, str, bytes]]:
    """(context, quality, object)"""
    for index, context in enumerate(CONTEXTS):
        kv = random_kv(context.layout.part_layout(context.part), (7, 40)[index % 2], index)
        for quality in ("high", "lossless") if index < 3 else ("medium",):
            yield index, quality, codec.encode(
                kv, context.layout, quality=quality, part=context.part, profile=context.profile, first_position=index,
            )  # fmt: skip


def containers() -> Iterator[tuple[str, bytes]]:
    for index, quality, blob in encoded():
        if index in (0, 1, 5):
            yield f"valid-{index}-{quality}", blob


def objects() -> Iterator[tuple[str, bytes]]:
    for index, quality, blob in encoded():
        yield f"valid-{index}-{quality}", bytes([index, 0]) + blob


def profiles() -> Iterator[tuple[str, bytes]]:
    for index, context in enumerate(CONTEXTS):
        if context.profile is not None:
            yield f"valid-{index}", context.profile.to_bytes()
    kv = random_kv(CONTEXTS[0].layout, 40, 1)
    yield "valid-statistics", codec.learn_statistics([(kv, 0)], CONTEXTS[0].layout).to_bytes()


def layouts() -> Iterator[tuple[str, bytes]]:
    for index, context in enumerate(CONTEXTS):
        yield f"valid-{index}", context.layout.canonical_bytes


def arrays(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    for context, quality in itertools.product(range(len(CONTEXTS)), range(5)):
        arguments = [context, quality, 5 * context + 3, 1 + 2 * (context % 2), context, 0, quality, 16]
        yield f"valid-{context}-{quality}", bytes(arguments) + rng.bytes(8 << context % 4)


if __name__ == "__main__":
    main()
