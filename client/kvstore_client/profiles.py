"""A profile as ordinary objects: how its bytes become rows of a reserved layout, and rows become a profile again.

No protocol knows of profiles. `PROFILE_LAYOUT` is one layer of uint8 whose tokens are rows of `ROW_BYTES` (K's half,
then V's), stored raw. The first row holds the number of the profile's bytes (u64, little-endian, then zeros), the bytes
follow from the second row on, and zeros fill the last chunk. The token ids of every row are the profile's id, so the
hash chain of the chunks is its address: who knows the id knows the name of each piece, and what is loaded is compared
with the id, so that nobody can put something else in its place.

Pure: no I/O.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

import kvstore_codec as codec
from kvstore_client.errors import InvalidArgument, ProfileDamaged
from kvstore_codec import ChunkRef, KVLayout, LayerKind, Profile, ProfileGroup
from kvstore_codec.container import Buffer
from kvstore_codec.profile_bytes import METADATA_BYTES_MAX

PROFILE_ID_BYTES = 32
#: Enough for the bases of every layer of a 70-billion-parameter model; no more is ever loaded.
PROFILE_BYTES_MAX = 1 << 30
_HALF_ROW = 4096
ROW_BYTES = 2 * _HALF_ROW
#: 16 rows, 128 KiB, a chunk
PROFILE_LAYOUT = KVLayout.uniform(
    model="kvstore.profile", revision="1", num_layers=1, kv_heads=1, head_dim=_HALF_ROW, dtype="uint8", chunk_tokens=16
)
CHUNK_BYTES = PROFILE_LAYOUT.chunk_tokens * ROW_BYTES

Rows = npt.NDArray[np.uint8]


def require_usable(profile: Profile, layout: KVLayout) -> None:
    """That chunks of `layout` can be coded with `profile`. Raises InvalidArgument, which names the fix."""
    if not isinstance(profile, Profile):
        raise InvalidArgument("profile must be a kvstore_codec.Profile: Profile.load(path)", got=type(profile).__name__)
    require_profiles(layout)
    try:
        profile.require_fit(layout)
    except codec.ProfileError as error:
        raise InvalidArgument(str(error)) from error
    size = METADATA_BYTES_MAX + sum(array.nbytes for group in profile.groups for array in _arrays(group))
    if size > PROFILE_BYTES_MAX:
        raise InvalidArgument(
            "the profile is too large to be stored: calibrate fewer layers together", bytes=size,
            limit=PROFILE_BYTES_MAX,
        )  # fmt: skip


def require_profiles(layout: KVLayout) -> None:
    """That chunks of `layout` can be coded with any profile. Raises InvalidArgument."""
    if layout.partition.parts != 1:
        raise InvalidArgument("a profile codes whole chunks: use a layout without partition, or no profile")
    if any(layer.kind is LayerKind.STATE for layer in layout.layers):
        raise InvalidArgument("a profile does not code recurrent state: use none for this layout")


def chunks_of(profile_bytes: int) -> int:
    """How many chunks a profile of this length takes."""
    return -(-(ROW_BYTES + profile_bytes) // CHUNK_BYTES)


def profile_refs(profile_id: bytes, chunks: int, tenant_key: bytes) -> list[ChunkRef]:
    """Where the first `chunks` chunks of a profile lie."""
    rows = chunks * PROFILE_LAYOUT.chunk_tokens
    token_ids = np.resize(np.frombuffer(profile_id, "<u4"), rows)
    return codec.chunk_refs(PROFILE_LAYOUT, token_ids, tenant_key=tenant_key)


def pack(data: bytes) -> Rows:
    """`data` as rows [rows, ROW_BYTES], whole chunks of them."""
    flat = np.zeros(chunks_of(len(data)) * CHUNK_BYTES, np.uint8)
    flat[:8] = np.frombuffer(len(data).to_bytes(8, "little"), np.uint8)
    flat[ROW_BYTES : ROW_BYTES + len(data)] = np.frombuffer(data, np.uint8)
    return flat.reshape(-1, ROW_BYTES)


def empty_rows(chunks: int) -> Rows:
    """Room for `chunks` chunks."""
    return np.empty((chunks * PROFILE_LAYOUT.chunk_tokens, ROW_BYTES), np.uint8)


def as_kv(rows: Rows) -> Any:
    """The rows as KV of PROFILE_LAYOUT, [1, 2, rows, 1, half a row]: a view, to encode from and to decode into."""
    return rows.reshape(-1, 2, 1, _HALF_ROW).transpose(1, 0, 2, 3)[np.newaxis]


def length_in(rows: Rows) -> int:
    """Bytes of the profile whose first row this begins with. Raises ProfileDamaged for an impossible number."""
    length = int.from_bytes(rows[0, :8].tobytes(), "little")
    if not 1 <= length <= PROFILE_BYTES_MAX:
        raise ProfileDamaged("a stored profile has an impossible length", bytes=length)
    return length


def unpack(rows: Rows) -> Buffer:
    """Inverse of `pack`, a view. Raises ProfileDamaged where the rows are not as many as their first one says."""
    length = length_in(rows)
    if len(rows) * ROW_BYTES != chunks_of(length) * CHUNK_BYTES:
        raise ProfileDamaged("a stored profile has another length than it says", bytes=length, rows=len(rows))
    return rows.data.cast("B")[ROW_BYTES : ROW_BYTES + length]


def parse(data: Buffer, profile_id: bytes) -> Profile:
    """The profile that these bytes are, which must be the one with this id. Raises ProfileDamaged."""
    try:
        profile = Profile.from_bytes(data)
    except codec.ProfileError as error:
        raise ProfileDamaged(f"a stored profile cannot be read: {error}", profile=profile_id.hex()) from error
    if profile.profile_id != profile_id:
        raise ProfileDamaged(
            "a stored profile is another one", profile=profile_id.hex(), found=profile.profile_id.hex()
        )  # fmt: skip
    return profile


def _arrays(group: ProfileGroup) -> list[npt.NDArray[Any]]:
    every = (group.mean, group.weight, group.scale_ids, group.basis)
    return [array for array in every if array is not None]
