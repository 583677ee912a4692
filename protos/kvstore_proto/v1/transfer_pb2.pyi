from kvstore_proto.v1 import store_pb2 as _store_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ConnectRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class ConnectResponse(_message.Message):
    __slots__ = ("version", "ticket", "ticket_ms", "addresses")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TICKET_MS_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    version: int
    ticket: bytes
    ticket_ms: int
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[int] = ..., ticket: _Optional[bytes] = ..., ticket_ms: _Optional[int] = ..., addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class BulkFetch(_message.Message):
    __slots__ = ("request", "places", "hold_ms")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    HOLD_MS_FIELD_NUMBER: _ClassVar[int]
    request: _store_pb2.FetchRequest
    places: bool
    hold_ms: int
    def __init__(self, request: _Optional[_Union[_store_pb2.FetchRequest, _Mapping]] = ..., places: bool = ..., hold_ms: _Optional[int] = ...) -> None: ...

class BulkGet(_message.Message):
    __slots__ = ("lookup", "quality", "min_quality", "places", "hold_ms")
    LOOKUP_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    MIN_QUALITY_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    HOLD_MS_FIELD_NUMBER: _ClassVar[int]
    lookup: _store_pb2.LookupRequest
    quality: int
    min_quality: int
    places: bool
    hold_ms: int
    def __init__(self, lookup: _Optional[_Union[_store_pb2.LookupRequest, _Mapping]] = ..., quality: _Optional[int] = ..., min_quality: _Optional[int] = ..., places: bool = ..., hold_ms: _Optional[int] = ...) -> None: ...

class Places(_message.Message):
    __slots__ = ("offset", "object_bytes")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    OBJECT_BYTES_FIELD_NUMBER: _ClassVar[int]
    offset: _containers.RepeatedScalarFieldContainer[int]
    object_bytes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, offset: _Optional[_Iterable[int]] = ..., object_bytes: _Optional[_Iterable[int]] = ...) -> None: ...

class Ended(_message.Message):
    __slots__ = ("status", "code", "details")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    status: int
    code: str
    details: str
    def __init__(self, status: _Optional[int] = ..., code: _Optional[str] = ..., details: _Optional[str] = ...) -> None: ...

class SharedMemory(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...
