"""Which stored chunk a prefix of tokens is: the keyed hash chain of design §4.

    h₀ = H(namespace id)        hᵢ = H(hᵢ₋₁ ‖ uint32-LE tokens of chunk i ‖ extras)

H is BLAKE2b-256 keyed with the tenant's 32-byte key, so a tenant can neither name nor guess another's chunks.
BLAKE2b's personalisation keeps the message kinds apart: full chunk, partial last chunk (whose token count is
hashed in), root, and hashes supplied by an engine, which are wrapped under the namespace, never trusted alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_codec.errors import LayoutError
from kvstore_codec.layout import KVLayout

HASH_BYTES = 32
TENANT_KEY_BYTES = 32
#: The stand-alone tenant `default`. Public on purpose: it separates nothing, it only fixes the function.
DEFAULT_TENANT_KEY = hashlib.blake2b(b"kvstore default tenant", digest_size=32).digest()

_ROOT, _FULL, _TAIL, _ENGINE = b"kvstore.root", b"kvstore.chunk", b"kvstore.tail", b"kvstore.engine"


@dataclass(frozen=True)
class MultimodalItem:
    """Content (an image, audio …) that stands behind placeholder tokens [position, position + length)."""

    position: int
    length: int
    digest: str

    def __post_init__(self) -> None:
        if self.position < 0 or self.length < 1 or not self.digest:
            raise LayoutError("a multimodal item needs position >= 0, length >= 1 and a digest")


@dataclass(frozen=True)
class Extras:
    """What besides tokens decides the KV. `salt` separates callers who must not share."""

    lora: str | None = None
    salt: str | None = None
    multimodal: tuple[MultimodalItem, ...] = ()

    def canonical_bytes(self, first_token: int, tokens: int) -> bytes:
        """Bytes that enter the hash of the chunk [first_token, first_token + tokens); b"" if nothing applies.

        LoRA and salt enter every chunk, a multimodal item every chunk that it overlaps.
        """
        end = first_token + tokens
        items = sorted(
            (item.position, item.length, item.digest)
            for item in self.multimodal
            if item.position < end and item.position + item.length > first_token
        )
        present: dict[str, Any] = {}
        if self.lora is not None:
            present["lora"] = self.lora
        if self.salt is not None:
            present["salt"] = self.salt
        if items:
            present["multimodal"] = items
        if not present:
            return b""
        return json.dumps(present, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


@dataclass(frozen=True)
class ChunkRef:
    """One chunk of a prefix: its hash (of everything up to its end), its parent's hash and its tokens."""

    hash: bytes
    parent: bytes
    index: int
    first_token: int
    tokens: int


def chunk_refs(
    layout: KVLayout, token_ids: Sequence[int] | npt.ArrayLike, *,
    extras: Extras | None = None, tenant_key: bytes = DEFAULT_TENANT_KEY, tail: bool = False,
) -> list[ChunkRef]:  # fmt: skip
    """Hash chain of a prompt: one ChunkRef per full chunk, and the partial last one if `tail`.

    `token_ids`: 1-D integers in [0, 2³²). Raises LayoutError for anything else.
    """
    tokens = _token_array(token_ids).tobytes()
    size, held = layout.chunk_tokens, len(tokens) // 4
    parent = _hash(_ROOT, tenant_key, layout.namespace_id)
    refs: list[ChunkRef] = []
    for index, first in enumerate(range(0, held, size)):
        count = min(size, held - first)
        if count < size and not tail:
            break
        message = tokens[4 * first : 4 * (first + count)]
        if count < size:
            message = count.to_bytes(4, "little") + message
        if extras is not None:
            message += extras.canonical_bytes(first, count)
        digest = _hash(_FULL if count == size else _TAIL, tenant_key, parent + message)
        refs.append(ChunkRef(digest, parent, index, first, count))
        parent = digest
    return refs


def wrap_engine_hashes(
    layout: KVLayout, engine_hashes: Iterable[bytes], *, tenant_key: bytes = DEFAULT_TENANT_KEY
) -> list[ChunkRef]:
    """Chunks named by an engine's own block-hash chain (one hash a chunk, in prefix order).

    The engine's hash covers tokens, LoRA, images and salt, but not the model or the layout: it is wrapped as
    H(namespace id ‖ engine hash). Raises LayoutError for hashes under 16 bytes.
    """
    parent = _hash(_ROOT, tenant_key, layout.namespace_id)
    refs: list[ChunkRef] = []
    for index, engine_hash in enumerate(engine_hashes):
        if len(engine_hash) < 16:
            raise LayoutError("engine hashes under 128 bits collide: use the sha256 mode", bytes=len(engine_hash))
        digest = _hash(_ENGINE, tenant_key, layout.namespace_id + engine_hash)
        refs.append(ChunkRef(digest, parent, index, index * layout.chunk_tokens, layout.chunk_tokens))
        parent = digest
    return refs


def _token_array(token_ids: Sequence[int] | npt.ArrayLike) -> npt.NDArray[np.uint32]:
    array = np.asarray(token_ids)
    if array.size == 0:
        return np.empty(0, dtype="<u4")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise LayoutError("token ids must be a 1-D list of integers", shape=array.shape, dtype=array.dtype)
    if int(array.min()) < 0 or int(array.max()) >= 1 << 32:
        raise LayoutError("token ids must be in [0, 2**32)")
    return array.astype("<u4")


def _hash(kind: bytes, tenant_key: bytes, message: bytes) -> bytes:
    if len(tenant_key) != TENANT_KEY_BYTES:
        raise LayoutError(f"a tenant key has {TENANT_KEY_BYTES} bytes", bytes=len(tenant_key))
    return hashlib.blake2b(message, digest_size=HASH_BYTES, key=tenant_key, person=kind).digest()
