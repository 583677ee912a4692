"""What stored KV bytes mean: layout, identity, object format, and the codec between arrays and objects."""

from kvstore_codec.api import check_header, decode, encode
from kvstore_codec.arrays import KVArray, empty, token_count, token_slice
from kvstore_codec.container import (
    HEADER_BYTES,
    CodecId,
    ObjectHeader,
    ObjectInfo,
    SegmentInfo,
    inspect,
    parse_header,
    truncate,
    verify,
)  # fmt: skip
from kvstore_codec.errors import (
    CodecError,
    DamagedObject,
    ErrorCode,
    ForeignObject,
    LayoutError,
    ObjectError,
    UnsupportedObject,
    ValuesError,
)  # fmt: skip
from kvstore_codec.identity import (
    DEFAULT_TENANT_KEY,
    ChunkRef,
    Extras,
    MultimodalItem,
    chunk_refs,
    wrap_engine_hashes,
)  # fmt: skip
from kvstore_codec.layout import (
    KVLayout,
    LayerKind,
    LayerSpec,
    Partition,
    RoPE,
    RopeScaling,
    namespace_id_of,
)  # fmt: skip
from kvstore_codec.quality import Quality

__all__ = [
    "DEFAULT_TENANT_KEY",
    "HEADER_BYTES",
    "ChunkRef",
    "CodecError",
    "CodecId",
    "DamagedObject",
    "ErrorCode",
    "Extras",
    "ForeignObject",
    "KVArray",
    "KVLayout",
    "LayerKind",
    "LayerSpec",
    "LayoutError",
    "MultimodalItem",
    "ObjectError",
    "ObjectHeader",
    "ObjectInfo",
    "Partition",
    "Quality",
    "RoPE",
    "RopeScaling",
    "SegmentInfo",
    "UnsupportedObject",
    "ValuesError",
    "check_header",
    "chunk_refs",
    "decode",
    "empty",
    "encode",
    "inspect",
    "namespace_id_of",
    "parse_header",
    "token_count",
    "token_slice",
    "truncate",
    "verify",
    "wrap_engine_hashes",
]
