"""What stored KV bytes mean: layout, identity, object format, and the codec between arrays and objects."""

from kvstore_codec.errors import (
    CodecError, DamagedObject, ErrorCode, ForeignObject, LayoutError, ObjectError, UnsupportedObject, ValuesError,
)  # fmt: skip
from kvstore_codec.identity import (
    DEFAULT_TENANT_KEY, ChunkRef, Extras, MultimodalItem, chunk_refs, wrap_engine_hashes,
)  # fmt: skip
from kvstore_codec.layout import (
    KVLayout, LayerKind, LayerSpec, Partition, RoPE, RopeScaling, namespace_id_of,
)  # fmt: skip
from kvstore_codec.quality import Quality

__all__ = [
    "DEFAULT_TENANT_KEY",
    "ChunkRef",
    "CodecError",
    "DamagedObject",
    "ErrorCode",
    "Extras",
    "ForeignObject",
    "KVLayout",
    "LayerKind",
    "LayerSpec",
    "LayoutError",
    "MultimodalItem",
    "ObjectError",
    "Partition",
    "Quality",
    "RoPE",
    "RopeScaling",
    "UnsupportedObject",
    "ValuesError",
    "chunk_refs",
    "namespace_id_of",
    "wrap_engine_hashes",
]
