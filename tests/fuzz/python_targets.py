"""What reads bytes in Python, as functions of one input. A target returns whether the input was taken; it lets through
no exception but the typed ones that its subject documents, and asserts what must then hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from coders import NATIVE, REFERENCE
from kv_strategies import bits

import kvstore_codec as codec
from kvstore_codec.native import NATIVE as BEST
from kvstore_codec.rope import rotation_for
from kvstore_codec.segments import SegmentCoder
from tests.fuzz.contexts import CONTEXTS, Context
from tests.fuzz.sealing import sealed_object, sealed_profile

QUALITIES = ("raw", "lossless", "high", "medium", "low")
READ_AT = (None, "low", "medium", "high")
#: the NumPy reference is slow: it takes part in one of so many
REFERENCE_EVERY = 16
#: frequencies are computed in decimal arithmetic, one after the other
ROTATED_DIM_MAX = 256


def container(data: bytes) -> bool:
    """Objects as a node sees them, without their layout: header, table, checksums, truncation."""
    return any([_container(data), _container(sealed_object(data))])


def _container(blob: bytes) -> bool:
    try:
        info = codec.verify(blob)
    except codec.ObjectError:
        for reader in (codec.parse_header, codec.inspect, lambda data: codec.truncate(data, "low")):
            _refuses_or_reads(reader, blob)
        return False
    assert codec.inspect(blob) == info
    assert codec.parse_header(blob) == info.header
    assert len(blob) in info.header.layer_bytes
    assert all(rate > 0 for rate in info.bits_per_element.values())
    for quality in QUALITIES:
        prefix = codec.truncate(blob, quality)
        assert codec.verify(prefix).quality >= info.quality
        assert bytes(prefix) == blob[: len(prefix)]
    return True


def _refuses_or_reads(reader: Callable[[bytes], object], blob: bytes) -> None:
    try:
        reader(blob)
    except codec.ObjectError:
        return


def profile(data: bytes) -> bool:
    """Profiles from anybody: one byte string for one content."""
    return any([_profile(data), _profile(sealed_profile(data))])


def _profile(data: bytes) -> bool:
    try:
        read = codec.Profile.from_bytes(data)
    except codec.ProfileError:
        return False
    assert read.to_bytes() == data
    return True


def layout(data: bytes) -> bool:
    """Layouts as clients send them."""
    try:
        read = codec.KVLayout.from_canonical_bytes(data)
    except codec.LayoutError:
        return False
    assert read.canonical_bytes == data
    assert codec.KVLayout.from_dict(read.to_dict()) == read
    assert codec.model_id_of(read) == codec.model_id_of(codec.KVLayout.from_canonical_bytes(data))
    for layer in [each for each in read.layers[:2] if each.k_dim <= ROTATED_DIM_MAX]:
        with np.errstate(over="raise", invalid="raise"):  # keys rotate by finite angles
            rotation = rotation_for(layer, (1 << 48) - 1, 1)
        assert rotation is None or max(np.abs(rotation.cos).max(), np.abs(rotation.sin).max()) <= 1
    assert read.part_layout(read.partition.parts - 1).bytes_per_token * read.partition.parts <= 2 * read.bytes_per_token
    return True


def objects(data: bytes) -> bool:
    """Objects through `decode`: a byte for the context, one for how to read, then the object."""
    if len(data) < 2:
        return False
    context, blob = CONTEXTS[data[0] % len(CONTEXTS)], data[2:]
    if data[1] & 1 == 0:
        blob = sealed_object(blob)
    quality = READ_AT[data[1] >> 1 & 3]
    coders: list[SegmentCoder] = list(NATIVE.values())
    if data[-1] % REFERENCE_EVERY == 0:
        coders.append(REFERENCE)
    answers = {_decoded(blob, context, quality, coder) for coder in coders}
    assert len(answers) == 1, "coders decode differently"
    return isinstance(answers.pop(), bytes)


def _decoded(blob: bytes, context: Context, quality: str | None, coder: SegmentCoder) -> bytes | type[Exception]:
    """Decoded bits, or the typed error that said no."""
    try:
        kv = codec.decode(blob, context.layout, quality=quality, profile=context.profile, coder=coder, threads=2)
    except codec.ObjectError as error:
        return type(error)
    return bits(kv)


def encode(data: bytes) -> bool:
    """Any bits as KV, at any quality: eight bytes of arguments, then the bits, repeated as needed."""
    if len(data) < 8:
        return False
    context = CONTEXTS[data[0] % len(CONTEXTS)]
    quality = codec.storable_quality(context.layout, QUALITIES[data[1] % len(QUALITIES)])
    kv = _kv(context, 1 + data[2] % context.layout.chunk_tokens, data[8:], finite=data[3] & 1 == 1)
    arguments: dict[str, Any] = {
        "quality": quality, "part": context.part, "profile": context.profile, "threads": 1 + data[3] // 2 % 2,
        "first_position": int.from_bytes(data[4:6], "little") << data[6] % 33, "step": 2.0 ** (data[7] % 33 / 2 - 8),
    }  # fmt: skip
    coders: list[SegmentCoder] = [BEST, *NATIVE.values()]
    if data[-1] % REFERENCE_EVERY == 0:
        coders.append(REFERENCE)
    answers = {_encoded(kv, context, {**arguments, "coder": coder}) for coder in coders}
    assert len(answers) == 1, "coders encode differently"
    blob = answers.pop()
    if blob is None:
        assert not quality.exact, "exact qualities take any bits"
        assert not data[3] & 1, "finite values are refused"
        return False
    info = codec.verify(blob)
    for read_at in info.bits_per_element:
        restored = {_decoded(blob, context, read_at, coder) for coder in coders}
        assert len(restored) == 1, "coders decode differently"
        value = restored.pop()
        assert isinstance(value, bytes), "what an encoder wrote does not decode"
        assert not quality.exact or value == bits(kv), "an exact quality changed a bit"
    return True


def _encoded(kv: Any, context: Context, arguments: dict[str, Any]) -> bytes | None:
    try:
        blob: bytes = codec.encode(kv, context.layout, **arguments)
    except codec.ValuesError:
        return None
    return blob


def _kv(context: Context, tokens: int, data: bytes, *, finite: bool) -> Any:
    """Arrays filled with `data`'s bits; `finite`: less the exponent's upper bit, so that magnitudes stay below 2."""
    kv = codec.empty(context.layout.part_layout(context.part), tokens)
    for array in [each for pair in kv for each in pair] if isinstance(kv, list) else [kv]:
        view = array.view(np.uint8)
        view[...] = np.resize(np.frombuffer(data or b"\0", np.uint8), view.shape)
        if finite:
            view.reshape(-1)[array.itemsize - 1 :: array.itemsize] &= 0xBF
    return kv


TARGETS: dict[str, Callable[[bytes], bool]] = {
    "container": container, "encode": encode, "layout": layout, "objects": objects, "profile": profile,
}  # fmt: skip
