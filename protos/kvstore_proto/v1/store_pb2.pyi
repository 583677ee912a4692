from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_GPU: _ClassVar[Tier]
    TIER_HOST: _ClassVar[Tier]
    TIER_DISK: _ClassVar[Tier]
    TIER_REDIS: _ClassVar[Tier]
    TIER_UPSTREAM: _ClassVar[Tier]

class Durability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DURABILITY_MEMORY: _ClassVar[Durability]
    DURABILITY_DISK: _ClassVar[Durability]

class Verdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERDICT_UNSPECIFIED: _ClassVar[Verdict]
    VERDICT_SEND: _ClassVar[Verdict]
    VERDICT_HAVE: _ClassVar[Verdict]
    VERDICT_REFUSED: _ClassVar[Verdict]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_STORED: _ClassVar[Outcome]
    OUTCOME_HAVE: _ClassVar[Outcome]
    OUTCOME_REJECTED: _ClassVar[Outcome]
TIER_UNSPECIFIED: Tier
TIER_GPU: Tier
TIER_HOST: Tier
TIER_DISK: Tier
TIER_REDIS: Tier
TIER_UPSTREAM: Tier
DURABILITY_MEMORY: Durability
DURABILITY_DISK: Durability
VERDICT_UNSPECIFIED: Verdict
VERDICT_SEND: Verdict
VERDICT_HAVE: Verdict
VERDICT_REFUSED: Verdict
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_STORED: Outcome
OUTCOME_HAVE: Outcome
OUTCOME_REJECTED: Outcome

