from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LiveWriteRequest(_message.Message):
    __slots__ = ("open", "layer", "offset", "object_bytes", "data")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    OBJECT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    open: LiveOpen
    layer: int
    offset: int
    object_bytes: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, open: _Optional[_Union[LiveOpen, _Mapping]] = ..., layer: _Optional[int] = ..., offset: _Optional[int] = ..., object_bytes: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class LiveOpen(_message.Message):
    __slots__ = ("namespace_id", "part", "chunk_hashes", "layers", "quality", "provenance")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    CHUNK_HASHES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    part: int
    chunk_hashes: bytes
    layers: int
    quality: int
    provenance: int
    def __init__(self, namespace_id: _Optional[bytes] = ..., part: _Optional[int] = ..., chunk_hashes: _Optional[bytes] = ..., layers: _Optional[int] = ..., quality: _Optional[int] = ..., provenance: _Optional[int] = ...) -> None: ...

class LiveWriteResponse(_message.Message):
    __slots__ = ("opened",)
    OPENED_FIELD_NUMBER: _ClassVar[int]
    opened: LiveOpened
    def __init__(self, opened: _Optional[_Union[LiveOpened, _Mapping]] = ...) -> None: ...

class LiveOpened(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FollowRequest(_message.Message):
    __slots__ = ("namespace_id", "part", "chunk_hashes", "stored_chunks", "min_quality", "wait_ms")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    CHUNK_HASHES_FIELD_NUMBER: _ClassVar[int]
    STORED_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    MIN_QUALITY_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    part: int
    chunk_hashes: bytes
    stored_chunks: int
    min_quality: int
    wait_ms: int
    def __init__(self, namespace_id: _Optional[bytes] = ..., part: _Optional[int] = ..., chunk_hashes: _Optional[bytes] = ..., stored_chunks: _Optional[int] = ..., min_quality: _Optional[int] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class FollowResponse(_message.Message):
    __slots__ = ("found", "stored", "layer", "offset", "object_bytes", "data")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    OBJECT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    found: LiveFound
    stored: LiveStored
    layer: int
    offset: int
    object_bytes: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, found: _Optional[_Union[LiveFound, _Mapping]] = ..., stored: _Optional[_Union[LiveStored, _Mapping]] = ..., layer: _Optional[int] = ..., offset: _Optional[int] = ..., object_bytes: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class LiveFound(_message.Message):
    __slots__ = ("first_chunk", "chunks", "layers", "quality", "provenance")
    FIRST_CHUNK_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    first_chunk: int
    chunks: int
    layers: int
    quality: int
    provenance: int
    def __init__(self, first_chunk: _Optional[int] = ..., chunks: _Optional[int] = ..., layers: _Optional[int] = ..., quality: _Optional[int] = ..., provenance: _Optional[int] = ...) -> None: ...

class LiveStored(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
