from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class EvictRequest(_message.Message):
    __slots__ = ("tier", "bytes", "chunk_hashes")
    TIER_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_HASHES_FIELD_NUMBER: _ClassVar[int]
    tier: str
    bytes: int
    chunk_hashes: bytes
    def __init__(self, tier: _Optional[str] = ..., bytes: _Optional[int] = ..., chunk_hashes: _Optional[bytes] = ...) -> None: ...

class EvictResponse(_message.Message):
    __slots__ = ("objects", "bytes")
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    objects: int
    bytes: int
    def __init__(self, objects: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("chunk_hashes", "seconds")
    CHUNK_HASHES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    chunk_hashes: bytes
    seconds: int
    def __init__(self, chunk_hashes: _Optional[bytes] = ..., seconds: _Optional[int] = ...) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ("chunk_hashes",)
    CHUNK_HASHES_FIELD_NUMBER: _ClassVar[int]
    chunk_hashes: bytes
    def __init__(self, chunk_hashes: _Optional[bytes] = ...) -> None: ...

class PinResponse(_message.Message):
    __slots__ = ("objects", "refused")
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    objects: int
    refused: int
    def __init__(self, objects: _Optional[int] = ..., refused: _Optional[int] = ...) -> None: ...