class LookupRequest(_message.Message):
    __slots__ = ("namespace_id", "chunk_hashes", "part", "lease_ms", "first_chunk_hash")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    CHUNK_HASHES_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    FIRST_CHUNK_HASH_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    chunk_hashes: bytes
    part: int
    lease_ms: int
    first_chunk_hash: bytes
    def __init__(self, namespace_id: _Optional[bytes] = ..., chunk_hashes: _Optional[bytes] = ..., part: _Optional[int] = ..., lease_ms: _Optional[int] = ..., first_chunk_hash: _Optional[bytes] = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("lease_id", "lease_ms", "tokens", "quality", "provenance", "stored_bytes", "tier")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    lease_id: bytes
    lease_ms: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    quality: _containers.RepeatedScalarFieldContainer[int]
    provenance: _containers.RepeatedScalarFieldContainer[int]
    stored_bytes: _containers.RepeatedScalarFieldContainer[int]
    tier: _containers.RepeatedScalarFieldContainer[Tier]
    def __init__(self, lease_id: _Optional[bytes] = ..., lease_ms: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., quality: _Optional[_Iterable[int]] = ..., provenance: _Optional[_Iterable[int]] = ..., stored_bytes: _Optional[_Iterable[int]] = ..., tier: _Optional[_Iterable[_Union[Tier, str]]] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("lease_id", "lease_ms")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    lease_id: bytes
    lease_ms: int
    def __init__(self, lease_id: _Optional[bytes] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("lease_ms",)
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    lease_ms: int
    def __init__(self, lease_ms: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("namespace_id", "chunk_hashes", "part", "quality", "lease_id", "held_bytes", "first_chunk_hash")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    CHUNK_HASHES_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    FIRST_CHUNK_HASH_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    chunk_hashes: bytes
    part: int
    quality: int
    lease_id: bytes
    held_bytes: _containers.RepeatedScalarFieldContainer[int]
    first_chunk_hash: bytes
    def __init__(self, namespace_id: _Optional[bytes] = ..., chunk_hashes: _Optional[bytes] = ..., part: _Optional[int] = ..., quality: _Optional[int] = ..., lease_id: _Optional[bytes] = ..., held_bytes: _Optional[_Iterable[int]] = ..., first_chunk_hash: _Optional[bytes] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("chunk_index", "object_bytes", "offset", "data")
    CHUNK_INDEX_FIELD_NUMBER: _ClassVar[int]
    OBJECT_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    chunk_index: int
    object_bytes: int
    offset: int
    data: bytes
    def __init__(self, chunk_index: _Optional[int] = ..., object_bytes: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class PutRequest(_message.Message):
    __slots__ = ("offer", "commit", "object_index", "offset", "data")
    OFFER_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    OBJECT_INDEX_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offer: PutOffer
    commit: PutCommit
    object_index: int
    offset: int
    data: bytes
    def __init__(self, offer: _Optional[_Union[PutOffer, _Mapping]] = ..., commit: _Optional[_Union[PutCommit, _Mapping]] = ..., object_index: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class PutOffer(_message.Message):
    __slots__ = ("namespace_id", "layout", "part", "durability", "objects", "retention", "first_chunk_hash")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    FIRST_CHUNK_HASH_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    layout: bytes
    part: int
    durability: Durability
    objects: _containers.RepeatedCompositeFieldContainer[ObjectOffer]
    retention: Retention
    first_chunk_hash: bytes
    def __init__(self, namespace_id: _Optional[bytes] = ..., layout: _Optional[bytes] = ..., part: _Optional[int] = ..., durability: _Optional[_Union[Durability, str]] = ..., objects: _Optional[_Iterable[_Union[ObjectOffer, _Mapping]]] = ..., retention: _Optional[_Union[Retention, _Mapping]] = ..., first_chunk_hash: _Optional[bytes] = ...) -> None: ...

class Retention(_message.Message):
    __slots__ = ("priority", "seconds")
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    priority: int
    seconds: int
    def __init__(self, priority: _Optional[int] = ..., seconds: _Optional[int] = ...) -> None: ...

class ObjectOffer(_message.Message):
    __slots__ = ("chunk_hash", "parent_hash", "object_bytes", "quality")
    CHUNK_HASH_FIELD_NUMBER: _ClassVar[int]
    PARENT_HASH_FIELD_NUMBER: _ClassVar[int]
    OBJECT_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    chunk_hash: bytes
    parent_hash: bytes
    object_bytes: int
    quality: int
    def __init__(self, chunk_hash: _Optional[bytes] = ..., parent_hash: _Optional[bytes] = ..., object_bytes: _Optional[int] = ..., quality: _Optional[int] = ...) -> None: ...

class PutCommit(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PutResponse(_message.Message):
    __slots__ = ("verdicts", "results")
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    verdicts: PutVerdicts
    results: PutResults
    def __init__(self, verdicts: _Optional[_Union[PutVerdicts, _Mapping]] = ..., results: _Optional[_Union[PutResults, _Mapping]] = ...) -> None: ...

class PutVerdicts(_message.Message):
    __slots__ = ("verdicts",)
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    verdicts: _containers.RepeatedScalarFieldContainer[Verdict]
    def __init__(self, verdicts: _Optional[_Iterable[_Union[Verdict, str]]] = ...) -> None: ...

class PutResults(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[ObjectResult]
    def __init__(self, results: _Optional[_Iterable[_Union[ObjectResult, _Mapping]]] = ...) -> None: ...

class ObjectResult(_message.Message):
    __slots__ = ("outcome", "reason", "durable")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    reason: str
    durable: bool
    def __init__(self, outcome: _Optional[_Union[Outcome, str]] = ..., reason: _Optional[str] = ..., durable: bool = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("namespace_id", "chunk_hashes", "part")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    CHUNK_HASHES_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    chunk_hashes: bytes
    part: int
    def __init__(self, namespace_id: _Optional[bytes] = ..., chunk_hashes: _Optional[bytes] = ..., part: _Optional[int] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ("objects", "bytes")
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    objects: int
    bytes: int
    def __init__(self, objects: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class StatRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatResponse(_message.Message):
    __slots__ = ("version", "node_id", "uptime_seconds", "objects", "namespaces", "leases", "staged_objects", "staged_bytes", "tiers", "counters", "pinned_bytes", "upstreams", "unix_seconds")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    STAGED_OBJECTS_FIELD_NUMBER: _ClassVar[int]
    STAGED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    UPSTREAMS_FIELD_NUMBER: _ClassVar[int]
    UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    version: str
    node_id: str
    uptime_seconds: float
    objects: int
    namespaces: int
    leases: int
    staged_objects: int
    staged_bytes: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierStat]
    counters: _containers.ScalarMap[str, int]
    pinned_bytes: int
    upstreams: _containers.RepeatedCompositeFieldContainer[UpstreamStat]
    unix_seconds: float
    def __init__(self, version: _Optional[str] = ..., node_id: _Optional[str] = ..., uptime_seconds: _Optional[float] = ..., objects: _Optional[int] = ..., namespaces: _Optional[int] = ..., leases: _Optional[int] = ..., staged_objects: _Optional[int] = ..., staged_bytes: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierStat, _Mapping]]] = ..., counters: _Optional[_Mapping[str, int]] = ..., pinned_bytes: _Optional[int] = ..., upstreams: _Optional[_Iterable[_Union[UpstreamStat, _Mapping]]] = ..., unix_seconds: _Optional[float] = ...) -> None: ...

class UpstreamStat(_message.Message):
    __slots__ = ("address", "state")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    address: str
    state: str
    def __init__(self, address: _Optional[str] = ..., state: _Optional[str] = ...) -> None: ...

class TierStat(_message.Message):
    __slots__ = ("tier", "objects", "used_bytes", "capacity_bytes")
    TIER_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    objects: int
    used_bytes: int
    capacity_bytes: int
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., objects: _Optional[int] = ..., used_bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("namespace_id", "hash_prefix", "limit", "page_token")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    HASH_PREFIX_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    hash_prefix: bytes
    limit: int
    page_token: str
    def __init__(self, namespace_id: _Optional[bytes] = ..., hash_prefix: _Optional[bytes] = ..., limit: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("objects", "next_page_token")
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    objects: _containers.RepeatedCompositeFieldContainer[ObjectEntry]
    next_page_token: str
    def __init__(self, objects: _Optional[_Iterable[_Union[ObjectEntry, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ObjectEntry(_message.Message):
    __slots__ = ("namespace_id", "chunk_hash", "part", "parent_hash", "tokens", "first_position", "quality", "provenance", "stored_bytes", "tiers", "idle_seconds", "reads", "leased", "model", "revision", "pinned")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    CHUNK_HASH_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    PARENT_HASH_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    LEASED_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    chunk_hash: bytes
    part: int
    parent_hash: bytes
    tokens: int
    first_position: int
    quality: int
    provenance: int
    stored_bytes: int
    tiers: _containers.RepeatedScalarFieldContainer[Tier]
    idle_seconds: float
    reads: int
    leased: bool
    model: str
    revision: str
    pinned: bool
    def __init__(self, namespace_id: _Optional[bytes] = ..., chunk_hash: _Optional[bytes] = ..., part: _Optional[int] = ..., parent_hash: _Optional[bytes] = ..., tokens: _Optional[int] = ..., first_position: _Optional[int] = ..., quality: _Optional[int] = ..., provenance: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[Tier, str]]] = ..., idle_seconds: _Optional[float] = ..., reads: _Optional[int] = ..., leased: bool = ..., model: _Optional[str] = ..., revision: _Optional[str] = ..., pinned: bool = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("namespace_id", "chunk_hashes")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    CHUNK_HASHES_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    chunk_hashes: bytes
    def __init__(self, namespace_id: _Optional[bytes] = ..., chunk_hashes: _Optional[bytes] = ...) -> None: ...

class VerifyResponse(_message.Message):
    __slots__ = ("checked", "total", "damaged_hash", "problem")
    CHECKED_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_HASH_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    checked: int
    total: int
    damaged_hash: bytes
    problem: str
    def __init__(self, checked: _Optional[int] = ..., total: _Optional[int] = ..., damaged_hash: _Optional[bytes] = ..., problem: _Optional[str] = ...) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("namespace_id", "chunk_hashes", "part", "quality", "first_chunk_hash")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    CHUNK_HASHES_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    FIRST_CHUNK_HASH_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    chunk_hashes: bytes
    part: int
    quality: int
    first_chunk_hash: bytes
    def __init__(self, namespace_id: _Optional[bytes] = ..., chunk_hashes: _Optional[bytes] = ..., part: _Optional[int] = ..., quality: _Optional[int] = ..., first_chunk_hash: _Optional[bytes] = ...) -> None: ...

class PrefetchResponse(_message.Message):
    __slots__ = ("held", "under_way")
    HELD_FIELD_NUMBER: _ClassVar[int]
    UNDER_WAY_FIELD_NUMBER: _ClassVar[int]
    held: int
    under_way: int
    def __init__(self, held: _Optional[int] = ..., under_way: _Optional[int] = ...) -> None: ...
