"""Profiles: what a model's cache looks like, measured once, so that chunks need not carry it.

Per group of consecutive layers (K un-rotated and V together, or one of them): the mean and a weight of every channel,
optionally an orthonormal basis, and a scale id of every component. All is folded so that the base quantiser step
("low") is exactly 1:

    y = basis @ (weight · (x − mean))        x: the group's channels of one token, float32, RoPE undone
    x̂ = (basisᵀ @ ŷ) / weight + mean

with steps 1, 1/3 and 1/9 for low, medium and high. Channels lie in the order of `SegmentGroup.plane_indices` (K of
the first layer, V of the first layer, K of the next …), inside a plane as head · dim + d.

A profile is an object with a content hash: what is coded with it names that hash, so it is never changed in place.
`profile_bytes` has the file format.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_codec import profile_bytes, tables
from kvstore_codec.container import KV, Buffer
from kvstore_codec.errors import ErrorCode, ProfileError
from kvstore_codec.layout import LAYERS_MAX, KVLayout
from kvstore_codec.segments import SegmentGroup

MODEL_ID_BYTES = 32
#: what keeps every number that coding forms finite (native/lossy.hpp)
_WEIGHT_MIN, _WEIGHT_MAX, _MEAN_MAX = 2.0**-40, 2.0**40, 2.0**60


class ProfileKind(IntEnum):
    TRANSFORM = 1  # weights and a basis
    DIAGONAL = 2  # weights of the loss, no basis
    STATISTICS = 3  # weights from each plane's rms alone: what an object without a profile carries, learned once


@dataclass(frozen=True, eq=False)
class ProfileGroup:
    """Planes `kv` of layers [layer_first, layer_first + layer_count).

    `mean`, `weight` float32 [channels], finite, weight > 0. `basis` float16 [components, channels], rows orthonormal up
    to their rounding and ordered by descending variance, components <= channels; None: components are channels.
    `scale_ids` uint8 [components], see `scale_ids_of`. Arrays are made read-only. Raises ProfileError.
    """

    kv: KV
    layer_first: int
    layer_count: int
    mean: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]
    basis: npt.NDArray[np.float16] | None
    scale_ids: npt.NDArray[np.uint8]

    def __post_init__(self) -> None:
        if self.kv not in (KV.K, KV.V, KV.K | KV.V):
            raise ProfileError("a group holds K, V or both", kv=int(self.kv))
        if self.layer_first < 0 or self.layer_count < 1 or self.layer_first + self.layer_count > LAYERS_MAX:
            raise ProfileError("a group's layers are out of range", first=self.layer_first, count=self.layer_count)
        for name, dtype in (("mean", np.float32), ("weight", np.float32), ("basis", np.float16)):
            array = getattr(self, name)
            if array is None and name == "basis":
                continue
            _check_array(name, array, np.dtype(dtype))
            if not np.isfinite(array).all():
                raise ProfileError(f"{name} must be finite")
        _check_array("scale_ids", self.scale_ids, np.dtype(np.uint8))
        channels, components = self.channels, self.components
        expected: dict[str, tuple[int, ...]] = {
            "mean": (channels,), "weight": (channels,), "scale_ids": (components,), "basis": (components, channels),
        }  # fmt: skip
        for name, shape in expected.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise ProfileError(f"{name} has the wrong shape", got=array.shape, expected=shape)
        if components > channels:
            raise ProfileError("a basis has no more rows than channels", rows=components, channels=channels)
        if not ((self.weight >= _WEIGHT_MIN) & (self.weight <= _WEIGHT_MAX)).all():
            raise ProfileError("weights must be 2**-40 to 2**40")
        if not (np.abs(self.mean) <= _MEAN_MAX).all():
            raise ProfileError("means must be within 2**60")
        if not (self.scale_ids <= tables.SCALE_ID_MAX).all():
            raise ProfileError(f"scale ids must be 0–{tables.SCALE_ID_MAX}")

    @property
    def channels(self) -> int:
        return int(self.mean.shape[0]) if self.mean.ndim else 0

    @property
    def components(self) -> int:
        return self.channels if self.basis is None else int(self.basis.shape[0])

    @property
    def planes(self) -> SegmentGroup:
        """Which planes these are, with their order (`plane_indices`)."""
        return SegmentGroup(self.kv, self.layer_first, self.layer_count)


@dataclass(frozen=True, eq=False)
class Profile:
    """A model's profile. `model_id`: `model_id_of` its layout. `groups` together cover every plane exactly once.

    `metadata`: JSON values that say where the profile comes from; copied. The id covers them, so they must hold
    nothing that differs between two equal runs. Raises ProfileError.
    """

    kind: ProfileKind
    model_id: bytes
    groups: tuple[ProfileGroup, ...]
    metadata: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        object.__setattr__(self, "metadata", profile_bytes.parse_metadata(profile_bytes.dump_metadata(self.metadata)))
        if len(self.model_id) != MODEL_ID_BYTES:
            raise ProfileError(f"a model id has {MODEL_ID_BYTES} bytes", bytes=len(self.model_id))
        if any((group.basis is not None) != (self.kind is ProfileKind.TRANSFORM) for group in self.groups):
            raise ProfileError("every group of a transform profile has a basis, and no other profile's has one")
        _check_coverage(self.groups)

    @property
    def num_layers(self) -> int:
        return max(group.layer_first + group.layer_count for group in self.groups)

    @cached_property
    def profile_id(self) -> bytes:
        """BLAKE2b-256 of the profile's bytes (32 bytes)."""
        return hashlib.blake2b(self.to_bytes(), digest_size=32, person=b"kvstore.profile").digest()

    def to_bytes(self) -> bytes:
        """The file format "KVCP": the same profile gives the same bytes on every machine."""
        records = (
            profile_bytes.GroupRecord(
                int(group.kv), group.layer_first, group.layer_count, group.mean, group.weight, group.scale_ids,
                group.basis,
            )
            for group in self.groups
        )  # fmt: skip
        return profile_bytes.pack(int(self.kind), self.model_id, self.metadata, list(records))

    @classmethod
    def from_bytes(cls, data: Buffer) -> Profile:
        """Inverse of `to_bytes`, for bytes of any origin: every length and value is checked before memory is
        allocated by it, and only canonical bytes are taken. The arrays are copies. Raises ProfileError."""
        kind, model_id, metadata, records = profile_bytes.unpack(data)
        if kind not in list(ProfileKind):
            raise ProfileError("a profile of an unknown kind", code=ErrorCode.VERSION_UNSUPPORTED, kind=kind)
        groups = tuple(
            ProfileGroup(
                KV(record.kv), record.layer_first, record.layer_count, record.mean, record.weight, record.basis,
                record.scale_ids,
            )
            for record in records
        )  # fmt: skip
        return cls(ProfileKind(kind), model_id, groups, metadata)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file whole or not at all: a reader never sees half of it. Raises OSError."""
        target = Path(path)
        with _replacement(target) as scratch:
            with scratch.open("wb") as file:
                file.write(self.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Raises OSError, ProfileError."""
        return cls.from_bytes(Path(path).read_bytes())

    def fits(self, layout: KVLayout) -> bool:
        """Whether this is a profile of the model and shape that `layout` describes, whatever its chunk size."""
        return self._misfit(layout) is None

    def require_fit(self, layout: KVLayout) -> None:
        """Raises ProfileError, naming the difference, unless the profile `fits`."""
        misfit = self._misfit(layout)
        if misfit is not None:
            raise misfit

    def _misfit(self, layout: KVLayout) -> ProfileError | None:
        expected = model_id_of(layout)
        if self.model_id != expected:
            return ProfileError(
                "the profile belongs to another model, revision, dtype or rope: calibrate this one",
                code=ErrorCode.IDENTITY_MISMATCH, found=self.model_id.hex()[:16], expected=expected.hex()[:16],
            )  # fmt: skip
        if self.num_layers != layout.num_layers:
            return ProfileError("the profile has another number of layers than its model's layout")
        for group in self.groups:
            channels = sum(plane_channels(layout, index) for index in group.planes.plane_indices)
            if channels != group.channels:
                return ProfileError("a group has other channels than its planes", got=group.channels, expected=channels)
        return None


def model_id_of(layout: KVLayout) -> bytes:
    """What a profile of `layout`'s model belongs to, whatever the chunk size and partition (32 bytes)."""
    return layout.model_id


def plane_channels(layout: KVLayout, plane_index: int) -> int:
    """Channels of plane `plane_index` of the list K₀, V₀, K₁, V₁, …"""
    layer = layout.layers[plane_index // 2]
    return layer.v_channels if plane_index % 2 else layer.k_channels


def scale_ids_of(variances: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Scale ids of components with these variances at base step 1.

    id = clamp(round(4·log₂ σ) + 16 + 8, 0, 63), by the format's exact thresholds; id − 8 is the scale index of
    `tables`. Id 0 is not coded at any quality.
    """
    return np.searchsorted(tables.SCALE_THRESHOLDS, variances, side="right").astype(np.uint8)


def _check_array(name: str, array: Any, dtype: np.dtype[Any]) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        raise ProfileError(f"{name} must be a {dtype.name} array", got=getattr(array, "dtype", type(array).__name__))
    array.flags.writeable = False


def _check_coverage(groups: Sequence[ProfileGroup]) -> None:
    """K and V of layers 0…n−1, each exactly once."""
    ends = set()
    for side in (KV.K, KV.V):
        end = 0
        for group in sorted((group for group in groups if side in group.kv), key=lambda group: group.layer_first):
            if group.layer_first != end:
                raise ProfileError("groups must cover every plane exactly once", layer=group.layer_first)
            end += group.layer_count
        ends.add(end)
    if len(ends) > 1 or ends == {0}:
        raise ProfileError("groups must cover K and V of the same layers")


@contextlib.contextmanager
def _replacement(target: Path) -> Iterator[Path]:
    """A new file beside `target`, removed if it has not taken the target's place."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    scratch = Path(name)
    try:
        scratch.chmod(0o644)
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)
